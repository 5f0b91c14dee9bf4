"""Every Prometheus metric. Names follow vLLM where it has one. `python -m server.metrics` prints docs/metrics.md."""

import time
from collections.abc import Iterable, Sequence
from typing import TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics import MetricWrapperBase

from adapters.adapter import AdapterRef
from server.engine.types import SequenceOutput, StepStats

M = TypeVar("M", bound=MetricWrapperBase)

MAX_ADAPTER_LABELS = 100
OTHER = "other"
ADAPTER_INFO = "chorus_adapter_info"
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)


class Metrics:
    """One API process's metrics, in a registry of their own; `metric_totals.py` adds up several."""

    def __init__(self, model_name: str, max_lora: int) -> None:
        """`max_lora`: adapters that may be on the device at once."""
        self.registry = CollectorRegistry()
        self._model, self._max_lora = model_name, max_lora
        self.answered: dict[str, tuple[str, float]] = {}  # adapters with labels of their own: digest, when
        self._totals: dict[str, float] = {}
        self._all: list[MetricWrapperBase] = []
        self._lora_adapters: tuple[tuple[str, ...], tuple[str, ...]] | None = None  # running and waiting: labels now

        self.running = self._gauge("vllm:num_requests_running", "Requests that are decoding.")
        self.waiting = self._gauge("vllm:num_requests_waiting", "Requests that wait for a place in the batch.")
        self.kv_usage = self._gauge("vllm:kv_cache_usage_perc", "Share of the KV rows in use, 0 to 1.")
        self.lora_info = self._gauge(
            "vllm:lora_requests_info",
            "Adapters that run and wait, as comma-separated names; the value is the time it was last true.",
            ("max_lora", "running_lora_adapters", "waiting_lora_adapters"),
        )
        self._lora_now = self.lora_info  # the series of those labels
        self.prompt_tokens = self._counter("vllm:prompt_tokens", "Prompt tokens computed.")
        self.generation_tokens = self._counter("vllm:generation_tokens", "Tokens generated.")
        self.success = self._counter(
            "vllm:request_success", "Requests that ended well, by reason: stop or length.", ("finished_reason",)
        )
        self.ttft = self._histogram("vllm:time_to_first_token_seconds", "From arrival to the first token.", _SECONDS)
        self.itl = self._histogram("vllm:inter_token_latency_seconds", "Between a request's tokens.", _SECONDS)
        self.e2e = self._histogram("vllm:e2e_request_latency_seconds", "From arrival to the last token.", _SECONDS)
        self.queue_time = self._histogram(
            "vllm:request_queue_time_seconds", "From arrival to the first step.", _SECONDS
        )
        self.request_prompt = self._histogram("vllm:request_prompt_tokens", "Prompt tokens of a request.", _TOKENS)
        self.request_generated = self._histogram("vllm:request_generation_tokens", "Tokens a request got.", _TOKENS)
        self.iteration = self._histogram("vllm:iteration_tokens", "Tokens computed in a step.", _TOKENS, total=True)
        self.step_seconds = self._histogram("chorus_step_seconds", "Time of an engine step.", _SECONDS)
        self.batch_size = self._histogram("chorus_step_batch_size", "Requests in a step.", _TOKENS)
        self.finished = self._counter(
            "chorus_requests_finished",
            "Requests that ended, by reason: eos, stop, length, abort or error.",
            ("finish_reason",),
        )
        self.rejected = self._counter(
            "chorus_requests_rejected", "Requests answered without generating, by error type.", ("error_type",)
        )
        by_adapter = (
            f"the first {MAX_ADAPTER_LABELS} that an API process had an answer of by name, the rest as `{OTHER}`; "
            "base is `base`"
        )
        self.adapter_requests = self._counter(
            "chorus_adapter_requests", f"Requests that ended, by adapter: {by_adapter}.", ("adapter",)
        )
        self.adapter_tokens = self._counter(
            "chorus_adapter_generation_tokens", f"Tokens generated, by adapter: {by_adapter}.", ("adapter",)
        )
        self.adapter_info = self._gauge(
            ADAPTER_INFO, "1 for the version that an adapter last answered with.", ("adapter", "digest")
        )
        self.resident = self._gauge("chorus_adapters_resident", "Adapters on the device.")
        self.resident_bytes = self._gauge("chorus_adapter_memory_bytes", "Of --adapter-memory, what adapters take.")
        self.loads = self._counter("chorus_adapter_loads", "Adapters loaded onto the device.")
        self.load_failures = self._counter("chorus_adapter_load_failures", "Loads that were refused or failed.")
        self.load_seconds = self._counter("chorus_adapter_load_seconds", "Time spent loading adapters.")
        self.evictions = self._counter("chorus_adapter_evictions", "Adapters that made room for others.")
        self.cache_hits = self._counter(
            "chorus_adapter_cache_hits", "Adapters that were found in host memory when the device needed them."
        )
        self.cache_misses = self._counter("chorus_adapter_cache_misses", "Adapters that had to be read from disk.")
        self.host_cache_bytes = self._gauge("chorus_adapter_host_cache_bytes", "Of --host-cache, what adapters take.")
        self.worker_up = self._gauge("chorus_worker_up", "1 while the inference worker answers, else 0.")
        self.worker_restarts = self._counter(
            "chorus_worker_restarts", "Inference workers that came up after the first."
        )

    def observe_step(self, stats: StepStats) -> None:
        """Record one step."""
        self.running.set(stats.num_running)
        self.waiting.set(stats.num_waiting)
        self.kv_usage.set(stats.kv_cache_usage)
        adapters = stats.running_adapters, stats.waiting_adapters
        if adapters != self._lora_adapters:
            self._lora_adapters = adapters
            self.lora_info.clear()
            names = [",".join(each) for each in adapters]
            self._lora_now = self.lora_info.labels(self._model, str(self._max_lora), *names)
        self._lora_now.set(time.time())
        self.prompt_tokens.inc(stats.num_prompt_tokens)
        self.generation_tokens.inc(stats.num_generated_tokens)
        if stats.batch_size:
            self.step_seconds.observe(stats.step_seconds)
            self.batch_size.observe(stats.batch_size)
            decoded = len(stats.inter_token_latencies)
            self.iteration.observe(stats.num_prompt_tokens + decoded)
        for seconds in stats.first_token_latencies:
            self.ttft.observe(seconds)
        for seconds in stats.inter_token_latencies:
            self.itl.observe(seconds)
        self.resident.set(stats.resident_adapters)
        self.resident_bytes.set(stats.resident_adapter_bytes)
        self._follow(self.loads, "loads", stats.adapter_loads)
        self._follow(self.load_failures, "failures", stats.adapter_load_failures)
        self._follow(self.load_seconds, "seconds", stats.adapter_load_seconds)
        self._follow(self.evictions, "evictions", stats.adapter_evictions)
        self._follow(self.cache_hits, "cache_hits", stats.adapter_cache_hits)
        self._follow(self.cache_misses, "cache_misses", stats.adapter_cache_misses)
        self.host_cache_bytes.set(stats.host_cache_bytes)

    def worker_started(self) -> None:
        """A worker has come up: its totals count from zero, and nothing runs on it."""
        if self._totals.get("started"):
            self.worker_restarts.inc()
        self._totals = {"started": 1}
        self.worker_up.set(1)

    def worker_lost(self) -> None:
        """The worker died or hangs."""
        self.observe_step(StepStats())
        self.worker_up.set(0)

    def observe_request(
        self,
        adapters: Sequence[AdapterRef],
        prompt_tokens: int,
        generated: int,
        reason: str,
        seconds: float,
        last: SequenceOutput | None,
    ) -> None:
        """Record a request that has ended, for each of its adapters; `seconds` from arrival."""
        self.finished.labels(self._model, reason).inc()
        answered = generated > 0 or reason in ("eos", "stop", "length")
        for label in [self._adapter_label(adapter, answered) for adapter in adapters] or ["base"]:
            self.adapter_requests.labels(self._model, label).inc()
            self.adapter_tokens.labels(self._model, label).inc(generated)
        if last is not None and reason in ("eos", "stop", "length"):
            self.success.labels(self._model, "length" if reason == "length" else "stop").inc()
            self.e2e.observe(seconds)
            self.queue_time.observe(last.queue_time)
            self.request_prompt.observe(prompt_tokens)
            self.request_generated.observe(generated)

    def render(self) -> bytes:
        """The text exposition format."""
        return generate_latest(self.registry)

    def document(self) -> str:
        """docs/metrics.md."""
        rows = ["# Metrics", "", "Generated by `python -m server.metrics`. `GET /metrics` serves them.", ""]
        rows += ["| name | type | labels | what |", "|---|---|---|---|"]
        for metric in self._all:
            described = next(iter(metric.describe()))
            name = described.name + ("_total" if described.type == "counter" else "")
            labels = ", ".join(metric._labelnames)  # pyright: ignore
            rows.append(f"| `{name}` | {described.type} | {labels} | {described.documentation} |")
        return "\n".join(rows) + "\n"

    def _follow(self, counter: Counter, name: str, total: float) -> None:
        """Bring a counter up to a total that the worker keeps; a new worker's totals start at zero."""
        counter.inc(max(0.0, total - self._totals.get(name, 0.0)))
        self._totals[name] = total

    def _adapter_label(self, adapter: AdapterRef, answered: bool) -> str:
        name, (known, _) = adapter.name, self.answered.get(adapter.name, (None, 0.0))
        if known is None and (len(self.answered) >= MAX_ADAPTER_LABELS or not answered):
            return OTHER
        if not answered:
            return name
        if known != adapter.digest:
            if known is not None:
                self.adapter_info.remove(self._model, name, known)
            self.adapter_info.labels(self._model, name, adapter.digest).set(1)
        self.answered[name] = adapter.digest, time.time()
        return name

    def _gauge(self, name: str, text: str, labels: Iterable[str] = ()) -> Gauge:
        return self._keep(Gauge(name, text, ("model_name", *labels), registry=self.registry))

    def _counter(self, name: str, text: str, labels: Iterable[str] = ()) -> Counter:
        return self._keep(Counter(name, text, ("model_name", *labels), registry=self.registry))

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...], *, total: bool = False) -> Histogram:
        full_name = f"{name}_total" if total else name  # vLLM's iteration histogram is called ..._total
        return self._keep(Histogram(full_name, text, ("model_name",), buckets=buckets, registry=self.registry))

    def _keep(self, metric: M) -> M:
        """Without labels of its own it is bound to the model, once: finding the labels takes longer than to count."""
        self._all.append(metric)
        return metric.labels(self._model) if metric._labelnames == ("model_name",) else metric  # pyright: ignore


if __name__ == "__main__":
    print(Metrics("gpt2", 128).document(), end="")
