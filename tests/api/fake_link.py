"""The OpenAI routes over a fake link: what the engine says is scripted, so that answers can be checked byte by byte."""

from collections.abc import AsyncGenerator, Callable, Sequence
from types import SimpleNamespace
from typing import Any, cast

from fastapi import FastAPI
from fastapi.testclient import TestClient

from adapters.errors import AdapterNotFound
from server.api.errors import install_handlers
from server.api.link import Overloaded
from server.api.openai import OpenAIRoutes
from server.api.spec import ChorusSpec
from server.engine.types import ErrorKind, FinishReason, Request, SequenceOutput
from server.metrics import Metrics
from server.model.source import DEMO_MODEL
from server.tokenizer import Tokenizer

EOS = 50256
TOKENIZER = Tokenizer(DEMO_MODEL)
VOCABULARY = TOKENIZER.vocabulary(50257)
Script = Callable[[int, Request], Sequence[SequenceOutput]]


class FakeLink:
    """Answers each request as `script` says, the requests of one call taking turns."""

    def __init__(self, script: Script) -> None:
        self.script, self.asked = script, list[Request]()
        self.info = SimpleNamespace(dtype="float32", backend="fake")

    async def generate(self, *requests: Request) -> AsyncGenerator[SequenceOutput]:
        self.asked += requests
        if len(requests) > 8:
            raise Overloaded("8 requests are in flight")
        left = [list(self.script(i, request)) for i, request in enumerate(requests)]
        while any(left):
            for outputs in left:
                if outputs:
                    yield outputs.pop(0)


class NoAdapters:
    """A store that holds nothing."""

    def known(self, reference: str, key: str | None) -> None:
        return None

    def get(self, reference: str, key: str | None) -> Any:
        raise AdapterNotFound(reference)


def one_by_one(request: Request, ids: Sequence[int], reason: FinishReason, **last: Any) -> list[SequenceOutput]:
    """An output for each token, or a single one if the client wants no stream; with scores if it asked for them."""
    params, count = request.sampling_params, len(request.prompt_token_ids)
    prompt: dict[str, Any] = {}
    if params.prompt_logprobs:
        prompt["prompt_logprobs"] = tuple(-float(i) for i in range(1, count))
        prompt["prompt_top_logprobs"] = tuple(((i, -0.5),) for i in range(1, count))
    outputs: list[SequenceOutput] = []
    width = 1 if request.stream else len(ids)
    for start in range(0, len(ids), width):
        new, ends = tuple(ids[start : start + width]), start + width >= len(ids)
        scores = tuple(-0.25 * (start + i + 1) for i in range(len(new))) if params.logprobs else ()
        tops = tuple(((each, score),) for each, score in zip(new, scores, strict=True)) if params.top_logprobs else ()
        end: dict[str, Any] = {"finish_reason": reason, **last} if ends else {}
        first = prompt if start == 0 else {}
        outputs.append(SequenceOutput(request.request_id, new, scores, top_logprobs=tops, **first, **end))
    return outputs


def failure(request: Request, kind: ErrorKind, why: str) -> SequenceOutput:
    return SequenceOutput(request.request_id, (), (), FinishReason.ERROR, error=why, error_kind=kind)


def serve(script: Script) -> tuple[TestClient, FakeLink]:
    """A client of the routes, and the link that was asked."""
    spec, link = ChorusSpec(), FakeLink(script)
    spec.served = cast(
        "Any",
        SimpleNamespace(
            settings=SimpleNamespace(max_batch_size=4, max_waiting=8),
            model_name="demo",
            model_config=SimpleNamespace(eos_token_id=EOS, vocab_size=50257),
            max_model_len=256,
            tokenizer=TOKENIZER,
            vocabulary=VOCABULARY,
            store=NoAdapters(),
            metrics=Metrics("demo", 4),
            version="1",
            created=0.0,
        ),
    )
    spec.link = cast("Any", link)
    OpenAIRoutes(spec).register()
    app = FastAPI()
    for path, handler, methods in spec.endpoints:
        app.add_api_route(path, handler, methods=methods)
    install_handlers(app)
    return TestClient(app, raise_server_exceptions=False), link
