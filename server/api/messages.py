"""What crosses between the API processes and the worker. Without torch."""

from dataclasses import dataclass

from server.engine.types import AdapterChange, Request, SequenceOutput, StepStats

FRAMES = "chorus-frames"
"""The one uid under which the worker answers; the frames inside carry the requests' own ids."""

OBSERVER = 0
"""The API process that is sent the figures of steps, and keeps the metrics that are made of them."""


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
    """One message of the worker to one API process: everything that concerns it since the one before."""

    epoch: str
    pong: EngineInfo | None
    outputs: tuple[SequenceOutput, ...]  # of its requests
    stats: tuple[StepStats, ...]  # for the process that observes; none for the others
    changes: tuple[AdapterChange, ...] = ()  # of where adapters stand, in order; with the first pong all that stand
