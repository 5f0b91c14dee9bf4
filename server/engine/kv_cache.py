"""Dense KV rows: a running sequence owns one row of full length, so an admitted request always finishes."""

import heapq

import torch

from server.model.config import GPT2Config


class RowAllocator:
    """Hands out the lowest free row, so that running rows stay close together."""

    def __init__(self, num_rows: int) -> None:
        self.num_rows = num_rows
        self._free = list(range(num_rows))

    @property
    def num_free(self) -> int:
        """Rows nobody holds."""
        return len(self._free)

    def allocate(self) -> int:
        """Take a row. Raises IndexError when none is free."""
        return heapq.heappop(self._free)

    def free(self, row: int) -> None:
        """Give a row back."""
        heapq.heappush(self._free, row)

    def check_integrity(self) -> None:
        """Raises AssertionError when a row was lost or given back twice; called when the engine is idle."""
        assert sorted(self._free) == list(range(self.num_rows)), f"free rows while idle: {sorted(self._free)}"


class KVCache:
    """The keys and values of all rows: two tensors [layers, rows, H, max_len, Dh]."""

    def __init__(
        self, config: GPT2Config, num_rows: int, max_len: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        shape = (config.n_layer, num_rows, config.n_head, max_len, config.head_dim)
        # Zeros, not empty: what a masked position holds must be finite.
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)
        self._filled = [0] * num_rows  # positions of each row that hold keys and values

    def fill(self, row: int, start: int, length: int) -> None:
        """Tell that positions start..start + length of a row are about to be written.

        A new sequence (start 0) finds zeros: an adapter that diverged may have left infinite keys there.
        """
        if start == 0 and (filled := self._filled[row]):
            self.k[:, row, :, :filled] = 0
            self.v[:, row, :, :filled] = 0
        self._filled[row] = start + length

    @property
    def nbytes(self) -> int:
        """Bytes of both tensors (on a CPU, touched only as rows fill)."""
        return 2 * self.k.numel() * self.k.element_size()
