"""Where an adapter stands on a device. Works without torch."""

from dataclasses import dataclass
from enum import Enum


class AdapterStatus(Enum):
    """Where an adapter stands on this device."""

    ABSENT = "absent"
    LOADING = "loading"  # being read, copied or proved by its golden prompts; or leaving, to be loaded afresh
    READY = "ready"
    REFUSED = "refused"  # for good: the same digest is the same bytes
    FAILED = "failed"  # I/O, or a step that failed; asking for it tries again after a while


WORST_FIRST = (
    AdapterStatus.REFUSED, AdapterStatus.FAILED, AdapterStatus.ABSENT, AdapterStatus.LOADING, AdapterStatus.READY
)  # fmt: skip


@dataclass
class ResidencyStats:
    """Totals since the start."""

    loads: int = 0
    failures: int = 0
    evictions: int = 0
    load_seconds: float = 0.0


@dataclass(frozen=True)
class Change:
    """An adapter stands elsewhere than it did."""

    digest: str
    status: AdapterStatus
    reason: str | None  # of REFUSED and FAILED
