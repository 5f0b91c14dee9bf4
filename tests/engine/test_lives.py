"""Random lives of requests, on one adapter or several: rows, pins and counts come out even, all is answered once."""

import threading
from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from adapters.errors import AdapterUnavailable
from server.engine.fairness import DECODE_WEIGHT
from server.engine.types import FinishReason
from tests.engine.toy import EOS, Toy, ref

ADAPTERS = [f"a{i}" for i in range(9)]  # more than there are places, so that they push one another out
BROKEN = "a8"


class Lives(RuleBasedStateMachine):
    """Requests come, are aborted, end by EOS or length or a failed step; adapters load, hang, fail and are evicted."""

    @initialize(rows=st.integers(1, 3), budget=st.integers(3, 12), resident=st.integers(1, 6))
    def start(self, rows: int, budget: int, resident: int) -> None:
        self.toy = Toy(max_batch_size=rows, max_batch_tokens=budget, resident=resident)
        self.toy.errors[BROKEN] = AdapterUnavailable("disk")
        self.toy.runner.say = lambda s: EOS if (len(s.request_id) + len(s.output_ids)) % 7 == 0 else 1
        self.added: list[str] = []
        self.ended: dict[str, FinishReason] = {}
        self.aborted: set[str] = set()

    @rule(
        adapter=st.one_of(
            st.sampled_from([None, *ADAPTERS]),
            st.lists(st.sampled_from(ADAPTERS), min_size=2, max_size=4, unique=True).map("+".join),
        ),
        prompt=st.integers(1, 20),
        max_tokens=st.integers(1, 8),
        stream=st.booleans(),
        count=st.integers(1, 4),
    )
    def add(self, adapter: str | None, prompt: int, max_tokens: int, stream: bool, count: int) -> None:
        for _ in range(count):
            name = f"r{len(self.added)}"
            self.toy.add(name, adapter, prompt=prompt, max_tokens=max_tokens, stream=stream)
            self.added.append(name)

    @precondition(lambda self: self.added)
    @rule(which=st.integers(0, 1000))
    def abort(self, which: int) -> None:
        name = self.added[-1 - which % len(self.added)]
        self.toy.engine.abort(name)
        if name not in self.ended:
            self.aborted.add(name)

    @rule(count=st.integers(1, 5))
    def step(self, count: int) -> None:
        for _ in range(count):
            before = len(self.toy.runner.batches)
            for output in self.toy.engine.step().outputs:
                assert output.request_id not in self.aborted, "an aborted request says nothing more"
                assert output.request_id not in self.ended, "answered twice"
                if output.finish_reason is not None:
                    self.ended[output.request_id] = output.finish_reason
            for batch in self.toy.runner.batches[before:]:
                tokens = sum(item.num_new_tokens for item in batch.items)
                assert tokens <= self.toy.engine.config.max_batch_tokens

    @rule()
    def fail_a_step(self) -> None:
        self.toy.runner.fail = RuntimeError("a step that fails")
        self.step(1)
        self.toy.runner.fail = None

    @rule(adapter=st.sampled_from(ADAPTERS))
    def hold_loads(self, adapter: str) -> None:
        if adapter not in self.toy.gates or self.toy.gates[adapter].is_set():
            self.toy.gates[adapter] = threading.Event()

    @rule()
    def settle_loads(self) -> None:
        for gate in self.toy.gates.values():
            gate.set()
        self.toy.settle()

    @rule(adapter=st.sampled_from(ADAPTERS))
    def evict(self, adapter: str) -> None:
        self.toy.residency.prefetch(ref(adapter))  # takes the place of the one unused for longest

    @invariant()
    def who_waits_is_within_what_the_rows_can_cost(self) -> None:
        if not hasattr(self, "toy"):
            return
        scheduler, config = self.toy.engine._scheduler, self.toy.engine.config
        queue = scheduler._queue
        spread = config.max_batch_size * config.max_model_len * DECODE_WEIGHT
        for group, account in queue._accounts.items():
            running = [s for s in scheduler.running.values() if s.group == group]
            assert account.running == len(running)
            assert account.promised == sum(s.num_prompt_left for s in running)
            assert account.level(queue._floor) <= queue._floor + spread
        assert queue._floor <= queue._clock
        assert len(scheduler.running) + scheduler.rows.num_free == config.max_batch_size
        pins = Counter(digest for s in scheduler.running.values() for digest in s.digests)
        slots = self.toy.residency._residents._slots._slots
        assert pins == {digest: slot.pins for digest, slot in slots.items() if slot.pins}

    def teardown(self) -> None:
        if not hasattr(self, "toy"):
            return
        try:
            self.settle_loads()
            self.ended |= {name: output.finish_reason for name, output in self.toy.run().items()}
            assert not set(self.ended) & self.aborted
            assert set(self.ended) | self.aborted == set(self.added), "answered exactly once"
            self.toy.engine.check_integrity()
        finally:
            for gate in self.toy.gates.values():
                gate.set()
            self.toy.engine.close()


Lives.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None, derandomize=True)
TestLives = pytest.mark.timeout(300)(Lives.TestCase)
