"""Routes over an engine that says what a test tells it to, in one process."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from functools import cache
from types import SimpleNamespace
from typing import Any, cast

from fastapi import FastAPI
from fastapi.testclient import TestClient

from adapters.errors import AdapterNotFound
from server.api.errors import install_handlers
from server.api.messages import EngineInfo
from server.api.spec import ChorusSpec
from server.api.tgi import TgiRoutes
from server.engine.types import FinishReason, Request, SequenceOutput
from server.metrics import Metrics
from server.model.source import DEMO_MODEL
from server.settings import Settings, read_settings
from server.tokenizer import Tokenizer

Say = Callable[[Request], Iterable[SequenceOutput | Exception]]
EOS = 50256


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer(DEMO_MODEL)


@cache
def vocabulary() -> list[bytes]:
    return tokenizer().vocabulary(EOS + 1)


def outputs(
    request: Request, ids: Sequence[int], reason: FinishReason = FinishReason.LENGTH, **fields: Any
) -> Iterable[SequenceOutput]:
    """As the engine would hand out `ids`: one by one to a stream, else all at once. Logprobs are -0.5, -1, -1.5, ..."""
    told = request.sampling_params.logprobs
    logprobs = tuple(fields.pop("logprobs", (-(i + 1) / 2 for i in range(len(ids)))))
    top = fields.pop("top", tuple(((id_, -0.25), (EOS, -2.0)) for id_ in ids))
    top = top if request.sampling_params.top_logprobs else ()
    step = 1 if request.stream else len(ids)
    for start in range(0, len(ids), step):
        last = start + step >= len(ids)
        part = slice(start, start + step)
        yield SequenceOutput(
            request.request_id, tuple(ids[part]), logprobs[part] if told else (), reason if last else None,
            top_logprobs=top[part], **(fields if last else {}),
        )  # fmt: skip


class FakeLink:
    """Stands in for EngineLink: every request gets what `say` says of it."""

    info = EngineInfo("1", 1, "cpu", "float32", 0, "toy")

    def __init__(self, say: Say) -> None:
        self._say = say
        self.requests: list[Request] = []

    async def generate(self, *requests: Request) -> AsyncGenerator[SequenceOutput]:
        self.requests += requests
        for request in reversed(requests):  # in no order that a caller may rely on
            for output in self._say(request):
                await asyncio.sleep(0)
                if isinstance(output, Exception):
                    raise output
                yield output


class Nobody:
    """A store without adapters."""

    def known(self, name: str, key: str | None) -> None:
        return None

    def get(self, name: str, key: str | None) -> None:
        raise AdapterNotFound(name, [])


def client_of(routes: Callable[[ChorusSpec], Any], link: Any, settings: Settings, **served: Any) -> TestClient:
    """A client of the routes over `link`; `served` beside what all of them need."""
    spec, app = ChorusSpec(), FastAPI()
    common = {"model_name": "demo", "max_model_len": 256, "store": Nobody(), "version": "1.2.3", "created": 0.0}
    words = {"tokenizer": tokenizer(), "vocabulary": vocabulary()}
    spec.served = cast(
        "Any", SimpleNamespace(settings=settings, **{"metrics": Metrics("demo", 8)} | common | words | served)
    )
    spec.link = link
    routes(spec).register()
    for path, handler, methods in spec.endpoints:
        app.add_api_route(path, handler, methods=methods)
    install_handlers(app)
    return TestClient(app, raise_server_exceptions=False)


class Fake:
    """A client of the TGI routes, and the link behind it."""

    def __init__(self, say: Say, *flags: str, max_model_len: int = 256) -> None:
        self.link = FakeLink(say)
        self.http = client_of(TgiRoutes, self.link, read_settings(list(flags)), max_model_len=max_model_len)

    def post(self, path: str, inputs: str = "Quote by", *, stream: bool | None = None, **parameters: Any) -> Any:
        body = {"inputs": inputs, "parameters": parameters} | ({} if stream is None else {"stream": stream})
        return self.http.post(path, json=body)
