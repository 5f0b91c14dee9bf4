"""What the TGI dialect makes of a sequence's outputs, and of its own parameters."""

import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Any

from server.api.errors import ApiError
from server.api.schemas import GenerateParameters
from server.api.text import TextAssembler, TokenPiece, token_text
from server.engine.types import FinishReason, Request, SamplingParams, SequenceOutput, TopTokens

DEFAULT_MAX_NEW_TOKENS = 20
_REASONS = {FinishReason.EOS: "eos_token", FinishReason.STOP: "stop_sequence", FinishReason.LENGTH: "length"}


class SequenceText:
    """One sequence's text and tokens, as they come."""

    def __init__(self, request: Request, vocabulary: Sequence[bytes], special: Mapping[int, str]) -> None:
        self.request = request
        self._vocabulary, self._special = vocabulary, special
        self._text = TextAssembler(vocabulary, special, request.sampling_params.stop)
        self._pieces: list[TokenPiece] = []
        self._prompt_logprobs: tuple[float, ...] = ()
        self._last: SequenceOutput | None = None

    @property
    def text(self) -> str:
        """So far."""
        return self._text.text

    @property
    def count(self) -> int:
        """Tokens so far, EOS included."""
        return self._text.count

    @property
    def last(self) -> SequenceOutput:
        """The last output. Raises ApiError if there was none."""
        if self._last is None:
            raise ApiError(424, "generation", "the engine ended the request without a word")
        return self._last

    @property
    def mean_logprob(self) -> float:
        """Of its tokens."""
        return sum(piece.logprob or 0.0 for piece in self._pieces) / max(1, len(self._pieces))

    def push(self, output: SequenceOutput) -> list[TokenPiece]:
        """The pieces that `output` makes certain."""
        pieces = self._text.push(output)
        self._pieces += pieces
        self._prompt_logprobs = output.prompt_logprobs or self._prompt_logprobs
        self._last = output
        return pieces

    def counts(self) -> dict[str, Any]:
        """How it ended, in the fields that a stream's details have too."""
        params, prompt = self.request.sampling_params, len(self.request.prompt_token_ids)
        return {
            "finish_reason": _REASONS.get(self.last.finish_reason or FinishReason.ERROR, "error"),
            "generated_tokens": self.count,
            "prompt_tokens": prompt,
            "input_length": prompt,
            "skipped_tokens": 0,
            "seed": params.seed if params.temperature > 0 else None,
        }

    def details(self) -> dict[str, Any]:
        """`counts` and every token."""
        return self.counts() | {
            "prefill": self._prefill(),
            "tokens": [token(piece) for piece in self._pieces],
            "top_tokens": [self.top_tokens(piece.top) for piece in self._pieces if piece.top],
        }

    def top_tokens(self, top: TopTokens) -> list[dict[str, Any]]:
        """The likeliest tokens in one place, best first."""
        special = self._special
        return [_token(id_, token_text(id_, self._vocabulary, special), at, id_ in special) for id_, at in top]

    def _prefill(self) -> list[dict[str, Any]]:
        if not self.request.sampling_params.prompt_logprobs:
            return []
        ids = self.request.prompt_token_ids
        return [
            {"id": id_, "text": token_text(id_, self._vocabulary, self._special), "logprob": logprob}
            for id_, logprob in zip(ids, (None, *self._prompt_logprobs), strict=True)
        ]


def sampling_params(parameters: GenerateParameters, room: int, max_model_len: int, *, stream: bool) -> SamplingParams:
    """The engine's parameters; `room` is how many positions the prompt leaves. Raises ApiError."""
    wanted = parameters.max_new_tokens
    if wanted is not None and wanted > room:
        raise ApiError.invalid(
            "max_new_tokens",
            f"{wanted} does not fit: the prompt has {max_model_len - room} tokens and the model {max_model_len} "
            f"positions for prompt and output, so at most {room}",
        )
    sampled = bool(parameters.do_sample)
    seed = parameters.seed if parameters.seed is not None else secrets.randbits(32)
    return SamplingParams(
        max_tokens=wanted or min(DEFAULT_MAX_NEW_TOKENS, room),
        temperature=(parameters.temperature or 1.0) if sampled else 0.0,
        top_k=parameters.top_k or 0,
        top_p=parameters.top_p or 1.0,
        typical_p=parameters.typical_p or 1.0,
        repetition_penalty=parameters.repetition_penalty or 1.0,
        frequency_penalty=parameters.frequency_penalty or 0.0,
        presence_penalty=parameters.presence_penalty or 0.0,
        seed=seed if sampled else 0,
        stop=tuple(stop.encode() for stop in parameters.stop or ()),
        ignore_eos=bool(parameters.ignore_eos_token),
        logprobs=stream or parameters.wants_details or (parameters.best_of or 1) > 1,
        top_logprobs=parameters.top_n_tokens or 0,
        prompt_logprobs=bool(parameters.decoder_input_details),
    )


def best_first(sequences: Sequence[SequenceText]) -> list[SequenceText]:
    """Those of `best_of`, by their tokens' mean logprob; equals in the order of their seeds."""
    return sorted(sequences, key=lambda each: -each.mean_logprob)


def answer(parameters: GenerateParameters, prompt: str, sequences: Sequence[SequenceText]) -> dict[str, Any]:
    """The body for `sequences`, the best one first; `prompt` goes before every text."""
    best, *others = sequences
    body: dict[str, Any] = {"generated_text": prompt + best.text}
    if parameters.wants_details:
        more = [{"generated_text": prompt + other.text} | other.details() for other in others]
        body["details"] = best.details() | {"best_of_sequences": more}
    return body


def token(piece: TokenPiece) -> dict[str, Any]:
    """A token as clients get it."""
    return _token(piece.id, piece.text, piece.logprob, piece.special)


def timings(sequence: SequenceText) -> dict[str, str]:
    """Response headers in milliseconds, as TGI counts them."""
    total, last = time.monotonic() - sequence.request.arrival_time, sequence.last
    seconds = {
        "x-total-time": total,
        "x-queue-time": last.queue_time,
        "x-time-to-first-token": last.time_to_first_token,
        "x-time-per-token": (total - last.queue_time) / max(1, sequence.count),
    }
    return {"x-generated-tokens": str(sequence.count)} | {k: f"{1000 * value:.1f}" for k, value in seconds.items()}


def _token(id_: int, text: str, logprob: float | None, special: bool) -> dict[str, Any]:
    return {"id": id_, "text": text, "logprob": logprob, "special": special, "skipped": False}
