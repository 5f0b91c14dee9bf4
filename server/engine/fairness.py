"""Whose turn it is: waiting sequences by adapter, and the tokens each adapter has had. Touches no tensor.

Adapters that a request composes count as one of their own.

A virtual token counter (Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024): each adapter, the base
being one, counts the tokens computed for it, and the one with the least goes next. What is different from the paper,
and why, stands in docs/decisions/0005-fairness.md.
"""

import heapq
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field

from server.engine.types import Batch, Sequence

PROMPT_WEIGHT, DECODE_WEIGHT = 1, 2
"""The paper's: prompt tokens are computed many at once, a generated one holds its row for a step of its own."""


@dataclass
class _Account:
    """One adapter: who waits, and what it has had."""

    served: float = 0.0  # weighted tokens computed for it; lifted when it comes back from idle
    promised: int = 0  # weighted prompt tokens of its running sequences that are still to be computed
    running: int = 0  # sequences that hold a row
    since: int = 0  # when it began to wait or last had a turn; among equals the longest goes first
    waiting: OrderedDict[str, Sequence] = field(default_factory=lambda: OrderedDict[str, Sequence]())  # by request id

    @property
    def active(self) -> bool:
        return bool(self.waiting or self.running)

    def level(self, floor: float) -> float:
        """What counts for its turn. An adapter below `floor` was not ready when others were let in: that gives no
        credit."""
        return max(self.served + self.promised, floor)

    def lift(self, level: float) -> None:
        """Have had `level` at least."""
        self.served = max(self.served, level - self.promised)


class FairQueue:
    """The waiting sequences: first come first served within an adapter, between adapters the least served first.

    Let U be what all rows can cost, max_batch_size * max_model_len * DECODE_WEIGHT. Whoever waits has a level within
    floor .. floor + U: a turn is given to the lowest level, which then rises by what its rows cost, U at most.
    """

    def __init__(self) -> None:
        self._accounts: dict[str | None, _Account] = {}  # by group: all that are active, and those in debt
        self._floor = 0.0  # what the last adapter that was let in had had; nobody who waits has had less
        self._clock = 0.0  # what an adapter would have had that took its equal share all along; at least the floor
        self._turn = 0

    @property
    def sequences(self) -> list[Sequence]:
        """Everyone who waits, by adapter."""
        return [sequence for account in self._accounts.values() for sequence in account.waiting.values()]

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence behind the others of its adapter."""
        account = self._accounts.get(sequence.group)
        if account is None:
            account = self._accounts[sequence.group] = _Account()
        if not account.waiting:
            account.lift(self._entry())
            account.since = self._next_turn()
        account.waiting[sequence.request_id] = sequence

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence that waits."""
        del self._accounts[sequence.group].waiting[sequence.request_id]
        self._forget_idle(sequence.group)

    def turns(self) -> Iterator[Sequence]:
        """The first sequence of each adapter, by turn.

        If the caller starts or removes it, the adapter's next one comes in its own turn; else the adapter is passed
        over until `turns` is called again.
        """
        heap = [self._entry_of(group) for group, account in self._accounts.items() if account.waiting]
        heapq.heapify(heap)
        while heap:
            _, _, group = heapq.heappop(heap)
            first = next(iter(self._accounts[group].waiting.values()))
            yield first
            account = self._accounts.get(group)
            if account is not None and account.waiting and first.request_id not in account.waiting:
                heapq.heappush(heap, self._entry_of(group))

    def start(self, sequence: Sequence) -> None:
        """A waiting sequence gets a row: sets its `turn`, and counts its prompt as promised."""
        account = self._accounts[sequence.group]
        del account.waiting[sequence.request_id]
        sequence.turn = account.level(self._floor)
        account.lift(sequence.turn)
        self._floor = max(self._floor, account.served)
        self._clock = max(self._clock, self._floor)
        account.promised += PROMPT_WEIGHT * sequence.num_prompt_left
        account.running += 1
        account.since = self._next_turn()

    def charge(self, batch: Batch) -> None:
        """Count what was computed in a step; before the sequences' own `num_computed` moves on."""
        total = 0
        for item in batch.items:
            account = self._accounts[item.sequence.group]
            cost = item.num_new_tokens * (PROMPT_WEIGHT if item.prefill else DECODE_WEIGHT)
            account.served += cost
            if item.prefill:
                account.promised -= cost
            total += cost
        self._clock += total / max(1, sum(account.active for account in self._accounts.values()))

    def end(self, sequence: Sequence) -> None:
        """A running sequence ended: what is left of its prompt will not be computed."""
        account = self._accounts[sequence.group]
        account.running -= 1
        account.promised -= PROMPT_WEIGHT * sequence.num_prompt_left
        self._forget_idle(sequence.group)

    def check_integrity(self) -> None:
        """Raises AssertionError when something is still counted while nothing waits or runs."""
        assert not self._accounts, f"counted while idle: {self._accounts}"

    def _entry(self) -> float:
        """The level at which an adapter that was not waiting begins to: an equal share, not behind all who wait."""
        levels = [account.level(self._floor) for account in self._accounts.values() if account.waiting]
        return min(self._clock, max(levels, default=self._clock))

    def _entry_of(self, group: str | None) -> tuple[float, int, str | None]:
        account = self._accounts[group]
        return account.level(self._floor), account.since, group  # `since` is distinct: groups are never compared

    def _next_turn(self) -> int:
        self._turn += 1
        return self._turn

    def _forget_idle(self, group: str | None) -> None:
        """If this adapter became idle, forget all idle ones but those that have had more than an equal share."""
        if self._accounts[group].active:
            return
        if not any(account.active for account in self._accounts.values()):
            self._accounts.clear()
            self._floor = self._clock = 0.0
            return
        paid = [d for d, a in self._accounts.items() if not a.active and a.served <= self._clock]
        for each in paid:
            del self._accounts[each]
