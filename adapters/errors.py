"""The exceptions an adapter can end in.

AdapterError
├── AdapterNotFound      no adapter of that name
├── AdapterRefused       its content can't be served: says what and why; the same bytes are refused again
├── AdapterConflict      the change can't be made as things stand: says what stands in its way
│   └── AdapterExists    the name should be new, and isn't
└── AdapterUnavailable   it could not be read this time: trying again may help
"""

from collections.abc import Sequence


class AdapterError(Exception):
    """Base of everything that can go wrong with an adapter."""


class AdapterNotFound(AdapterError):
    """No adapter is known by this name; `nearest` holds the names most like it."""

    def __init__(self, name: str, nearest: Sequence[str] = (), hint: str = "") -> None:
        self.name = name
        self.nearest, self.hint = tuple(nearest), hint
        hint = hint or (f"the nearest are {', '.join(map(repr, nearest))}" if nearest else "")
        hint = f"; {hint}" if hint else ""
        super().__init__(f"adapter {name!r} does not exist{hint}. GET /v1/models lists what can be served")


class AdapterRefused(AdapterError):
    """The adapter's content can't be served as it is; the message says what was found and what is expected."""


class AdapterConflict(AdapterError):
    """A change that what is registered or running rules out; the message says how to make room for it."""


class AdapterExists(AdapterConflict):
    """A name that should be new stands for something."""


class AdapterUnavailable(AdapterError):
    """The adapter's files could not be read (I/O); the request may be tried again."""
