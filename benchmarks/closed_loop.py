"""A closed loop: as many requests waiting as running, and a new one for each that ends. What `adapters` times, and how.

Lengths of the first ones differ, so that later about one ends and one begins in every step.
"""

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from adapters.adapter import AdapterRef, alone
from benchmarks.common import succeeded
from server.engine.engine import Engine
from server.engine.types import Request, SamplingParams, SequenceOutput, StepStats

BATCH, PROMPT, TOKENS = 32, 16, 32


@dataclass
class Figures:
    """Of one timed run."""

    seconds: float = 0.0
    tokens: int = 0
    loads: int = 0
    evictions: int = 0
    load_seconds: float = 0.0
    distinct: list[int] = field(default_factory=lambda: list[int]())  # adapters of each step
    latencies: list[float] = field(default_factory=lambda: list[float]())  # seconds between a sequence's tokens

    @property
    def rate(self) -> float:
        """Tokens a second."""
        return self.tokens / self.seconds

    def add(self, stats: StepStats, before: StepStats) -> None:
        """Count a step; `before` is the last one's, for what is a total."""
        self.tokens += stats.num_generated_tokens
        self.loads += stats.adapter_loads - before.adapter_loads
        self.evictions += stats.adapter_evictions - before.adapter_evictions
        self.load_seconds += stats.adapter_load_seconds - before.adapter_load_seconds
        if stats.batch_size:
            self.distinct.append(len(stats.running_adapters))
        self.latencies += stats.inter_token_latencies


class Clients:
    """Sends requests of random prompts, of tokens below `vocab_size`, and drops what is under way at the end."""

    def __init__(self, engine: Engine, vocab_size: int, seed: int) -> None:
        self._engine, self._vocab_size, self._rng, self._sent = engine, vocab_size, random.Random(seed), 0
        self._in_flight: set[str] = set()

    def send(self, ref: AdapterRef | None, tokens: int, prompt: int = PROMPT) -> None:
        """Queue one request."""
        name = str(self._sent)
        ids = tuple(self._rng.randrange(self._vocab_size) for _ in range(prompt))
        self._engine.add_request(Request(name, ids, SamplingParams(max_tokens=tokens), alone(ref)))
        self._sent += 1
        self._in_flight.add(name)

    def ended(self, outputs: Sequence[SequenceOutput]) -> int:
        """How many of a step's outputs are the last of their request. Raises RuntimeError for one that failed."""
        names = {o.request_id for o in succeeded(outputs) if o.finish_reason is not None}
        self._in_flight -= names
        return len(names)

    def leave(self) -> None:
        """Abort what is under way."""
        for name in self._in_flight:
            self._engine.abort(name)
        self._engine.check_integrity()


def closed_loop(engine: Engine, vocab_size: int, order: Sequence[AdapterRef]) -> Figures:
    """The figures of the requests of `order` (all but the first 2.25 B) in the steady state."""
    clients, figures = Clients(engine, vocab_size, seed=0), Figures()
    for i, ref in enumerate(order[: 2 * BATCH]):
        clients.send(ref, i % TOKENS + 1 if i < BATCH else TOKENS)
    rest, ended, before = iter(order[2 * BATCH :]), 0, StepStats()
    start = time.perf_counter()
    while True:
        step = engine.step()
        warming = ended < BATCH // 4
        for _ in range(new := clients.ended(step.outputs)):
            if (ref := next(rest, None)) is None:
                figures.seconds = time.perf_counter() - start
                clients.leave()
                return figures
            clients.send(ref, TOKENS)
        ended += new
        if not warming:
            figures.add(step.stats, before)
        elif ended >= BATCH // 4:
            start = time.perf_counter()
        before = step.stats
        if not step.stats.batch_size:
            time.sleep(0.0005)  # nothing but loads is under way
