"""What two texts have in common, and what of a cell is a text."""

import re
import unicodedata
from typing import Any


def normalised(text: str) -> str:
    """Lower case, letters and digits only: what two copies of one quote have in common."""
    text = unicodedata.normalize("NFKC", text).lower()
    return " ".join(re.findall(r"[^\W_]+", re.sub("['’‘ʼ`´]", "", text)))


def plain(value: Any) -> str:
    """A cell's text, or a number's; empty for anything else."""
    if isinstance(value, str):
        return value.strip()
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) and value == value else ""
