"""POST /tokenize: TGI's answer to `inputs`, vLLM's to `prompt`; the tokens are those of transformers."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import GPT2TokenizerFast

from server.model.source import DEMO_MODEL
from tests.api.fake import Fake, outputs

ORACLE = GPT2TokenizerFast.from_pretrained(DEMO_MODEL)
FAKE = Fake(lambda request: outputs(request, [1]))


def post(**body: Any) -> Any:
    return FAKE.http.post("/tokenize", json=body)


@given(st.text(max_size=40))
def test_both_answers_are_what_transformers_says(text: str) -> None:
    wanted = ORACLE(text, return_offsets_mapping=True)
    got = post(inputs=text)
    assert got.status_code == 200, got.text
    places = [tuple(place) for place in wanted["offset_mapping"]]
    assert [each["id"] for each in got.json()] == wanted["input_ids"]
    assert [(each["start"], each["stop"]) for each in got.json()] == places
    assert all(each["text"] == text[each["start"] : each["stop"]] for each in got.json())
    ids = wanted["input_ids"]
    assert post(model="demo", prompt=text).json() == {"count": len(ids), "max_model_len": 256, "tokens": ids}


def test_the_answer_has_the_documented_shape() -> None:
    assert post(inputs="Hi \u00e9!").json() == [
        {"id": 17250, "text": "Hi", "start": 0, "stop": 2},
        {"id": 38251, "text": " \u00e9", "start": 2, "stop": 4},
        {"id": 0, "text": "!", "start": 4, "stop": 5},
    ]
    assert [each["text"] for each in post(inputs="one two three", parameters={"truncate": 2}).json()] == [
        " two", " three",
    ]  # fmt: skip
    plain = post(prompt="one two").json()
    assert plain == post(prompt="one two", model=None, add_special_tokens=False, return_token_strs=False).json()
    assert plain["count"] == 2


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({}, 422, ["inputs", "prompt"]),
        ({"inputs": "a", "prompt": "a"}, 422, ["inputs", "prompt"]),
        ({"inputs": "a", "model": "demo"}, 422, ["model", "prompt"]),
        ({"prompt": "a", "parameters": {}}, 422, ["parameters", "inputs"]),
        ({"prompt": ["a"]}, 422, ["prompt"]),
        ({"model": "demo", "messages": []}, 422, ["messages"]),
        ({"prompt": "a", "return_token_strs": True}, 422, ["return_token_strs"]),
        ({"prompt": "a", "model": "nobody"}, 404, ["nobody"]),
        ({"prompt": "a " * 50_000}, 422, ["prompt", "100,000 bytes"]),
        ({"inputs": "a " * 50_000}, 422, ["inputs", "100,000 bytes"]),
    ],
)
def test_a_body_that_is_neither_is_refused(body: dict, status: int, words: list[str]) -> None:
    response = post(**body)
    assert response.status_code == status
    assert response.json()["error_type"] == ("not_found" if status == 404 else "validation")
    assert all(word in response.json()["error"] for word in words), response.json()["error"]
