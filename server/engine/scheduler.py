"""Decides which sequences run in a step and when they end. Touches no tensor.

Waiting sequences are served round-robin between adapters (the base counts as one), first come first served within
each, so that a flood for one adapter can't starve another. Rows are whole, so what has begun always finishes.
"""

from collections import OrderedDict, deque
from collections.abc import Iterator
from collections.abc import Sequence as Seq

from adapters.residency import AdapterStatus, Residency
from server.engine.config import EngineConfig
from server.engine.kv_cache import RowAllocator
from server.engine.types import DIVERGED, Batch, ErrorKind, FinishReason, ScheduledSequence, Sequence


class Scheduler:
    """The waiting and running sequences, and who gets a row."""

    def __init__(self, config: EngineConfig, residency: Residency, eos_token_id: int | None, vocab: Seq[bytes]) -> None:
        """`vocab` [V]: each token's bytes, for stop strings."""
        self._config, self._residency = config, residency
        self._eos, self._vocab = eos_token_id, vocab
        self.rows = RowAllocator(config.max_batch_size)
        self.running: dict[str, Sequence] = {}  # by request id, in order of admission
        self._waiting: OrderedDict[str | None, deque[Sequence]] = OrderedDict()  # by digest; the next in turn first

    @property
    def waiting(self) -> list[Sequence]:
        """Every sequence that has no row yet."""
        return [sequence for queue in self._waiting.values() for sequence in queue]

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence behind the others of its adapter."""
        self._waiting.setdefault(_digest(sequence), deque()).append(sequence)

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
        budget -= len(items)
        for sequence in self.running.values():
            if sequence.prefilling and budget > 0:
                left = len(sequence.request.prompt_token_ids) - sequence.num_computed
                chunk = min(left, budget)
                items.append(ScheduledSequence(sequence, chunk, prefill=True, samples=chunk == left))
                budget -= chunk
        return Batch(tuple(items)), failed

    def update(self, batch: Batch, token_ids: Seq[int], logprobs: Seq[float], now: float) -> None:
        """Take a step's result: token_ids and logprobs of `batch.sampled`, in order. Ends what is complete."""
        for item in batch.items:
            item.sequence.num_computed += item.num_new_tokens
        for sequence, token, logprob in zip(batch.sampled, token_ids, logprobs, strict=True):
            if token == DIVERGED:
                adapter = sequence.request.adapter
                who = "the base" if adapter is None else f"adapter {adapter.name!r}"
                sequence.error = f"{who} gave logits that are not finite: its weights may be too large"
                sequence.error_kind = ErrorKind.GENERATION
                self.finish(sequence, FinishReason.ERROR)
                continue
            sequence.output_ids.append(token)
            if sequence.request.sampling_params.logprobs:
                sequence.logprobs.append(logprob)
            if sequence.last_token_time is None:
                sequence.time_to_first_token = sequence.latency = now - sequence.request.arrival_time
            else:
                sequence.latency = now - sequence.last_token_time
            sequence.last_token_time = now
            self._end_if_complete(sequence, token)

    def finish(self, sequence: Sequence, reason: FinishReason) -> None:
        """End a sequence, wherever it stands; gives back its row and its adapter's pin."""
        sequence.finish_reason = reason
        if sequence.row is not None:
            del self.running[sequence.request_id]
            self.rows.free(sequence.row)
            sequence.row = None
            if sequence.request.adapter is not None:
                self._residency.unpin(sequence.request.adapter.digest)
        else:
            queue = self._waiting[_digest(sequence)]
            queue.remove(sequence)
            if not queue:
                del self._waiting[_digest(sequence)]

    def _admit(self) -> list[Sequence]:
        """Give free rows to waiting sequences whose adapter is ready; start loading the adapters of the next ones.

        Only the next `max_batch_size` in turn start loads; while rows are free, all others may run if they are ready.
        """
        failed: list[Sequence] = []
        ahead = self._config.max_batch_size
        everyone = sum(map(len, self._waiting.values()))
        for turn, sequence in enumerate(list(self._turns(everyone if self.rows.num_free else ahead))):
            adapter = sequence.request.adapter
            if turn >= ahead and not self.rows.num_free:
                break
            if adapter is None:
                status = AdapterStatus.READY
            elif turn < ahead or self._residency.status(adapter.digest) is AdapterStatus.READY:
                status = self._residency.prefetch(adapter)
            else:
                continue
            if adapter is not None and status in (AdapterStatus.REFUSED, AdapterStatus.FAILED):
                error = self._residency.error(adapter.digest)
                refused = status is AdapterStatus.REFUSED
                sequence.error = str(error)
                sequence.error_kind = ErrorKind.ADAPTER_REFUSED if refused else ErrorKind.ADAPTER_UNAVAILABLE
                self.finish(sequence, FinishReason.ERROR)
                failed.append(sequence)
            elif status is AdapterStatus.READY and self.rows.num_free:
                self._start(sequence)
        return failed

    def _turns(self, limit: int) -> Iterator[Sequence]:
        """Waiting sequences in the order they should be admitted, at most `limit`: one of each adapter in turn."""
        queues = [iter(queue) for queue in self._waiting.values()]
        while queues and limit > 0:
            remaining: list[Iterator[Sequence]] = []
            for queue in queues:
                sequence = next(queue, None)
                if sequence is not None and limit > 0:
                    limit -= 1
                    remaining.append(queue)
                    yield sequence
            queues = remaining

    def _start(self, sequence: Sequence) -> None:
        digest = _digest(sequence)
        queue = self._waiting[digest]
        queue.remove(sequence)
        if queue:
            self._waiting.move_to_end(digest)
        else:
            del self._waiting[digest]
        if sequence.request.adapter is not None:
            self._residency.pin(sequence.request.adapter.digest)
        sequence.row = self.rows.allocate()
        self.running[sequence.request_id] = sequence

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
        """The offset of the first stop string in the output's bytes, this token included."""
        stops, output = sequence.request.sampling_params.stop, sequence.output_bytes
        start = max(0, len(output) - max(map(len, stops)) + 1)
        output += self._vocab[token]
        return min((i for i in (output.find(stop, start) for stop in stops) if i >= 0), default=None)


def _digest(sequence: Sequence) -> str | None:
    return sequence.request.adapter.digest if sequence.request.adapter is not None else None


def _row(sequence: Sequence) -> int:
    return -1 if sequence.row is None else sequence.row
