"""The slow truth: one row at a time. `packed` and the kernels, C++ and Triton, are tested against it."""

from collections.abc import Sequence

import torch

from adapters.adapter import Mix, ModuleKey


def add_lora(y: torch.Tensor, x: torch.Tensor, key: ModuleKey, mixes: Sequence[Mix]) -> None:
    """y[n] += w (x[n] A^T) B for every row n and each (adapter, w) of its mix that changes module `key`; in place.

    y [N, out], x [N, in], mixes: N entries.
    """
    for n, mix in enumerate(mixes):
        for adapter, weight in mix:
            pair = adapter.pairs.get(key)
            if pair is not None:
                y[n] += (weight * (x[n] @ pair.a.T)) @ pair.b
