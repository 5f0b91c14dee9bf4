"""Reads adapters into host memory on a thread of its own, or finds them in the host cache."""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch

from adapters.adapter import Adapter, AdapterRef
from adapters.host_cache import HostCache


@dataclass(frozen=True)
class Read:
    """A read that has ended, well or not."""

    ref: AdapterRef
    result: Adapter | BaseException
    seconds: float


class Reader:
    """Reads under way, by digest. Every method is called from the engine's thread."""

    def __init__(self, load: Callable[[AdapterRef], Adapter], cache: HostCache) -> None:
        """`load` reads one adapter into host memory."""
        self._load, self.cache = load, cache
        self._executor = one_thread("adapter-read")
        self._reading: dict[str, tuple[AdapterRef, Future[tuple[Adapter, float]]]] = {}

    def __contains__(self, digest: str) -> bool:
        return digest in self._reading

    def __len__(self) -> int:
        return len(self._reading)

    def start(self, ref: AdapterRef) -> None:
        """Begin to read `ref`; what is in the cache has been read already."""
        cached = self.cache.get(ref.digest)
        if cached is None:
            self._reading[ref.digest] = ref, self._executor.submit(timed, self._load, ref)
            return
        future: Future[tuple[Adapter, float]] = Future()
        future.set_result((cached, 0.0))
        self._reading[ref.digest] = ref, future

    def ended(self) -> list[Read]:
        """The reads that have ended since the last call, in order of their start."""
        done: list[Read] = []
        for digest in [d for d, (_, future) in self._reading.items() if future.done()]:
            ref, future = self._reading.pop(digest)
            error = future.exception()
            if error is not None:
                done.append(Read(ref, error, 0.0))
                continue
            adapter, seconds = future.result()
            self.cache.put(adapter)
            done.append(Read(ref, adapter, seconds))
        return done

    def drop(self, digest: str) -> None:
        """Forget a read, if one is under way, and what is cached of it."""
        if digest in self._reading:
            self._reading.pop(digest)[1].cancel()
        self.cache.remove(digest)

    def close(self) -> None:
        """Stop the thread."""
        self._executor.shutdown(wait=True, cancel_futures=True)


def one_thread(name: str) -> ThreadPoolExecutor:
    """One thread that leaves the step its cores."""
    return ThreadPoolExecutor(1, thread_name_prefix=name, initializer=torch.set_num_threads, initargs=(1,))


def timed(work: Callable[..., Adapter], *arguments: object) -> tuple[Adapter, float]:
    """What `work` returns, and the seconds it took."""
    start = time.perf_counter()
    return work(*arguments), time.perf_counter() - start
