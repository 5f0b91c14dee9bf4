"""The OpenAI routes over a fake link: what the engine says is scripted, so that answers can be checked byte by byte."""

from collections.abc import AsyncGenerator, Callable, Sequence
from types import SimpleNamespace
from typing import Any

from fastapi.testclient import TestClient

from server.api.link import Overloaded
from server.api.openai import OpenAIRoutes
from server.engine.types import ErrorKind, FinishReason, Request, SequenceOutput
from server.metrics import Metrics
from server.settings import read_settings
from tests.api.fake import EOS, client_of, tokenizer, vocabulary

TOKENIZER, VOCABULARY = tokenizer(), vocabulary()
Script = Callable[[int, Request], Sequence[SequenceOutput]]


class FakeLink:
    """Answers each request as `script` says, the requests of one call taking turns."""

    def __init__(self, script: Script) -> None:
        self.script, self.asked = script, list[Request]()
        self.info, self.metrics = SimpleNamespace(dtype="float32", backend="fake"), Metrics("demo", 4)

    async def generate(self, *requests: Request) -> AsyncGenerator[SequenceOutput]:
        self.asked += requests
        if len(requests) > 8:
            raise Overloaded("8 requests are in flight")
        left = [list(self.script(i, request)) for i, request in enumerate(requests)]
        while any(left):
            for outputs in left:
                if outputs:
                    yield outputs.pop(0)


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
    link, settings = FakeLink(script), read_settings(["--max-batch-size", "4", "--max-waiting", "8"])
    config = SimpleNamespace(eos_token_id=EOS, vocab_size=EOS + 1)
    return client_of(OpenAIRoutes, link, settings, model_config=config, metrics=link.metrics), link
