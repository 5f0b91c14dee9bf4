"""The TGI dialect over a real server: every number that it tells is the one transformers computes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import GPT2TokenizerFast, TypicalLogitsWarper

from server.model.source import DEMO_MODEL
from tests.api.conftest import ServerProcess
from tests.api.test_generate import PROMPT, events, post
from tests.oracle import peft_model

TOLERANCE = 1e-4
TOKENIZER = GPT2TokenizerFast.from_pretrained(DEMO_MODEL)
IDS: list[int] = TOKENIZER(PROMPT)["input_ids"]
Model = Callable[[list[int]], torch.Tensor]


@pytest.fixture(scope="module", params=[None, "beta"], ids=["base", "beta"])
def name(request: pytest.FixtureRequest) -> str | None:
    return request.param


@pytest.fixture(scope="module")
def logits(name: str | None, adapters_dir: Path) -> Model:
    """Ids to the logits at every position, `[T, V]`, of the base or of PEFT's model."""
    model = peft_model(DEMO_MODEL, {name: adapters_dir / name} if name else {}).float()  # the files hold fp16

    def compute(ids: list[int]) -> torch.Tensor:
        with torch.no_grad():
            return model(input_ids=torch.tensor([ids])).logits[0]

    return compute


def pick(model: Model, count: int, choose: Callable[[torch.Tensor, list[int]], int]) -> list[int]:
    """`count` tokens after the prompt; `choose` gets a position's logits and the tokens so far."""
    output: list[int] = []
    while len(output) < count:
        output.append(choose(model([*IDS, *output])[-1], output))
    return output


@pytest.fixture(scope="module")
def greedy(logits: Model) -> list[int]:
    """What the model says after the prompt by itself."""
    return pick(logits, 12, lambda scores, _: int(scores.argmax()))


def details(server: ServerProcess, **parameters: Any) -> dict[str, Any]:
    response = post(server, details=True, **parameters)
    assert response.status_code == 200, response.text
    return response.json()["details"]


def test_prompt_token_and_top_logprobs(server: ServerProcess, name: str | None, logits: Model) -> None:
    parameters = {"adapter_id": name, "max_new_tokens": 12, "top_n_tokens": 5}
    got = details(server, decoder_input_details=True, **parameters)
    tokens = [each["id"] for each in got["tokens"]]
    truth = logits([*IDS, *tokens]).log_softmax(-1)
    assert [each["id"] for each in got["prefill"]] == IDS
    assert [each["text"] for each in got["prefill"]] == [TOKENIZER.decode([id_]) for id_ in IDS]
    assert got["prefill"][0]["logprob"] is None
    for at, each in enumerate(got["prefill"][1:], 1):
        assert each["logprob"] == pytest.approx(float(truth[at - 1, each["id"]]), abs=TOLERANCE)
    assert len(got["top_tokens"]) == len(tokens) == 12
    for at, (each, top) in enumerate(zip(got["tokens"], got["top_tokens"], strict=True), len(IDS) - 1):
        assert each["logprob"] == pytest.approx(float(truth[at, each["id"]]), abs=TOLERANCE)
        values, ids = truth[at].topk(5)
        assert [t["logprob"] for t in top] == pytest.approx(values.tolist(), abs=TOLERANCE)
        for t, id_ in zip(top, ids.tolist(), strict=True):
            assert t["id"] == id_ or abs(float(truth[at, t["id"]] - truth[at, id_])) < TOLERANCE
            assert t["text"] == TOKENIZER.decode([t["id"]])
        assert top[0]["id"] == each["id"], "greedy"
        assert top[0]["logprob"] == each["logprob"], "bit for bit"
    streamed = list(events(server, **parameters))
    assert [event["token"] for event in streamed] == got["tokens"]
    assert [event["top_tokens"] for event in streamed] == got["top_tokens"]


def test_what_is_told_beside_them_changes_no_token(server: ServerProcess, name: str | None) -> None:
    parameters = {"adapter_id": name, "max_new_tokens": 16, "do_sample": True, "seed": 11}
    plain = details(server, **parameters)
    told = details(server, top_n_tokens=3, decoder_input_details=True, **parameters)
    assert told["tokens"] == plain["tokens"]


@pytest.mark.parametrize(("frequency", "presence"), [(0.7, 0.0), (0.0, 1.6), (-1.5, -0.5)])
def test_penalties_go_by_what_the_output_has(
    server: ServerProcess, name: str | None, logits: Model, greedy: list[int], frequency: float, presence: float
) -> None:
    def choose(scores: torch.Tensor, output: list[int]) -> int:
        counts = torch.bincount(torch.tensor(output, dtype=torch.long), minlength=len(scores))
        return int((scores - frequency * counts - presence * (counts > 0)).argmax())

    got = details(
        server, adapter_id=name, max_new_tokens=12, ignore_eos_token=True,
        frequency_penalty=frequency, presence_penalty=presence,
    )  # fmt: skip
    wanted = pick(logits, 12, choose)
    assert [each["id"] for each in got["tokens"]] == wanted
    assert wanted != greedy, "the penalties matter"


def test_a_tiny_typical_p_leaves_the_most_typical_token(
    server: ServerProcess, name: str | None, logits: Model, greedy: list[int]
) -> None:
    def choose(scores: torch.Tensor, output: list[int]) -> int:
        warp = TypicalLogitsWarper(mass=1e-6)
        return int(warp(torch.tensor([[*IDS, *output]]), scores[None]).argmax())  # type: ignore[arg-type]

    got = details(
        server, adapter_id=name, max_new_tokens=10, ignore_eos_token=True, do_sample=True, seed=1, typical_p=1e-6
    )
    wanted = pick(logits, 10, choose)
    assert [each["id"] for each in got["tokens"]] == wanted
    assert wanted != greedy[:10], "it matters"


def test_best_of_is_the_best_of_what_its_seeds_give(server: ServerProcess, name: str | None) -> None:
    parameters = {"adapter_id": name, "max_new_tokens": 12, "do_sample": True}
    alone = [details(server, seed=seed, **parameters) for seed in range(40, 45)]
    got = details(server, seed=40, best_of=5, decoder_input_details=True, **parameters)

    def mean(each: dict[str, Any]) -> float:
        return sum(token["logprob"] for token in each["tokens"]) / len(each["tokens"])

    ranked = sorted(alone, key=mean, reverse=True)
    assert [each["seed"] for each in (got, *got["best_of_sequences"])] == [each["seed"] for each in ranked]
    exact = httpx.get(f"{server.url}/info").json()["backend"].startswith("kernels")  # torch alone makes no such promise
    for each, by_itself in zip((got, *got["best_of_sequences"]), ranked, strict=True):
        assert [token["id"] for token in each["tokens"]] == [token["id"] for token in by_itself["tokens"]]
        wanted = [token["logprob"] for token in by_itself["tokens"]]
        assert [token["logprob"] for token in each["tokens"]] == (wanted if exact else pytest.approx(wanted, abs=1e-4))
    assert all(each["prefill"] == got["prefill"] for each in got["best_of_sequences"])


def test_a_truncated_prompt_is_its_end(server: ServerProcess, name: str | None) -> None:
    tail = TOKENIZER.decode(IDS[-3:])
    whole = httpx.post(
        f"{server.url}/generate",
        json={"inputs": tail, "parameters": {"adapter_id": name, "details": True, "max_new_tokens": 8}},
        timeout=60,
    ).json()["details"]
    assert whole["prompt_tokens"] == 3
    assert details(server, adapter_id=name, max_new_tokens=8, truncate=3) == whole


def test_the_compatible_route_and_tokenize(server: ServerProcess, name: str | None) -> None:
    parameters = {"adapter_id": name, "max_new_tokens": 8, "details": True}
    single = post(server, **parameters).json()
    body = {"inputs": PROMPT, "parameters": parameters}
    assert httpx.post(f"{server.url}/", json=body, timeout=60).json() == [single]
    with httpx.stream("POST", f"{server.url}/", json=body | {"stream": True}, timeout=60) as response:
        lines = [line for line in response.iter_lines() if line]
    assert [json.loads(line.removeprefix("data: ")) for line in lines] == list(events(server, **parameters))
    assert httpx.get(f"{server.url}/").status_code == 405, "the route is ours alone"
    tokens = httpx.post(f"{server.url}/tokenize", json={"model": name or "demo", "prompt": PROMPT}).json()
    assert tokens == {"count": len(IDS), "max_model_len": 256, "tokens": IDS}
