"""Log lines, as text or JSON, the same in every process. Knows nothing of what is logged.

The formatter is our own: it is shorter than setting up a library for it would be, and what is to be a field comes as
one `extra={"fields": {...}}`.
"""

import json
import logging
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any

request_id: ContextVar[str] = ContextVar("request_id", default="")
"""The request that this task works for; every JSON line tells it."""


class JsonFormatter(logging.Formatter):
    """A JSON object a line: time (UTC), level, logger, process, message; then fields, and a traceback if any."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "process": self._process,
            "message": record.getMessage(),
        }
        if current := request_id.get():
            line["request_id"] = current
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def configure_logging(level: str, kind: str, process: str = "server") -> None:
    """Log to stderr, as `kind` (text or json) says, what is at least as severe as `level`.

    LitServe's lines too. `process` is `server` or `worker`. Changes nothing where the root logger has a handler.
    """
    handler = logging.StreamHandler()
    if kind == "json":
        handler.setFormatter(JsonFormatter(process))
        logging.captureWarnings(True)
    else:
        origin = "" if process == "server" else f"[{process}] "
        handler.setFormatter(logging.Formatter(f"%(levelname)s:     {origin}%(message)s"))
    logging.basicConfig(level=level.upper(), handlers=[handler])
    litserve = logging.getLogger("litserve")
    litserve.setLevel(logging.WARNING)
    litserve.handlers.clear()
    litserve.propagate = True
