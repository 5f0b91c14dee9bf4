"""Server-sent events, as the streams of all dialects send them."""

import json
from typing import Any

HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}
"""Of every stream: what lies between must not keep events back."""

_LINE_ENDS = str.maketrans({char: f"\\u{ord(char):04x}" for char in "\x85\u2028\u2029"})
"""Python's clients split streams at these too, though the standard doesn't; inside JSON they stand in strings only."""


def event(data: dict[str, Any]) -> str:
    """One event. Raises ValueError for a number that is none in JSON."""
    return f"data: {json.dumps(data, ensure_ascii=False, allow_nan=False).translate(_LINE_ENDS)}\n\n"
