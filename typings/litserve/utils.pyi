from dataclasses import dataclass
from enum import Enum
from typing import Any

class LitAPIStatus(Enum):
    OK = ...

class LoopResponseType(Enum):
    STREAMING = ...

class WorkerSetupStatus:
    READY: str
    ERROR: str

@dataclass
class ResponseBufferItem:
    event: Any
    response_queue: Any
