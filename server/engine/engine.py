"""The engine: add requests, step, collect tokens. Synchronous and single-threaded; knows nothing of HTTP or text."""

import logging
import math
import time
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from pathlib import Path

import torch

from adapters.adapter import check_composition
from adapters.arena import Arena
from adapters.residency import Residency
from adapters.weights import load_adapter
from server.engine.config import EngineConfig
from server.engine.golden import GoldenReplay
from server.engine.kv_cache import KVCache
from server.engine.model_runner import ModelRunner, Runner
from server.engine.scheduler import Scheduler
from server.engine.types import (
    Batch,
    ErrorKind,
    FinishReason,
    Request,
    Sequence,
    SequenceOutput,
    StepOutput,
    StepStats,
)
from server.model.gpt2 import GPT2
from server.model.loader import load_model

logger = logging.getLogger(__name__)


class Engine:
    """Continuous batching over one model: requests join and leave between steps."""

    def __init__(
        self,
        config: EngineConfig,
        runner: Runner,
        residency: Residency,
        eos_token_id: int | None,
        vocab: Seq[bytes],
        weight_bytes: int = 0,
        backend: str = "",
        *,
        rounded_logits: bool = False,
    ) -> None:
        """`vocab` [V]: each token's bytes, for stop strings; `weight_bytes` and `backend` tell of the base.

        `rounded_logits`: they are computed in the model's type, not in fp32.
        """
        self.config, self.weight_bytes, self.backend = config, weight_bytes, backend
        self._runner, self._residency, self._vocab_size = runner, residency, len(vocab)
        self._scheduler = Scheduler(config, residency, eos_token_id, vocab)
        self._golden = GoldenReplay(
            self._scheduler, residency, config.max_model_len, len(vocab), residency.arena.memory.dtype,
            rounded_logits=rounded_logits,
        )  # fmt: skip

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._scheduler.running or self._scheduler.waiting)

    @property
    def loading(self) -> bool:
        """Whether adapters are being brought onto the device, or steps have yet to tell where some stand: they do so
        with or without work."""
        return self._residency.loading or self._residency.changed

    def add_request(self, request: Request) -> None:
        """Queue a request. Raises ValueError for a prompt that is empty or does not fit, a logit_bias that can't be
        added, and adapters that can't be composed (`check_composition`); the edge checks first."""
        length = len(request.prompt_token_ids)
        if length < 1 or length + request.sampling_params.max_tokens > self.config.max_model_len:
            raise ValueError(
                f"prompt of {length} tokens and max_tokens {request.sampling_params.max_tokens} "
                f"don't fit into 1..{self.config.max_model_len} positions"
            )
        self._check_logit_bias(request)
        check_composition(request.adapters)
        self._scheduler.add(Sequence(request))

    def abort(self, request_id: str) -> None:
        """End a request, freeing its row before the next step. Unknown ids have ended already."""
        self._scheduler.abort(request_id)

    def forget(self, digest: str) -> None:
        """Take an adapter off the device once nothing uses it, and out of host memory; asked for again, it is read and
        proved afresh. Sequences that run with it end with it."""
        self._residency.forget(digest)

    def step(self) -> StepOutput:
        """Schedule, run, take the result. With nothing but loads under way it returns at once, `batch_size` 0."""
        start = time.monotonic()
        self._residency.poll()
        self._golden.start()
        batch, failed = self._scheduler.schedule()
        if batch.items:
            self._run(batch, start)
        self._golden.settle()
        outputs = [_output(s) for s in [*failed, *batch.sequences] if _has_news(s)]
        stats = self._stats(batch, time.monotonic() - start)
        return StepOutput(tuple(o for o in outputs if o.token_ids or o.finish_reason), stats)

    def check_integrity(self) -> None:
        """Raises AssertionError when rows or pins are lost while nothing runs."""
        if not self.has_work:
            self._scheduler.check_integrity()
            self._residency.check_integrity()

    def close(self) -> None:
        """Stop the adapter loading threads."""
        self._residency.close()

    def _check_logit_bias(self, request: Request) -> None:
        for token, bias in request.sampling_params.logit_bias:
            if not 0 <= token < self._vocab_size:
                raise ValueError(f"logit_bias names token {token}, the base has 0..{self._vocab_size - 1}")
            if math.isnan(bias) or bias == math.inf:
                raise ValueError(f"logit_bias of token {token} is {bias}, expected a number or -inf, which bans it")

    def _run(self, batch: Batch, start: float) -> None:
        for sequence in batch.sequences:
            if sequence.start_time is None:
                sequence.start_time = start
        try:
            sampled = self._runner.run(batch)
        except torch.AcceleratorError:
            raise  # a broken device does not come back: the process has to end
        except Exception as error:
            logger.exception("step failed for %d sequences", len(batch.items))
            for sequence in batch.sequences:
                sequence.error = f"generation failed: {type(error).__name__}: {error}"
                sequence.error_kind = ErrorKind.GENERATION
                self._scheduler.finish(sequence, FinishReason.ERROR)
            return
        self._scheduler.update(batch, sampled, time.monotonic())

    def _stats(self, batch: Batch, seconds: float) -> StepStats:
        scheduler, loads = self._scheduler, self._residency.stats
        waiting = scheduler.waiting
        emitted = [s for s in batch.sampled if s.error is None and not s.proof]
        cache = self._residency.cache
        return StepStats(
            step_seconds=seconds,
            num_running=len(scheduler.running),
            num_waiting=len(waiting),
            batch_size=len(batch.items),
            num_prompt_tokens=sum(i.num_new_tokens for i in batch.items if i.prefill and not i.sequence.proof),
            num_generated_tokens=len(emitted),
            kv_cache_usage=1 - scheduler.rows.num_free / scheduler.rows.num_rows,
            running_adapters=_adapter_names(scheduler.running.values()),
            waiting_adapters=_adapter_names(waiting),
            resident_adapters=self._residency.resident,
            resident_adapter_bytes=self._residency.arena.used_bytes,
            adapter_loads=loads.loads,
            adapter_load_failures=loads.failures,
            adapter_evictions=loads.evictions,
            adapter_load_seconds=loads.load_seconds,
            adapter_cache_hits=cache.hits,
            adapter_cache_misses=cache.misses,
            host_cache_bytes=cache.used_bytes,
            residency=tuple((c.digest, c.status.value, c.reason) for c in self._residency.changes()),
            first_token_latencies=tuple(s.latency for s in emitted if len(s.output_ids) == 1),
            inter_token_latencies=tuple(s.latency for s in emitted if len(s.output_ids) > 1),
        )


def build_engine(
    folder: Path,
    config: EngineConfig,
    device: torch.device,
    dtype: torch.dtype,
    vocab: Seq[bytes],
    kernels: str = "auto",
) -> Engine:
    """An engine over the checkpoint in `folder`; kernels "off" computes with torch alone.

    Raises ModelError, or ValueError for limits the model can't hold.
    """
    model = load_model(folder, device, dtype, kernels)
    if config.max_model_len > model.config.n_positions:
        raise ValueError(
            f"max_model_len {config.max_model_len} exceeds the model's {model.config.n_positions} positions"
        )
    shape = model.config.adapter_shape
    arena = Arena(config.adapter_memory, device, dtype)
    torch.get_num_threads()  # settled for this thread, before the loading ones take a single one each
    residency = Residency(lambda ref: load_adapter(ref, shape, dtype), arena, host_cache=config.host_cache)
    runner = make_runner(model, config, residency)
    return Engine(
        config, runner, residency, model.config.eos_token_id, vocab, model.nbytes, model.backend.name,
        rounded_logits=model.backend.native is None,
    )  # fmt: skip


def make_runner(model: GPT2, config: EngineConfig, residency: Residency) -> Runner:
    """The runner for the model's device: on a GPU with our kernels one that captures its decoding steps."""
    rows, device, dtype = config.max_batch_size, model.device, model.dtype
    if not model.backend.graphs:
        return ModelRunner(model, KVCache(model.config, rows, config.max_model_len, device, dtype), residency)
    from server.engine.cuda_graph import CudaCapture  # what follows needs triton
    from server.engine.device_runner import DeviceRunner

    kv_cache = KVCache(model.config, rows + 1, config.max_model_len, device, dtype)  # one for padding
    runner = DeviceRunner(model, kv_cache, residency, config.max_batch_tokens, CudaCapture(device))
    runner.warm_up()
    return runner


def _output(sequence: Sequence) -> SequenceOutput:
    """What is new of a sequence since it was last asked."""
    sent, sequence.num_sent = sequence.num_sent, len(sequence.output_ids)
    arrival = sequence.request.arrival_time
    first = sent == 0 and bool(sequence.output_ids)
    return SequenceOutput(
        sequence.request_id,
        tuple(sequence.output_ids[sent:]),
        tuple(sequence.logprobs[sent:]),
        sequence.finish_reason,
        sequence.stop_offset,
        sequence.error,
        sequence.error_kind,
        queue_time=0.0 if sequence.start_time is None else sequence.start_time - arrival,
        time_to_first_token=sequence.time_to_first_token,
        top_logprobs=tuple(sequence.top_logprobs[sent:]),
        prompt_logprobs=tuple(sequence.prompt_logprobs) if first else (),
        prompt_top_logprobs=tuple(sequence.prompt_top_logprobs) if first else (),
    )


def _has_news(sequence: Sequence) -> bool:
    """Whether the edge is to be told of it after a step."""
    return not sequence.proof and (sequence.finish_reason is not None or sequence.request.stream)


def _adapter_names(sequences: Iterable[Sequence]) -> tuple[str, ...]:
    """The distinct adapter names of some sequences, sorted."""
    return tuple(sorted({each.ref.name for s in sequences for each in s.request.adapters}))
