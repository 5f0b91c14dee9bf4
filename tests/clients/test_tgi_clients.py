"""text-generation and lorax-client, unchanged, against a real server."""

import json
from typing import Any

import pytest

from tests.api.conftest import ServerProcess
from tests.clients.conftest import KEY
from tests.clients.environments import run
from tests.clients.test_openai import generated


@pytest.fixture(scope="module")
def found(served: ServerProcess) -> dict[str, Any]:
    return json.loads(run("tgi", "tgi_clients.py", served.url, KEY))


@pytest.mark.parametrize(
    ("call", "adapter"), [("tgi", None), ("lorax None", None), ("lorax wilde", "wilde"), ("lorax poet", "wilde")]
)
def test_generate(call: str, adapter: str | None, found: dict[str, Any], served: ServerProcess) -> None:
    got = found[call]
    assert got["text"] == generated(served, adapter, 8)
    assert (got["reason"], got["count"], got["seed"]) == ("length", 8, None)
    assert "".join(text for _, text, _ in got["tokens"]) == got["text"]
    assert all(logprob <= 0 for _, _, logprob in got["tokens"])


@pytest.mark.parametrize(
    ("call", "adapter"), [("tgi stream", None), ("lorax stream None", None), ("lorax stream poet", "wilde")]
)
def test_a_stream_holds_the_same(call: str, adapter: str | None, found: dict[str, Any], served: ServerProcess) -> None:
    assert found[call] == [generated(served, adapter, 8)] * 2


def test_the_prompt_is_told_of(found: dict[str, Any]) -> None:
    prefill = found["tgi"]["prefill"]
    assert "".join(text for _, text, _ in prefill) == "Quote by Oscar Wilde:"
    assert prefill[0][2] is None
    assert all(logprob < 0 for _, _, logprob in prefill[1:])


def test_the_best_tokens_are_told_of(found: dict[str, Any]) -> None:
    tokens = [token for token, _, _ in found["tgi"]["tokens"]]
    assert [len(top) for top in found["tgi top"]] == [3, 3]
    assert [top[0] for top in found["tgi top"]] == tokens[:2], "greedy takes the best"


def test_every_setting_of_the_client_is_taken(found: dict[str, Any]) -> None:
    assert found["tgi sampled"]["count"] <= 8
    assert found["tgi sampled"]["seed"] == 3


def test_the_best_of_two_comes_with_the_other(found: dict[str, Any]) -> None:
    assert len(found["tgi best"]) == 2
    assert all(1 <= count <= 8 for count in found["tgi best"])


@pytest.mark.parametrize(
    ("call", "kind", "word"),
    [
        ("tgi field", "ValidationError", "max_new_tokens"),
        ("lorax adapter", "NotFoundError", "nobody"),
        ("lorax source", "ValidationError", "adapter_source"),
    ],
)
def test_errors_are_the_clients_own(call: str, kind: str, word: str, found: dict[str, Any]) -> None:
    got, message = found["errors"][call]
    assert got == kind
    assert word in message
