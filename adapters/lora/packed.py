"""LoRA for a mixed batch as two dense products over the adapters in it.

    Y += ((X A^T) * M) B      X [N, in], A [R, in], B [R, out], Y [N, out], R = the sum of the adapters' ranks

A and B stack the weights of all adapters of the batch by rank rows; M [N, R] keeps, for each row, only the columns of
its own adapter, so a row's sum holds its own terms and exact zeros. A and B change only when the set of adapters does.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from adapters.adapter import Adapter, ModuleKey

BASE = -1
_PACKS_KEPT = 4


@dataclass(frozen=True)
class _Stack:
    a_t: torch.Tensor  # [in, R]
    b: torch.Tensor  # [R, out]
    ranks: tuple[int, ...]  # rank rows of each adapter of the pack, 0 where it leaves the module alone


@dataclass(frozen=True)
class LoraPack:
    """The stacked weights of a set of adapters."""

    digests: tuple[str, ...]
    stacks: dict[ModuleKey, _Stack]

    @classmethod
    def build(cls, adapters: Sequence[Adapter]) -> "LoraPack":
        """Stack `adapters`; copies their weights once."""
        stacks: dict[ModuleKey, _Stack] = {}
        for key in sorted({key for adapter in adapters for key in adapter.pairs}):
            pairs = [adapter.pairs.get(key) for adapter in adapters]
            present = [pair for pair in pairs if pair is not None]
            stacks[key] = _Stack(
                torch.cat([pair.a for pair in present]).T.contiguous(),
                torch.cat([pair.b for pair in present]),
                tuple(0 if pair is None else pair.a.shape[0] for pair in pairs),
            )
        return cls(tuple(adapter.digest for adapter in adapters), stacks)


class LoraBatch:
    """One forward's adapters: a pack, and which of its adapters each row uses."""

    def __init__(self, pack: LoraPack, row_adapter: torch.Tensor) -> None:
        """row_adapter [N] int64: index into the pack, or BASE."""
        self._pack = pack
        self._row_adapter = row_adapter
        self._foreign: dict[tuple[int, ...], torch.Tensor] = {}  # by ranks: most modules share one

    def add(self, y: torch.Tensor, x: torch.Tensor, key: ModuleKey) -> None:
        """y [N, out] += each row's adapter applied to x [N, in], for module `key`; in place."""
        stack = self._pack.stacks.get(key)
        if stack is None:
            return
        xa = x @ stack.a_t  # [N, R]
        # Filled, not multiplied: a foreign adapter's product may be infinite, and 0 * inf is NaN.
        xa.masked_fill_(self._foreign_columns(stack.ranks, x.device), 0)
        y.addmm_(xa, stack.b)

    def _foreign_columns(self, ranks: tuple[int, ...], device: torch.device) -> torch.Tensor:
        """[N, R] bool: the columns of other adapters than the row's own, where M is 0."""
        if (foreign := self._foreign.get(ranks)) is None:
            counts = torch.tensor(ranks, device=device)
            owner = torch.repeat_interleave(torch.arange(len(ranks), device=device), counts)  # [R]
            foreign = self._row_adapter[:, None] != owner[None, :]  # [N, R]
            self._foreign[ranks] = foreign
        return foreign


class PackCache:
    """The last few packs, so that steps with the same set of adapters stack nothing."""

    def __init__(self) -> None:
        self._packs: OrderedDict[tuple[str, ...], LoraPack] = OrderedDict()

    def batch(self, row_adapters: Sequence[Adapter | None], device: torch.device) -> LoraBatch | None:
        """The LoraBatch for rows with these adapters (None: the base); None when every row is the base's."""
        distinct = {adapter.digest: adapter for adapter in row_adapters if adapter is not None}
        if not distinct:
            return None
        digests = tuple(sorted(distinct))
        pack = self._packs.get(digests) or LoraPack.build([distinct[d] for d in digests])
        self._packs[digests] = pack
        self._packs.move_to_end(digests)
        while len(self._packs) > _PACKS_KEPT:
            self._packs.popitem(last=False)
        index = {digest: i for i, digest in enumerate(digests)}
        rows = [BASE if adapter is None else index[adapter.digest] for adapter in row_adapters]
        return LoraBatch(pack, torch.tensor(rows, device=device))
