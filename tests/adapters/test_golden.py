"""golden.json as a stranger may have written it."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from adapters.errors import AdapterRefused
from adapters.golden import MAX_BYTES, MAX_PROMPTS, MAX_TOKENS, read_golden

GOOD: dict[str, Any] = {"prompt": "Quote:", "prompt_token_ids": [1, 2], "token_ids": [3, 4], "logprobs": [-0.5, 0]}


def write(folder: Path, **fields: Any) -> None:
    content = {"format_version": 1, "base_model": "demo", "dtype": "float32", "prompts": [GOOD]} | fields
    (folder / "golden.json").write_text(json.dumps(content))


def refusal(folder: Path) -> str:
    with pytest.raises(AdapterRefused) as caught:
        read_golden(folder)
    return str(caught.value)


def test_what_it_holds(tmp_path: Path) -> None:
    write(tmp_path)
    golden = read_golden(tmp_path)
    assert golden is not None
    (prompt,) = golden.prompts
    assert (prompt.prompt, prompt.prompt_token_ids, prompt.token_ids) == ("Quote:", (1, 2), (3, 4))
    assert prompt.logprobs == (-0.5, 0.0)
    assert (golden.base_model, golden.dtype) == ("demo", "float32")


def test_no_file_is_no_golden_prompts(tmp_path: Path) -> None:
    assert read_golden(tmp_path) is None


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"format_version": 2}, "format_version is 2, expected 1"),
        ({"format_version": True}, "format_version is True, expected 1"),
        ({"prompts": []}, f"prompts is a list of 0, expected a list of 1 to {MAX_PROMPTS}"),
        ({"prompts": [GOOD] * (MAX_PROMPTS + 1)}, "prompts is a list of 17"),
        ({"prompts": {"0": GOOD}}, "prompts is an object"),
        ({"prompts": [3]}, "prompts[0] is 3, expected an object"),
        ({"prompts": None}, "prompts is missing"),
        ({"base_model": 7}, "base_model is 7, expected a text"),
        ({"tokens": 1}, "its content has 'tokens', expected"),
    ],
)
def test_wrong_files(tmp_path: Path, fields: dict[str, Any], said: str) -> None:
    write(tmp_path, **fields)
    assert f"golden.json: {said}" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"prompt": 5}, "prompt is 5, expected a text"),
        ({"prompt_token_ids": []}, "prompt_token_ids is a list of 0, expected a list of 1 to 256"),
        ({"token_ids": [3] * (MAX_TOKENS + 1)}, "token_ids is a list of 257"),
        ({"token_ids": [3, -1]}, "token_ids[1] is -1, expected a token id"),
        ({"token_ids": [3, True]}, "token_ids[1] is True, expected a token id"),
        ({"token_ids": [3.0, 4]}, "token_ids[0] is 3.0, expected a token id"),
        ({"token_ids": [3, 10**300]}, "token_ids[1] is an integer of 997 bits, expected a token id"),
        ({"token_ids": [3]}, " has 1 token_ids and 2 logprobs, expected as many"),
        ({"logprobs": [-0.5, 0.25]}, "logprobs[1] is 0.25, expected a logprob"),
        ({"logprobs": [-0.5, "-1"]}, "logprobs[1] is '-1', expected a logprob"),
        ({"logprobs": [-0.5, -(10**400)]}, "logprobs[1] is an integer of"),
        ({"note": "x" * 999}, " has 'note', expected"),
    ],
)
def test_wrong_prompts(tmp_path: Path, fields: dict[str, Any], said: str) -> None:
    write(tmp_path, prompts=[GOOD, GOOD | fields])
    answer = refusal(tmp_path)
    assert answer.startswith("golden.json: prompts[1]")
    assert said in answer
    assert len(answer) < 300


@pytest.mark.parametrize("number", ["NaN", "-Infinity", "-1e999"])
def test_logprobs_that_are_not_finite(tmp_path: Path, number: str) -> None:
    write(tmp_path)
    file = tmp_path / "golden.json"
    file.write_text(file.read_text().replace("-0.5", number))
    assert "golden.json" in refusal(tmp_path)


def test_files_that_are_not_what_they_seem(tmp_path: Path) -> None:
    file = tmp_path / "golden.json"
    file.write_bytes(b" " * (MAX_BYTES + 1))
    assert "golden.json has 1,048,577 bytes; at most 1,048,576 are read" in refusal(tmp_path)
    file.write_bytes(b"\x80\x04pickle")
    assert "golden.json is not valid JSON" in refusal(tmp_path)
    file.write_text('{"format_version": 1, "format_version": 1}')
    assert "comes twice" in refusal(tmp_path)
    file.write_text("[" * 100_000)
    assert "golden.json is not valid JSON" in refusal(tmp_path)
    file.unlink()
    os.mkfifo(file)
    assert "golden.json is not a regular file" in refusal(tmp_path)
