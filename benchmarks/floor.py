"""What the hardware allows: read bandwidth and peak of products, best of ten readings: `python -m benchmarks.floor`.

The peak is torch's own large matrix product, the bandwidth a sum over a buffer far larger than any cache. Both are
lower bounds of what the hardware can do: a step below the `floor` has beaten torch's reading, not the hardware.
"""

import time
from dataclasses import dataclass

import torch

from benchmarks.common import emit, parser
from server.model.gpt2 import GPT2

READINGS = 10
BUFFER = 1 << 30  # bytes


@dataclass(frozen=True)
class Machine:
    """Bytes a second read, products (multiply and add: 2) a second."""

    bandwidth: float
    flops: float

    @classmethod
    def measure(cls, dtype: torch.dtype) -> "Machine":
        """The best of READINGS, with all of torch's threads."""
        buffer = torch.ones(BUFFER // 4)
        bandwidth = BUFFER / min(_seconds(buffer.sum) for _ in range(READINGS))
        del buffer
        n = 2048
        a, b = torch.randn(n, n).to(dtype), torch.randn(n, n).to(dtype)
        return cls(bandwidth, 2 * n**3 / min(_seconds(lambda: a @ b) for _ in range(READINGS)))


def floor_milliseconds(model: GPT2, batch: int, machine: Machine) -> float:
    """A decode step can't be faster than reading the weights once, nor than their products."""
    config = model.config
    embeddings = config.n_positions * config.n_embd  # wpe: only a row of it is read
    parameters = model.nbytes // model.dtype.itemsize - embeddings
    return 1000 * max(parameters * model.dtype.itemsize / machine.bandwidth, 2 * parameters * batch / machine.flops)


def _seconds(work: object) -> float:
    start = time.perf_counter()
    work()  # type: ignore[operator]
    return time.perf_counter() - start


def main() -> None:
    args = parser(__doc__ or "").parse_args()
    for dtype in (torch.float32, torch.bfloat16):
        machine = Machine.measure(dtype)
        row = {"benchmark": "floor", "dtype": str(dtype).removeprefix("torch.")}
        row |= {"read_GB_per_second": round(machine.bandwidth / 1e9, 1), "GFLOP_per_second": round(machine.flops / 1e9)}
        emit(row, args.json)


if __name__ == "__main__":
    main()
