"""Decides which sequences run in a step and when they end. Touches no tensor.

Rows and the prompts' share of a step go to the adapter that has had the fewest tokens (`fairness.py`), first come first
served within each, so that a flood for one adapter can't starve another. Rows are whole: what has begun finishes.
"""

import math
from collections.abc import Sequence as Seq

from adapters.errors import AdapterRefused
from adapters.residency import Residency
from adapters.status import AdapterStatus
from server.engine.config import EngineConfig
from server.engine.fairness import FairQueue
from server.engine.kv_cache import RowAllocator
from server.engine.types import (
    DIVERGED,
    Batch,
    ErrorKind,
    FinishReason,
    Sampled,
    ScheduledSequence,
    Sequence,
    TopTokens,
)


class Scheduler:
    """The waiting and running sequences, and who gets a row."""

    def __init__(self, config: EngineConfig, residency: Residency, eos_token_id: int | None, vocab: Seq[bytes]) -> None:
        """`vocab` [V]: each token's bytes, for stop strings."""
        self._config, self._residency = config, residency
        self._eos, self._vocab = eos_token_id, vocab
        self.rows = RowAllocator(config.max_batch_size)
        self.running: dict[str, Sequence] = {}  # by request id, in order of admission
        self._queue = FairQueue()

    @property
    def waiting(self) -> list[Sequence]:
        """Every sequence that has no row yet."""
        return self._queue.sequences

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence behind the others of its adapter."""
        self._queue.add(sequence)

    def abort(self, request_id: str) -> Sequence | None:
        """End a sequence at once, freeing its row; None when it is not here (any more)."""
        sequence = self.running.get(request_id)
        if sequence is None:
            sequence = next((s for s in self.waiting if s.request_id == request_id), None)
        if sequence is not None:
            self.finish(sequence, FinishReason.ABORT)
        return sequence

    def schedule(self) -> tuple[Batch, list[Sequence]]:
        """This step's work, and the waiting sequences whose adapter could not be loaded (finished as errors)."""
        failed = self._admit()
        budget = self._config.max_batch_tokens
        decoding = [s for s in self.running.values() if not s.prefilling]
        items = [ScheduledSequence(s, 1, prefill=False, samples=True) for s in sorted(decoding, key=_row)]
        budget, block = budget - len(items), self._config.prompt_block
        prefilling = [s for s in self.running.values() if s.prefilling]
        for sequence in sorted(prefilling, key=lambda s: s.turn):  # equals in order of admission
            chunk = min(sequence.num_prompt_left, budget)
            if chunk < sequence.num_prompt_left:
                chunk -= chunk % block  # where it is cut must not depend on who else runs
            if chunk:
                samples = chunk == sequence.num_prompt_left
                items.append(ScheduledSequence(sequence, chunk, prefill=True, samples=samples))
                budget -= chunk
        return Batch(tuple(items), block), failed

    def update(self, batch: Batch, result: Sampled, now: float) -> None:
        """Take a step's result. Ends what is complete."""
        self._queue.charge(batch)
        for item in batch.items:
            item.sequence.num_computed += item.num_new_tokens
        for item, told in zip(batch.told, result.prompts, strict=True):
            item.sequence.prompt_logprobs += told.logprobs
            if item.sequence.request.sampling_params.top_logprobs:
                item.sequence.prompt_top_logprobs += told.top_logprobs
            if any(map(math.isnan, told.logprobs)):
                self._end_without_token(item.sequence, DIVERGED)
        tops = result.top_logprobs or [TopTokens()] * len(result.token_ids)
        for sequence, token, logprob, top in zip(batch.sampled, result.token_ids, result.logprobs, tops, strict=True):
            if sequence.finish_reason is not None:
                continue  # its prompt's logits were not finite
            if token < 0:
                self._end_without_token(sequence, token)
                continue
            sequence.output_ids.append(token)
            params = sequence.request.sampling_params
            if params.logprobs:
                sequence.logprobs.append(logprob)
                if params.top_logprobs:
                    sequence.top_logprobs.append(top)
            if sequence.last_token_time is None:
                sequence.time_to_first_token = sequence.latency = now - sequence.request.arrival_time
            else:
                sequence.latency = now - sequence.last_token_time
            sequence.last_token_time = now
            self._end_if_complete(sequence, token)

    def finish(self, sequence: Sequence, reason: FinishReason) -> None:
        """End a sequence, wherever it stands; gives back its row and its adapter's pin."""
        sequence.finish_reason = reason
        if sequence.row is None:
            self._queue.remove(sequence)
            return
        del self.running[sequence.request_id]
        self.rows.free(sequence.row)
        sequence.row = None
        self._queue.end(sequence)
        if not sequence.proof:
            self._residency.unpin(*sequence.digests)

    def check_integrity(self) -> None:
        """Raises AssertionError when a row is lost or an adapter still counted; called when nothing waits or runs."""
        self.rows.check_integrity()
        self._queue.check_integrity()

    def _admit(self) -> list[Sequence]:
        """Give free rows to waiting sequences whose adapters are ready; start loading the adapters of the next ones.

        Only the next `max_batch_size` adapters in turn start loads; while rows are free, all others may run if they
        are ready, but while an adapter starves for room nobody behind it takes a turn on another one, or those that
        are in would keep it out for ever. Returns the sequences whose adapter failed, finished.
        """
        failed: list[Sequence] = []
        next_ones: set[str | None] = set()
        held = False
        for sequence in self._queue.turns():
            if len(next_ones) < self._config.max_batch_size:
                next_ones.add(sequence.group)
            elif not self.rows.num_free:
                break
            status = self._adapter_status(sequence, may_load=sequence.group in next_ones)
            if status in (AdapterStatus.REFUSED, AdapterStatus.FAILED):
                self._fail(sequence)
                failed.append(sequence)
            elif status is AdapterStatus.READY:
                if self.rows.num_free and (sequence.proof or not (held and sequence.digests)):
                    self._start(sequence)
            elif self._residency.starving(*sequence.digests):
                held = True
        return failed

    def _adapter_status(self, sequence: Sequence, may_load: bool) -> AdapterStatus:
        """Where a sequence's adapters stand, having asked for them; ABSENT where one is not ready and may not load."""
        if not sequence.adapters or sequence.proof:
            return AdapterStatus.READY
        ready = all(self._residency.status(digest) is AdapterStatus.READY for digest in sequence.digests)
        if may_load or ready:
            return self._residency.prefetch(*(each.ref for each in sequence.adapters))
        return AdapterStatus.ABSENT

    def _fail(self, sequence: Sequence) -> None:
        error = self._residency.error(*sequence.digests)
        refused = isinstance(error, AdapterRefused)
        sequence.error = str(error)
        sequence.error_kind = ErrorKind.ADAPTER_REFUSED if refused else ErrorKind.ADAPTER_UNAVAILABLE
        self.finish(sequence, FinishReason.ERROR)

    def _start(self, sequence: Sequence) -> None:
        self._queue.start(sequence)
        if not sequence.proof:  # pinned until all of its prompts have ended
            self._residency.pin(*sequence.digests)
        sequence.row = self.rows.allocate()
        self.running[sequence.request_id] = sequence

    def _end_without_token(self, sequence: Sequence, why: int) -> None:
        if why == DIVERGED:
            sequence.error = f"{_who(sequence)} gave logits that are not finite: its weights may be too large"
            sequence.diverged = True
        else:
            sequence.error = (
                f"no token can be chosen after {len(sequence.output_ids)}: logit_bias, the penalties and min_tokens "
                "ban every one, or are too large"
            )
        sequence.error_kind = ErrorKind.GENERATION
        self.finish(sequence, FinishReason.ERROR)

    def _end_if_complete(self, sequence: Sequence, token: int) -> None:
        params = sequence.request.sampling_params
        if token == self._eos and not params.ignore_eos:
            self.finish(sequence, FinishReason.EOS)
            return
        if params.stop:
            offset = self._find_stop(sequence, token)
            if offset is not None:
                sequence.stop_offset = offset
                self.finish(sequence, FinishReason.STOP)
                return
        full = sequence.num_tokens >= self._config.max_model_len
        if len(sequence.output_ids) >= params.max_tokens or full:
            self.finish(sequence, FinishReason.LENGTH)

    def _find_stop(self, sequence: Sequence, token: int) -> int | None:
        """Where in the output's bytes the first stop string begins that this token ends; `min_tokens` end none."""
        params, output = sequence.request.sampling_params, sequence.output_bytes
        before = len(output)
        output += self._vocab[token]
        if len(sequence.output_ids) <= params.min_tokens:
            return None
        found = (output.find(stop, max(0, before - len(stop) + 1)) for stop in params.stop)
        return min((i for i in found if i >= 0), default=None)


def _who(sequence: Sequence) -> str:
    names = " + ".join(repr(each.ref.name) for each in sequence.adapters)
    return f"adapter {names}" if names else "the base"


def _row(sequence: Sequence) -> int:
    return -1 if sequence.row is None else sequence.row
