"""Work on fixed buffers, captured once for each of its shapes and replayed: a launch for the whole step."""

import logging
import time
from collections.abc import Callable, Hashable
from typing import Protocol

import torch

logger = logging.getLogger(__name__)
Work = Callable[[], None]


class Capture(Protocol):
    """The seam: how work is recorded; tests replay it eagerly."""

    def __call__(self, work: Work) -> Work:
        """What replays `work`. It may run while it is being recorded; running it again changes nothing."""
        ...


class CudaCapture:
    """CUDA graphs that share one memory pool: only one of them runs at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, work: Work) -> Work:
        """Runs once before, so that kernels are compiled and libraries have their workspaces."""
        stream = torch.cuda.Stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            work()
        torch.cuda.current_stream(self._device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # The loading threads copy adapters meanwhile: what it does is not this capture's business.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            work()
        return graph.replay


class Graphs:
    """Replays by key: the shape of the work and whatever else its launches depend on."""

    def __init__(self, capture: Capture) -> None:
        self._capture = capture
        self._replays: dict[Hashable, Work] = {}

    def __len__(self) -> int:
        return len(self._replays)

    def run(self, key: Hashable, work: Work) -> None:
        """Replay what was captured under `key`, capturing `work` first if nothing was."""
        if key not in self._replays:
            start = time.perf_counter()
            self._replays[key] = self._capture(work)
            seconds = time.perf_counter() - start
            logger.info("captured graph %d, %s, in %.2f s", len(self._replays), key, seconds)
        self._replays[key]()


def buckets(largest: int) -> list[int]:
    """Batch sizes to capture: 1, 2, 4, 8, then every 8 to 64, every 32 to 256, every 128; the last holds `largest`."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 32), *range(256, largest + 128, 128)]
    return [size for size, before in zip(sizes, [0, *sizes], strict=False) if before < largest]
