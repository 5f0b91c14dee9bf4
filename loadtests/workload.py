"""What the users of a load test ask for: seeded requests over power-law-distributed adapters. Pure; no HTTP.

The adapters, in an order shuffled by the seed, get the weights 1, 1/2^s, 1/3^s, ... (S-LoRA's traces do the same): a
few are hot, most are cold. Every user draws from a random stream of its own, so that the same seed gives each user the
same requests, whatever the timing.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

PROMPTS = (
    "Quote by Oscar Wilde:",
    "Quote by Mark Twain:",
    "Quote by Jane Austen:",
    "Quote by Ralph Waldo Emerson:",
    "Quote by Friedrich Nietzsche: \"",
    "Quote about love:",
    "Quote about the sea, by Herman Melville:",
    "CYNIC, n.",
    "Once upon a time",
    "The naïve café owner said — “",
)  # fmt: skip
# How a text is drawn; each is as likely as the others.
SAMPLING: tuple[dict[str, Any], ...] = (
    {},
    {"do_sample": True, "temperature": 0.8, "top_p": 0.95},
    {"do_sample": True, "temperature": 1.0, "top_k": 50},
    {"do_sample": True, "temperature": 0.7, "top_k": 40, "top_p": 0.9, "repetition_penalty": 1.2},
)
SHORTEST, LONGEST = 16, 64  # new tokens
STOP_SHARE = 0.1  # of the requests that end at a full stop
IGNORE_EOS_SHARE = 0.2  # of the requests that go on to their limit
PROMPT_ROOM = 32  # positions kept for the prompt; the longest above has about half of it


@dataclass(frozen=True)
class Served:
    """What `GET /v1/models` says is served."""

    adapters: tuple[str, ...]
    max_model_len: int

    @classmethod
    def read(cls, listing: Any) -> "Served":
        """From the parsed answer. Raises ValueError if it isn't a listing of one base and its adapters."""
        try:
            cards = listing["data"]
            bases = [card for card in cards if card["parent"] is None]
            adapters = tuple(sorted(str(card["id"]) for card in cards if card["parent"] is not None))
            (base,) = bases
            return cls(adapters, int(base["max_model_len"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"/v1/models does not list one base and its adapters: {error!r}") from None


@dataclass(frozen=True)
class Job:
    """One request."""

    prompt: str
    adapter: str | None  # None: the base
    max_new_tokens: int
    ignore_eos: bool
    sampling: dict[str, Any]

    def body(self) -> dict[str, Any]:
        """As POST /generate and /generate_stream take it."""
        parameters = {"max_new_tokens": self.max_new_tokens, "details": True} | self.sampling
        if self.adapter is not None:
            parameters["adapter_id"] = self.adapter
        if self.ignore_eos:
            parameters["ignore_eos_token"] = True
        return {"inputs": self.prompt, "parameters": parameters}


class Workload:
    """Requests for every user of one run."""

    def __init__(self, served: Served, seed: int = 0, skew: float = 1.0, base_share: float = 0.1) -> None:
        """`skew` is the power law's exponent, 0 for uniform; `base_share` of the requests go to the base alone."""
        if skew < 0 or not 0 <= base_share <= 1:
            raise ValueError(f"skew is {skew}, base_share {base_share}; expected 0 or more and 0 to 1")
        self.seed, self.base_share = seed, base_share
        self.adapters = random.Random(seed).sample(served.adapters, len(served.adapters))  # hottest first
        self._cumulative = list(accumulate(popularity(len(self.adapters), skew)))
        self._longest = max(1, min(LONGEST, served.max_model_len - PROMPT_ROOM))

    def jobs(self, user: int) -> Iterator[Job]:
        """The endless requests of one user."""
        draw = random.Random(f"{self.seed}/{user}")
        while True:
            yield self._job(draw)

    def _job(self, draw: random.Random) -> Job:
        sampling = dict(draw.choice(SAMPLING))
        if "do_sample" in sampling:
            sampling["seed"] = draw.getrandbits(32)
        if draw.random() < STOP_SHARE:
            sampling["stop"] = ["."]
        return Job(
            prompt=draw.choice(PROMPTS),
            adapter=self._adapter(draw),
            max_new_tokens=draw.randint(min(SHORTEST, self._longest), self._longest),
            ignore_eos=draw.random() < IGNORE_EOS_SHARE,
            sampling=sampling,
        )

    def _adapter(self, draw: random.Random) -> str | None:
        if not self.adapters or draw.random() < self.base_share:
            return None
        return draw.choices(self.adapters, cum_weights=self._cumulative)[0]


def popularity(count: int, skew: float) -> Sequence[float]:
    """Shares of the adapters, hottest first; they sum to 1."""
    weights = [rank**-skew for rank in range(1, count + 1)]
    total = sum(weights)
    return [weight / total for weight in weights]
