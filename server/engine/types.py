"""What crosses the engine's boundary, and a running sequence's state. Without torch: the API process uses it too."""

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property

from adapters.adapter import WeightedAdapter

DIVERGED = -1
"""Stands for a token where the logits were not finite."""
BANNED = -2
"""Stands for a token where logit_bias, penalties and min_tokens left none."""


class FinishReason(Enum):
    """Why a sequence ended."""

    EOS = "eos"
    STOP = "stop"  # a stop string
    LENGTH = "length"
    ABORT = "abort"  # the client left
    ERROR = "error"


class ErrorKind(Enum):
    """What kind of failure ended a sequence; the edge turns it into a status."""

    ADAPTER_REFUSED = "adapter_refused"
    ADAPTER_UNAVAILABLE = "adapter_unavailable"
    GENERATION = "generation"
    WORKER_LOST = "worker_lost"  # said by the edge, for requests that were in flight


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens. Defaults are greedy and neutral."""

    max_tokens: int = 16
    temperature: float = 0.0  # 0 is greedy
    top_k: int = 0  # 0 is off
    top_p: float = 1.0  # 1 is off
    typical_p: float = 1.0  # 1 is off; after top_k and top_p, as in transformers
    repetition_penalty: float = 1.0  # over prompt and output, as in transformers
    frequency_penalty: float = 0.0  # off a token's score for every time that the output has it
    presence_penalty: float = 0.0  # off a token's score if the output has it
    logit_bias: tuple[tuple[int, float], ...] = ()  # token id, what is added to its score
    min_tokens: int = 0  # before so many neither EOS nor a stop string ends the output
    seed: int = 0  # of this request's own random stream
    stop: tuple[bytes, ...] = ()  # UTF-8
    ignore_eos: bool = False
    logprobs: bool = False  # log-softmax of the raw logits, per token
    top_logprobs: int = 0  # of so many best tokens too, at every position that `logprobs` or `prompt_logprobs` tell of
    prompt_logprobs: bool = False  # of the prompt's tokens from the second on


@dataclass(frozen=True)
class Request:
    """One generation; crosses the process boundary as it is."""

    request_id: str
    prompt_token_ids: tuple[int, ...]  # not empty
    sampling_params: SamplingParams
    adapters: tuple[WeightedAdapter, ...] = ()  # in any order, each digest once; none is the base
    arrival_time: float = 0.0  # time.monotonic() at the edge
    stream: bool = False  # an output per token, or one at the end


TopTokens = tuple[tuple[int, float], ...]
"""The best tokens at one position and their logprobs, best first, equals by id."""


@dataclass(frozen=True)
class SequenceOutput:
    """What one step produced for one request."""

    request_id: str
    token_ids: tuple[int, ...]  # new since the last output
    logprobs: tuple[float, ...]  # of the same tokens; empty when not asked for
    finish_reason: FinishReason | None = None
    stop_offset: int | None = None  # STOP: bytes of the output before the stop string
    error: str | None = None
    error_kind: ErrorKind | None = None
    queue_time: float = 0.0  # seconds from arrival to the first step; set on the last output
    time_to_first_token: float = 0.0  # seconds from arrival; set on the last output
    top_logprobs: tuple[TopTokens, ...] = ()  # beside `logprobs`
    prompt_logprobs: tuple[float, ...] = ()  # of the prompt's tokens from the second on; on the first output
    prompt_top_logprobs: tuple[TopTokens, ...] = ()  # beside `prompt_logprobs`


AdapterChange = tuple[str, str, str | None]
"""Digest; AdapterStatus as text; why, if it is "refused" or "failed"."""


@dataclass(frozen=True)
class StepStats:
    """One step's figures, exported at the edge."""

    step_seconds: float = 0.0
    num_running: int = 0
    num_waiting: int = 0
    batch_size: int = 0  # sequences of this step
    num_prompt_tokens: int = 0
    num_generated_tokens: int = 0
    kv_cache_usage: float = 0.0  # share of rows taken, 0..1
    running_adapters: tuple[str, ...] = ()
    waiting_adapters: tuple[str, ...] = ()
    resident_adapters: int = 0
    resident_adapter_bytes: int = 0  # of the arena, adapters being copied included
    adapter_loads: int = 0  # totals since the engine started
    adapter_load_failures: int = 0
    adapter_evictions: int = 0
    adapter_load_seconds: float = 0.0
    adapter_cache_hits: int = 0
    adapter_cache_misses: int = 0
    host_cache_bytes: int = 0  # of adapters in host memory
    residency: tuple[AdapterChange, ...] = ()  # of the status of adapters, since the last step's
    first_token_latencies: tuple[float, ...] = ()  # seconds from arrival, of sequences that began in this step
    inter_token_latencies: tuple[float, ...] = ()  # seconds since the same sequence's last token


@dataclass(frozen=True)
class StepOutput:
    """Everything one step has to say."""

    outputs: tuple[SequenceOutput, ...]
    stats: StepStats


@dataclass
class Sequence:
    """One request inside the engine."""

    request: Request
    output_ids: list[int] = field(default_factory=lambda: list[int]())
    logprobs: list[float] = field(default_factory=lambda: list[float]())  # of output_ids, where asked for
    top_logprobs: list[TopTokens] = field(default_factory=lambda: list[TopTokens]())  # beside `logprobs`
    prompt_logprobs: list[float] = field(default_factory=lambda: list[float]())  # of the prompt's from the second on
    prompt_top_logprobs: list[TopTokens] = field(default_factory=lambda: list[TopTokens]())  # beside `prompt_logprobs`
    output_bytes: bytearray = field(default_factory=bytearray)  # kept only where stop strings need it
    num_computed: int = 0  # tokens whose keys and values are in the row
    num_sent: int = 0  # output tokens already handed out
    row: int | None = None  # KV row while running
    turn: float = 0.0  # what its adapter had had when it got its row; set by the scheduler
    start_time: float | None = None  # of its first step, time.monotonic()
    last_token_time: float | None = None
    latency: float = 0.0  # seconds from the token before to the last one; from arrival for the first
    time_to_first_token: float = 0.0  # seconds from arrival
    finish_reason: FinishReason | None = None
    stop_offset: int | None = None
    error: str | None = None
    error_kind: ErrorKind | None = None
    proof: bool = False  # the engine's own: a golden prompt, of an adapter that isn't READY; nobody is told of it
    diverged: bool = False  # its logits were not finite

    @property
    def request_id(self) -> str:
        """The request's id."""
        return self.request.request_id

    @cached_property
    def adapters(self) -> tuple[WeightedAdapter, ...]:
        """Its adapters by ascending digest, the order in which they are applied."""
        return tuple(sorted(self.request.adapters, key=lambda each: each.ref.digest))

    @cached_property
    def digests(self) -> tuple[str, ...]:
        """Of its adapters, ascending; none is the base."""
        return tuple(each.ref.digest for each in self.adapters)

    @cached_property
    def group(self) -> str | None:
        """Whose turn it waits for: its digests, joined, whatever the weights; None is the base.

        A proof doesn't stand behind those that wait for it.
        """
        return "proof:" * self.proof + "+".join(self.digests) or None

    @property
    def num_tokens(self) -> int:
        """Prompt and output tokens so far."""
        return len(self.request.prompt_token_ids) + len(self.output_ids)

    @property
    def num_prompt_left(self) -> int:
        """Prompt tokens that are still to be computed."""
        return max(0, len(self.request.prompt_token_ids) - self.num_computed)

    @property
    def prefilling(self) -> bool:
        """Whether prompt tokens are still to be computed."""
        return self.num_prompt_left > 0

    def token_at(self, position: int) -> int:
        """The token at a position of prompt and output together."""
        prompt = self.request.prompt_token_ids
        return prompt[position] if position < len(prompt) else self.output_ids[position - len(prompt)]


@dataclass(frozen=True)
class ScheduledSequence:
    """A sequence's part in one step."""

    sequence: Sequence
    num_new_tokens: int  # computed in this step: 1 when decoding, a chunk when prefilling
    prefill: bool
    samples: bool  # whether all its tokens are computed after this step, so that a next one is chosen

    @property
    def num_told(self) -> int:
        """Tokens of this step, its first ones, whose logits tell of the prompt's next token; 0 where nobody asked."""
        if not (self.prefill and self.sequence.request.sampling_params.prompt_logprobs):
            return 0
        return self.num_new_tokens - self.samples


@dataclass(frozen=True)
class Batch:
    """One step's work, set by the scheduler: decoding sequences, by ascending row; then prompt chunks, by turn."""

    items: tuple[ScheduledSequence, ...]
    prompt_block: int = 32  # chunks begin at multiples of it, and attention is computed block by block

    @property
    def sequences(self) -> list[Sequence]:
        """The sequences of this step, in order."""
        return [item.sequence for item in self.items]

    @property
    def sampled(self) -> list[Sequence]:
        """The sequences that get a token, in order."""
        return [item.sequence for item in self.items if item.samples]

    @property
    def told(self) -> list[ScheduledSequence]:
        """The prompt chunks whose logprobs are asked for, in order."""
        return [item for item in self.items if item.num_told]


@dataclass(frozen=True)
class TokenLogprobs:
    """What is told of the tokens at some positions: NaN where the logits were not finite."""

    logprobs: Seq[float]
    top_logprobs: Seq[TopTokens]  # of no tokens where none are asked for


@dataclass(frozen=True)
class Sampled:
    """One step's result: a token for each of `batch.sampled`, or DIVERGED or BANNED."""

    token_ids: Seq[int]
    logprobs: Seq[float]  # log-softmax of the raw logits for those that asked, else 0
    top_logprobs: Seq[TopTokens] = ()  # of each too; empty where nobody asked
    prompts: Seq[TokenLogprobs] = ()  # for each of `batch.told`
