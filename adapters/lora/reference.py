"""The slow truth: one row at a time. `packed` is tested against it."""

from collections.abc import Sequence

import torch

from adapters.adapter import Adapter, ModuleKey


def add_lora(y: torch.Tensor, x: torch.Tensor, key: ModuleKey, row_adapters: Sequence[Adapter | None]) -> None:
    """y[n] += (x[n] A_n^T) B_n for every row n whose adapter changes module `key`; in place.

    y [N, out], x [N, in], row_adapters: N entries, None for the base.
    """
    for n, adapter in enumerate(row_adapters):
        pair = adapter.pairs.get(key) if adapter is not None else None
        if pair is not None:
            y[n] += (x[n] @ pair.a.T) @ pair.b
