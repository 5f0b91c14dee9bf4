"""The metrics of several API processes as those of one server: any of them can answer for all.

Counters and histograms are added up. Gauges tell of the engine: the observer's hold, which sees every step.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from prometheus_client import generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from server.metrics import ADAPTER_INFO, Metrics

Snapshot = Mapping[str, Any]
"""One process's figures as JSON holds them: `samples` (name, labels, value) by family; `answered`."""


def snapshot(metrics: Metrics) -> Snapshot:
    """What a process tells another."""
    families = metrics.registry.collect()
    samples = {family.name: [(s.name, s.labels, s.value) for s in family.samples] for family in families}
    return {"samples": samples, "answered": metrics.answered}


def render(metrics: Metrics, snapshots: Sequence[Snapshot]) -> bytes:
    """The text exposition format; `snapshots` of all processes, the observer's first. `metrics` gives the names."""
    families = list(metrics.registry.collect())
    for family in families:
        told = [[Sample(*sample) for sample in each["samples"][family.name]] for each in snapshots]
        if family.name == ADAPTER_INFO:
            family.samples = _answered_last(told, [each["answered"] for each in snapshots])
        else:
            family.samples = told[0] if family.type == "gauge" else _summed(told)
    return generate_latest(_Families(families))


class _Families(Collector):
    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        """As a registry does."""
        return self._families


def _summed(told: Iterable[Iterable[Sample]]) -> list[Sample]:
    total: dict[tuple[str, ...], Sample] = {}
    for sample in (sample for samples in told for sample in samples):
        key = (sample.name, *sample.labels.values())
        known = total.get(key)
        if known is None:
            total[key] = sample
        elif sample.name.endswith("_created"):
            total[key] = sample._replace(value=min(known.value, sample.value))
        else:
            total[key] = sample._replace(value=known.value + sample.value)
    return list(total.values())


def _answered_last(
    told: Iterable[Iterable[Sample]], answered: Sequence[Mapping[str, tuple[str, float]]]
) -> list[Sample]:
    """Of each adapter the version that answered last in any process."""
    last: dict[str, tuple[str, float]] = {}
    for name, (digest, at) in (item for each in answered for item in each.items()):
        if name not in last or at > last[name][1]:
            last[name] = digest, at
    known: dict[str, Sample] = {}
    for sample in (sample for samples in told for sample in samples):
        adapter, digest = sample.labels["adapter"], sample.labels["digest"]
        if last[adapter][0] == digest:
            known[adapter] = sample
    return list(known.values())
