"""LoRA for a mixed batch with our Triton kernels: rows grouped by slot, weights where they lie in the arena.

    y[n] += w_s (x[n] A_s^T) B_s        for each slot s of the row, by digest; slot 0 is the base

A row that has several slots takes part in as many rounds, one after another: within one, a row belongs to one tile.

The table holds, for each module and slot, where A and B begin in the arena and their rank. It stays where it is, so
that a CUDA graph may read it; only its contents change, between steps.
"""

from collections.abc import Sequence, Set

import torch

from adapters.adapter import TARGETS, Adapter, BaseShape, ModuleKey
from adapters.arena import Arena
from kernels.gpu.lora import LoraMeta, add_lora, splits


class SlotLora:
    """The table over one arena."""

    def __init__(self, arena: Arena, shape: BaseShape, slots: int) -> None:
        self.memory = arena.memory
        keys = [ModuleKey(layer, target) for layer in range(shape.n_layer) for target in TARGETS]
        self.modules = {key: i for i, key in enumerate(keys)}
        self.table = torch.zeros(len(keys), slots, 3, dtype=torch.int64, device=self.memory.device)
        self._holders: dict[int, Adapter] = {}  # by slot

    def publish(self, slot: int, adapter: Adapter) -> None:
        """From the next step on, `slot` means `adapter`, whose tensors are views of the arena."""
        if self._holders.get(slot) is adapter:
            return
        lines = torch.zeros(len(self.modules), 3, dtype=torch.int64)
        for key, pair in adapter.pairs.items():
            line = pair.a.storage_offset(), pair.b.storage_offset(), pair.a.shape[0]
            lines[self.modules[key]] = torch.tensor(line)
        self.table[:, slot] = lines.to(self.table.device)
        self._holders[slot] = adapter

    def batch(self, rounds: Sequence[LoraMeta], targets: Set[str], max_rank: int) -> "SlotLoraBatch":
        """One forward's adapters: which rows go together, what any of them changes, and their largest rank."""
        return SlotLoraBatch(self, rounds, targets, max_rank)


class SlotLoraBatch:
    """One forward's adapters; may be captured, the grouping's tensors then get new contents for each replay."""

    def __init__(self, lora: SlotLora, rounds: Sequence[LoraMeta], targets: Set[str], max_rank: int) -> None:
        self._lora, self._rounds, self._targets, self._max_rank = lora, rounds, targets, max_rank

    def add(self, y: torch.Tensor, x: torch.Tensor, key: ModuleKey) -> None:
        """y [N, out] += each row's adapters applied to x [N, in], for module `key`; in place."""
        if key.target not in self._targets:
            return
        n, k = x.shape
        xa = torch.empty(splits(k), n, self._max_rank, dtype=torch.float32, device=x.device)
        for meta in self._rounds:
            add_lora(y, x, self._lora.memory, self._lora.table[self._lora.modules[key]], meta, xa)
