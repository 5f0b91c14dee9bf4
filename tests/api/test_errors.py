"""What goes wrong in the server, or before a request is one, still answers in the documented shape."""

import logging

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from server.api.errors import install_handlers
from server.api.schemas import GenerateRequest
from tests.api.fake import Fake, outputs

JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def client() -> TestClient:
    app = FastAPI()

    @app.post("/generate")
    async def generate(body: GenerateRequest) -> str:
        return body.inputs

    @app.get("/v1/broken")
    @app.get("/broken")
    async def broken() -> None:
        raise KeyError("a defect")

    install_handlers(app)
    return TestClient(app, raise_server_exceptions=False)


def told(client: TestClient, content: bytes | str, headers: dict[str, str] = JSON) -> str:
    response = client.post("/generate", content=content, headers=headers)
    assert response.status_code == 422, response.text
    assert response.json()["error_type"] == "validation"
    return response.json()["error"]


def test_a_defect_answers_500_in_the_shape_of_the_dialect_and_is_logged_under_the_request_id(
    client: TestClient, caplog: pytest.LogCaptureFixture
) -> None:
    response = client.get("/broken", headers={"x-request-id": "mine-1"})
    assert response.status_code == 500
    assert response.json()["error_type"] == "internal"
    assert "mine-1" in response.json()["error"]
    assert response.headers["x-request-id"] == "mine-1"
    logged = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert len(logged) == 1
    assert "mine-1" in logged[0].getMessage()
    assert logged[0].exc_info is not None
    assert client.get("/v1/broken").json()["error"]["type"] == "internal"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"inputs": ' + b"7" * 5000 + b"}", "not readable JSON: it holds a number with too many digits"),
        (b"[" * 50_000, "not readable JSON: it is nested too deeply"),
        (b"\xff", "not readable JSON: it is not UTF-8"),
        (b'{"inputs": ', "not valid JSON"),
    ],
)
def test_a_body_that_cannot_be_read_says_why(client: TestClient, content: bytes, words: str) -> None:
    assert words in told(client, content)


@pytest.mark.parametrize("depth", [50, 300, 600, 800, 850, 900, 950, 990])
def test_a_deeply_nested_value_is_refused_whatever_its_depth(client: TestClient, depth: int) -> None:
    nested = "[" * depth + "]" * depth
    told(client, f'{{"inputs": {nested}}}')
    told(client, f'{{"inputs": "a", "parameters": {{"grammar": {nested}}}}}')


def test_half_a_surrogate_pair_is_refused_by_field(client: TestClient) -> None:
    assert "`inputs`" in told(client, r'{"inputs": "\ud800"}')
    for field, value in (("adapter_id", r'"\ud800"'), ("stop", r'["\ud800"]'), ("grammar", r'"\ud800"')):
        assert field in told(client, rf'{{"inputs": "a", "parameters": {{"{field}": {value}}}}}')


@pytest.mark.parametrize("sent", [None, "text/plain", "application/x-www-form-urlencoded"])
def test_a_wrong_content_type_is_what_the_answer_is_about(client: TestClient, sent: str | None) -> None:
    words = told(client, b'{"inputs": "a"}', {} if sent is None else {"content-type": sent})
    assert "Content-Type" in words
    assert "expected application/json" in words
    assert (sent or "missing") in words


def test_json_of_another_name_is_json(client: TestClient) -> None:
    for kind in ("application/json; charset=utf-8", "application/ld+json"):
        assert client.post("/generate", content=b'{"inputs": "a"}', headers={"content-type": kind}).json() == "a"


def test_a_stream_that_hits_a_defect_ends_in_an_error_event_and_holds_no_nan(caplog: pytest.LogCaptureFixture) -> None:
    fake = Fake(lambda request: outputs(request, [64, 65], logprobs=(-1.0, float("nan"))))
    response = fake.http.post("/generate_stream", json={"inputs": "a"}, headers={"x-request-id": "mine-2"})
    first, event = response.text.split("\n\n")[:-1]
    assert '"logprob": -1.0' in first
    assert "NaN" not in event
    assert '"error_type": "internal"' in event
    assert "mine-2" in caplog.text
