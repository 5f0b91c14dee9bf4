"""Golden prompts: what an adapter's author got of it, greedily, beside its weights. Works without torch.

golden.json: {"format_version": 1, "base_model": str, "dtype": str, "prompts": [{"prompt": str,
"prompt_token_ids": [int], "token_ids": [int], "logprobs": [float]}]}. An engine that gives other tokens has another
base, or other weights.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from adapters.errors import AdapterRefused
from adapters.tensorfile import open_regular, parse_json

GOLDEN_FILE = "golden.json"
FORMAT_VERSION = 1
MAX_BYTES = 1 << 20
MAX_PROMPTS = 16
MAX_TOKENS = 256
"""Of a prompt, and of what follows it."""
MAX_PROMPT_CHARS = 4096
_LARGEST_ID = (1 << 31) - 1


@dataclass(frozen=True)
class GoldenPrompt:
    """One prompt and its greedy continuation."""

    prompt: str  # for people; the ids count
    prompt_token_ids: tuple[int, ...]  # not empty
    token_ids: tuple[int, ...]  # not empty; EOS is a token among others
    logprobs: tuple[float, ...]  # of token_ids: log-softmax of the raw logits


@dataclass(frozen=True)
class Golden:
    """A golden.json; its base_model and dtype tell where it was made and decide nothing."""

    prompts: tuple[GoldenPrompt, ...]  # not empty
    base_model: str = ""
    dtype: str = ""


def read_golden(folder: Path) -> Golden | None:
    """The golden prompts in `folder`; None without the file.

    Raises AdapterRefused naming field and value, AdapterUnavailable when it can't be read.
    """
    try:
        with open_regular(folder / GOLDEN_FILE, MAX_BYTES) as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        return None
    if len(data) > MAX_BYTES:
        raise AdapterRefused(f"{GOLDEN_FILE} grew beyond {MAX_BYTES:,} bytes while it was read")
    raw = _object(parse_json(data, GOLDEN_FILE), "its content", {"format_version", "prompts", "base_model", "dtype"})
    version = raw.get("format_version")
    if type(version) is not int or version != FORMAT_VERSION:
        raise _refused("format_version", version, str(FORMAT_VERSION))
    prompts = raw.get("prompts")
    if not isinstance(prompts, list) or not 1 <= len(cast("list[Any]", prompts)) <= MAX_PROMPTS:
        raise _refused("prompts", prompts, f"a list of 1 to {MAX_PROMPTS}")
    return Golden(
        tuple(_prompt(entry, f"prompts[{i}]") for i, entry in enumerate(cast("list[Any]", prompts))),
        _text(raw.get("base_model", ""), "base_model"),
        _text(raw.get("dtype", ""), "dtype"),
    )


def _prompt(entry: Any, where: str) -> GoldenPrompt:
    raw = _object(entry, where, {"prompt", "prompt_token_ids", "token_ids", "logprobs"})
    prompt = GoldenPrompt(
        _text(raw.get("prompt"), f"{where}.prompt"),
        _ids(raw.get("prompt_token_ids"), f"{where}.prompt_token_ids"),
        _ids(raw.get("token_ids"), f"{where}.token_ids"),
        _logprobs(raw.get("logprobs"), f"{where}.logprobs"),
    )
    if len(prompt.token_ids) != len(prompt.logprobs):
        raise AdapterRefused(
            f"{GOLDEN_FILE}: {where} has {len(prompt.token_ids)} token_ids and {len(prompt.logprobs)} logprobs, "
            "expected as many"
        )
    return prompt


def _ids(value: Any, where: str) -> tuple[int, ...]:
    found = _list(value, where)
    for i, token in enumerate(found):
        if type(token) is not int or not 0 <= token <= _LARGEST_ID:  # a bool is an int, too
            raise _refused(f"{where}[{i}]", token, "a token id")
    return tuple(found)


def _logprobs(value: Any, where: str) -> tuple[float, ...]:
    found = _list(value, where)
    for i, logprob in enumerate(found):
        # 1e400 is read as infinity; an int may be too large for a float: compared before it becomes one
        if type(logprob) not in (int, float) or not -1e6 <= logprob <= 0 or not math.isfinite(logprob):
            raise _refused(f"{where}[{i}]", logprob, "a logprob: a finite number, 0 at most")
    return tuple(map(float, found))


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list) or not 1 <= len(cast("list[Any]", value)) <= MAX_TOKENS:
        raise _refused(where, value, f"a list of 1 to {MAX_TOKENS}")
    return cast("list[Any]", value)


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str) or len(value) > MAX_PROMPT_CHARS:
        raise _refused(where, value, f"a text of at most {MAX_PROMPT_CHARS} characters")
    return value


def _object(value: Any, where: str, known: set[str]) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _refused(where, value, "an object")
    raw = cast("dict[str, Any]", value)
    if unknown := sorted(raw.keys() - known):
        raise AdapterRefused(
            f"{GOLDEN_FILE}: {where} has {unknown[0][:40]!r}, expected {', '.join(sorted(known))} alone"
        )
    return raw


def _refused(where: str, value: Any, expected: str) -> AdapterRefused:
    found = f"a list of {len(cast('list[Any]', value))}" if isinstance(value, list) else _shown(value)
    return AdapterRefused(f"{GOLDEN_FILE}: {where} is {found}, expected {expected}")


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, int) and abs(value) >> 128:
        return f"an integer of {value.bit_length()} bits"  # printing one takes time, or is refused
    text = "missing" if value is None else repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
