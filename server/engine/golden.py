"""Replays an adapter's golden prompts before it serves anybody: in the ordinary batch, beside everybody's requests.

What is compared, and where the tolerances come from: docs/decisions/0009-golden-replay.md.
"""

import logging
import math
import time
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch

from adapters.adapter import AdapterRef, alone
from adapters.errors import AdapterError, AdapterRefused, AdapterUnavailable
from adapters.golden import GOLDEN_FILE, Golden, GoldenPrompt
from adapters.residency import Residency
from server.engine.scheduler import Scheduler
from server.engine.types import FinishReason, Request, SamplingParams, Sequence

logger = logging.getLogger(__name__)
CONTENDERS = 8
"""The golden token has to be among so many best ones."""


@dataclass(frozen=True)
class Tolerance:
    """How far logprobs may lie from the golden ones, nats."""

    token: float  # at any token
    mean: float  # over all tokens of the adapter that are compared


TOLERANCES = {
    torch.float32: Tolerance(1e-3, 1e-3),
    torch.float16: Tolerance(0.03, 0.01),
    torch.bfloat16: Tolerance(0.25, 0.05),
}
ROUNDED_LOGITS = {torch.float16: Tolerance(0.15, 0.05), torch.bfloat16: Tolerance(0.75, 0.2)}
"""Where the logits themselves are rounded: those of GPT-2 lie around -100, where bfloat16 has steps of a half."""


@dataclass(frozen=True)
class _Proof:
    """One adapter's prompts under way."""

    ref: AdapterRef
    parts: tuple[tuple[int, GoldenPrompt, Sequence], ...]  # the prompt's index in the file

    @property
    def ended(self) -> bool:
        return all(sequence.finish_reason is not None for _, _, sequence in self.parts)


class GoldenReplay:
    """The proofs of the adapters that have just come onto the device."""

    def __init__(
        self, scheduler: Scheduler, residency: Residency, max_model_len: int, vocab_size: int, dtype: torch.dtype,
        *, rounded_logits: bool = False,
    ) -> None:  # fmt: skip
        """`dtype` of the model; `rounded_logits`: whether the logits are of it too, not fp32."""
        self._scheduler, self._residency = scheduler, residency
        self._max_model_len, self._vocab_size = max_model_len, vocab_size
        self.tolerance = (ROUNDED_LOGITS if rounded_logits else TOLERANCES).get(dtype, TOLERANCES[dtype])
        self._proofs: list[_Proof] = []

    def start(self) -> None:
        """Queue the prompts of adapters that wait for their proof; called before a step is scheduled."""
        for ref, golden in self._residency.take_unproved():
            if (error := self._out_of_vocabulary(golden)) is not None:
                self._residency.end_proof(ref, error)
                continue
            proof = self._proof(ref, golden)
            for _, _, sequence in proof.parts:
                self._scheduler.add(sequence)
            self._proofs.append(proof)
            if not proof.parts:
                logger.warning(
                    "%s of adapter %r could not be replayed: none of its prompts fits into %d positions",
                    GOLDEN_FILE, ref.name, self._max_model_len,
                )  # fmt: skip
        self.settle()

    def settle(self) -> None:
        """Judge the adapters whose prompts have all ended; called after a step."""
        if not self._proofs:
            return
        ended = [proof for proof in self._proofs if proof.ended]
        self._proofs = [proof for proof in self._proofs if not proof.ended]
        for proof in ended:
            error = self._judge(proof)
            if error is not None:
                logger.warning("adapter %r (sha256 %s) is not served: %s", proof.ref.name, proof.ref.digest[:12], error)
            self._residency.end_proof(proof.ref, error)

    def _proof(self, ref: AdapterRef, golden: Golden) -> _Proof:
        parts: list[tuple[int, GoldenPrompt, Sequence]] = []
        for i, prompt in enumerate(golden.prompts):
            count = min(len(prompt.token_ids), self._max_model_len - len(prompt.prompt_token_ids))
            if count < 1:
                continue
            params = SamplingParams(max_tokens=count, ignore_eos=True, logprobs=True, top_logprobs=CONTENDERS)
            request = Request(f"golden/{ref.digest}/{i}", prompt.prompt_token_ids, params, alone(ref), time.monotonic())
            parts.append((i, prompt, Sequence(request, proof=True)))
        return _Proof(ref, tuple(parts))

    def _out_of_vocabulary(self, golden: Golden) -> AdapterRefused | None:
        for i, prompt in enumerate(golden.prompts):
            for field in ("prompt_token_ids", "token_ids"):
                ids: Seq[int] = getattr(prompt, field)
                if max(ids) >= self._vocab_size:
                    return AdapterRefused(
                        f"{GOLDEN_FILE}: prompts[{i}].{field} holds {max(ids)}, the base has {self._vocab_size} "
                        "tokens: the adapter was made on another base"
                    )
        return None

    def _judge(self, proof: _Proof) -> AdapterError | None:
        """What doesn't match, in the order of the file; else why a part could not be computed; else None.

        The golden token's logprob must be within the tolerance of what it was, whether it came first or not: where the
        best lie that close together, another one may. What follows that is another text, which isn't compared.
        """
        failed: AdapterError | None = None
        gaps: list[tuple[float, str]] = []  # nats, and where and what
        for i, prompt, sequence in proof.parts:
            for at, token in enumerate(sequence.output_ids):
                golden, best = prompt.token_ids[at], sequence.logprobs[at]
                logprob = best if token == golden else dict(sequence.top_logprobs[at]).get(golden, -math.inf)
                gap = abs(logprob - prompt.logprobs[at])
                ahead = best - logprob  # at most twice the tolerance where golden was the best, too
                gaps.append((gap, f"{_where(i, prompt, at)}, got {token} ({best:.3f})"))
                if not (gap <= self.tolerance.token and ahead <= 2 * self.tolerance.token):  # NaN isn't, either
                    return _mismatch(f"{gaps[-1][1]}, tolerance {self.tolerance.token:g}")
                if token != golden:
                    break
            else:
                if sequence.diverged:
                    at = len(sequence.output_ids)
                    return _mismatch(f"{_where(i, prompt, at)}, got logits that are not finite")
            if sequence.finish_reason is not FinishReason.LENGTH and not sequence.diverged and failed is None:
                failed = AdapterUnavailable(
                    f"{GOLDEN_FILE} could not be replayed: {sequence.error or 'it was aborted'}"
                )
        mean = sum(gap for gap, _ in gaps) / max(1, len(gaps))
        if mean > self.tolerance.mean:
            return _mismatch(
                f"the logprobs of {len(gaps)} tokens are {mean:.3f} off on average, tolerance {self.tolerance.mean:g}, "
                f"most of all {max(gaps, key=lambda each: each[0])[1]}"
            )
        return failed


def _where(index: int, prompt: GoldenPrompt, at: int) -> str:
    text = prompt.prompt if len(prompt.prompt) <= 60 else f"{prompt.prompt[:60]}..."
    return f"prompt {index} {text!r}, token {at}: expected {prompt.token_ids[at]} (logprob {prompt.logprobs[at]:.3f})"


def _mismatch(what: str) -> AdapterRefused:
    return AdapterRefused(
        f"{GOLDEN_FILE}: {what}: the adapter was made on another base, or its files don't belong together: "
        f"retrain it here, or remove {GOLDEN_FILE} and load it anew"
    )
