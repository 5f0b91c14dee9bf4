"""What the hardware allows: read bandwidth and peak of products, best of ten readings of each.

`python -m benchmarks.floor [--json]`. The peak is the best of torch's large matrix product and of our own kernel's at
96 rows (on some processors torch's fp32 product runs at half the peak); the bandwidth the best of torch's sum over a
buffer far larger than any cache and of our own product at one row, with weights as large. Both are lower bounds of what
the hardware can do: a step below the `floor` has beaten these readings, not the hardware.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.common import CPU, emit, parser
from kernels.native import Native
from server.model.backend import choose_backend
from server.model.gpt2 import GPT2

READINGS = 10
BUFFER = 1 << 30  # bytes
ROWS, SIZE = 96, 2048  # of the large products


@dataclass(frozen=True)
class Machine:
    """Bytes a second read, products (multiply and add: 2) a second."""

    bandwidth: float
    flops: float

    @classmethod
    def measure(cls, dtype: torch.dtype) -> "Machine":
        """The best of READINGS of each, with all of torch's threads."""
        buffer = torch.ones(BUFFER // 4)
        bandwidth = BUFFER / _best(buffer.sum)
        del buffer
        a, b = torch.randn(SIZE, SIZE).to(dtype), torch.randn(SIZE, SIZE).to(dtype)
        flops = 2 * SIZE**3 / _best(lambda: a @ b)
        if native := choose_backend(CPU, dtype).native:
            bandwidth = max(bandwidth, BUFFER / _best(_product(native, dtype, 1, BUFFER // dtype.itemsize // SIZE)))
            flops = max(flops, 2 * ROWS * SIZE**2 / _best(_product(native, dtype, ROWS, SIZE)))
        return cls(bandwidth, flops)


def _product(native: Native, dtype: torch.dtype, rows: int, width: int) -> Callable[[], object]:
    """x W of our kernel: x [rows, SIZE], W [SIZE, width]."""
    weight = native.pack(torch.ones(1, 1, dtype=dtype).expand(SIZE, width), None)
    x, out = torch.ones(rows, SIZE, dtype=dtype), torch.empty(rows, width, dtype=dtype)
    return lambda: native.linear(x, weight, out)


def floor_milliseconds(model: GPT2, batch: int, machine: Machine) -> float:
    """A decode step can't be faster than reading the weights once, nor than their products."""
    config = model.config
    embeddings = config.n_positions * config.n_embd  # wpe: only a row of it is read
    parameters = model.nbytes // model.dtype.itemsize - embeddings
    return 1000 * max(parameters * model.dtype.itemsize / machine.bandwidth, 2 * parameters * batch / machine.flops)


def _best(work: Callable[[], object]) -> float:
    """Seconds of the fastest of READINGS."""
    times: list[float] = []
    for _ in range(READINGS):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def main() -> None:
    args = parser(__doc__ or "", model=False).parse_args()
    for dtype in (torch.float32, torch.bfloat16):
        machine = Machine.measure(dtype)
        row = {"benchmark": "floor", "dtype": str(dtype).removeprefix("torch.")}
        row |= {"read_GB_per_second": round(machine.bandwidth / 1e9, 1), "GFLOP_per_second": round(machine.flops / 1e9)}
        emit(row, args.json)


if __name__ == "__main__":
    main()
