"""LoRA for a mixed batch as two dense products over the adapters in it.

    Y += ((X A^T) * M) B      X [N, in], A [R, in], B [R, out], Y [N, out], R = the sum of the adapters' ranks

A and B stack the matrices of all adapters of the batch by rank rows; M [N, R] holds, for each row, its own adapters'
weights in their columns and 0 elsewhere, so a row's sum holds its own terms and exact zeros. A and B change only when
the set of adapters does.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from adapters.adapter import Adapter, Mix, ModuleKey

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

    def __init__(self, pack: LoraPack, weights: torch.Tensor) -> None:
        """weights [N, adapters of the pack] fp32: 0 where the row doesn't use the adapter."""
        self._pack = pack
        self._weights = weights
        self._weighted = not bool(((weights == 0) | (weights == 1)).all())
        self._masks: dict[tuple[int, ...], tuple[torch.Tensor, torch.Tensor]] = {}  # by ranks: most modules share one

    def add(self, y: torch.Tensor, x: torch.Tensor, key: ModuleKey) -> None:
        """y [N, out] += each row's adapters applied to x [N, in], for module `key`; in place."""
        stack = self._pack.stacks.get(key)
        if stack is None:
            return
        xa = x @ stack.a_t  # [N, R]
        # Filled, not multiplied: a foreign adapter's product may be infinite, and 0 * inf is NaN.
        mask, foreign = self._mask(stack.ranks, x.device)
        xa.masked_fill_(foreign, 0)
        if self._weighted:
            xa *= mask  # in fp32, whatever the type of xa
        y.addmm_(xa, stack.b)

    def _mask(self, ranks: tuple[int, ...], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """M [N, R] fp32, and where it is 0: the columns of other adapters than the row's own."""
        if (found := self._masks.get(ranks)) is None:
            mask = self._weights.repeat_interleave(torch.tensor(ranks, device=device), 1)
            found = self._masks[ranks] = mask, mask == 0
        return found


class PackCache:
    """The last few packs, so that steps with the same set of adapters stack nothing."""

    def __init__(self) -> None:
        self._packs: OrderedDict[tuple[str, ...], LoraPack] = OrderedDict()

    def batch(self, mixes: Sequence[Mix], device: torch.device) -> LoraBatch | None:
        """The LoraBatch for rows with these adapters; None when every row is the base's."""
        distinct = {adapter.digest: adapter for mix in mixes for adapter, _ in mix}
        if not distinct:
            return None
        digests = tuple(sorted(distinct))
        pack = self._packs.get(digests) or LoraPack.build([distinct[d] for d in digests])
        self._packs[digests] = pack
        self._packs.move_to_end(digests)
        while len(self._packs) > _PACKS_KEPT:
            self._packs.popitem(last=False)
        index = {digest: i for i, digest in enumerate(digests)}
        rows = [[0.0] * len(digests) for _ in mixes]
        for row, mix in zip(rows, mixes, strict=True):
            for adapter, weight in mix:
                row[index[adapter.digest]] = weight
        return LoraBatch(pack, torch.tensor(rows, dtype=torch.float32, device=device))
