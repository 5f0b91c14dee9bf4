"""Adapters kept in host memory, and what comes of them: no disk, no memory beyond the budget."""

import pytest
import torch

from adapters.arena import Arena
from adapters.errors import AdapterRefused
from adapters.host_cache import HostCache
from adapters.residency import Residency
from adapters.status import AdapterStatus
from tests.adapters.test_residency import Loader, ready, ref, settle
from tests.engine.toy import ADAPTER_BYTES, CPU, toy_adapter


def test_the_least_recently_used_one_makes_room() -> None:
    cache = HostCache(2 * ADAPTER_BYTES)
    for digest in "ab":
        cache.put(toy_adapter(digest))
    assert cache.get("a") is not None
    cache.put(toy_adapter("c"))
    assert [digest in cache for digest in "abc"] == [True, False, True]
    assert cache.get("b") is None
    assert (cache.used_bytes, cache.hits, cache.misses) == (2 * ADAPTER_BYTES, 1, 1)
    cache.put(toy_adapter("c"))
    assert cache.used_bytes == 2 * ADAPTER_BYTES, "the same one twice takes its bytes once"
    for digest in "abc":
        cache.remove(digest)
    assert cache.used_bytes == 0


@pytest.mark.parametrize("budget", [0, ADAPTER_BYTES - 1])
def test_one_that_does_not_fit_is_not_kept(budget: int) -> None:
    cache = HostCache(budget)
    cache.put(toy_adapter("a"))
    assert "a" not in cache
    assert cache.used_bytes == 0


def test_an_evicted_adapter_comes_back_without_the_disk() -> None:
    loader = Loader()
    residency = Residency(loader, Arena(ADAPTER_BYTES, CPU, torch.float32), host_cache=2 * ADAPTER_BYTES)
    ready(residency, "a", "b", "a", "b")
    assert loader.loaded == ["a", "b"]
    assert (residency.stats.loads, residency.cache.hits, residency.cache.misses) == (4, 2, 2)
    ready(residency, "c")
    ready(residency, "a")
    assert loader.loaded == ["a", "b", "c"], "b was on the device when c came: its copy was of the least use"
    ready(residency, "b")
    assert loader.loaded == ["a", "b", "c", "b"]
    residency.check_integrity()
    residency.close()


def test_a_refused_adapter_is_not_kept() -> None:
    """Too large for the device: nobody will ask for it in vain again."""
    residency = Residency(Loader(), Arena(ADAPTER_BYTES - 128, CPU, torch.float32), host_cache=1 << 20)
    residency.prefetch(ref("a"))
    settle(residency)
    assert residency.status("a") is AdapterStatus.REFUSED
    assert isinstance(residency.error("a"), AdapterRefused)
    assert residency.cache.used_bytes == 0
    residency.close()
