"""What can go wrong before and during a training run. Every message names the cause and a way out.

TrainingError
├── ConfigError   a flag's value, or a combination of flags
├── DataError     the file, its columns, or its rows
├── BaseError     the base model: not found, not reachable, not a GPT-2
└── GateFailed    the adapter was trained, but isn't good enough to be published
"""

from typing import Any


class TrainingError(Exception):
    """Base of all; `python -m training` prints it and exits with status 2."""


class ConfigError(TrainingError):
    """A flag's value, or a combination of flags."""


class DataError(TrainingError):
    """The data file, its columns, or its rows."""


class BaseError(TrainingError):
    """The base model."""


class GateFailed(TrainingError):
    """The adapter was trained and kept aside: a figure isn't what its gate asks for; the exit status is 3."""

    def __init__(self, message: str, finished: Any = None) -> None:
        super().__init__(message)
        self.finished = finished  # run.Finished: what was measured
