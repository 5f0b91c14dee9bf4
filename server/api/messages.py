"""What crosses between the API process and the worker. Without torch."""

from dataclasses import dataclass

from server.engine.types import Request, SequenceOutput, StepStats

FRAMES = "chorus-frames"
"""The one uid under which the worker answers; the frames inside carry the requests' own ids."""


@dataclass(frozen=True)
class Ping:
    """Asks the worker for a sign of life; answered between two steps."""


@dataclass(frozen=True)
class Submit:
    """Requests for the worker of this epoch; another one drops them, since the edge has failed them already."""

    epoch: str
    requests: tuple[Request, ...]


@dataclass(frozen=True)
class Abort:
    """The client left."""

    epoch: str
    request_id: str


@dataclass(frozen=True)
class Forget:
    """An adapter version is gone, or is to be judged afresh: off the device once nothing uses it."""

    epoch: str
    digest: str


@dataclass(frozen=True)
class EngineInfo:
    """What a worker says of itself."""

    epoch: str  # one start of one worker
    pid: int
    device: str
    dtype: str
    weight_bytes: int
    backend: str  # what computes: our kernels, or torch


@dataclass(frozen=True)
class Frame:
    """One message of the worker: everything since the one before."""

    epoch: str
    pong: EngineInfo | None
    outputs: tuple[SequenceOutput, ...]
    stats: tuple[StepStats, ...]
