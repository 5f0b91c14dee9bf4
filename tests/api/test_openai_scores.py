"""Logprobs, echo and what bends the scores, over a real server and held to transformers on the same checkpoint."""

import json
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from transformers import GPT2LMHeadModel

from server.api.openai_choice import TokenNames
from server.model.source import DEMO_MODEL
from tests.api.conftest import ServerProcess
from tests.api.fake import EOS
from tests.api.fake_link import TOKENIZER, VOCABULARY
from tests.oracle import peft_model

PROMPT = "Quote by Oscar Wilde: \u201cBe yourself \U0001f600\u201d"
IDS = TOKENIZER.encode(PROMPT)
NAMES = [*map(TokenNames(VOCABULARY, TOKENIZER.special).__getitem__, range(len(VOCABULARY)))]
CLOSE = 2e-4  # fp32 sums in another order


@pytest.fixture(scope="module")
def oracle() -> GPT2LMHeadModel:
    return GPT2LMHeadModel.from_pretrained(DEMO_MODEL).float().eval()  # fp16 on disk, fp32 as served


def complete(server: ServerProcess, **body: Any) -> dict:
    response = httpx.post(f"{server.url}/v1/completions", json={"prompt": PROMPT, "temperature": 0} | body, timeout=120)
    assert response.status_code == 200, response.text
    return response.json()


def first(server: ServerProcess, **body: Any) -> dict:
    return complete(server, **body)["choices"][0]


@torch.no_grad()
def scores_of(model: torch.nn.Module, ids: list[int]) -> torch.Tensor:
    """Log-softmax at each position. [T, V]"""
    return model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)


def check_against(model: torch.nn.Module, ids: list[int], told: dict) -> None:
    """Every logprob of a choice is the oracle's, and each best token is one of its best."""
    expected = scores_of(model, ids)
    assert len(told["tokens"]) == len(ids)
    assert told["token_logprobs"][0] is told["top_logprobs"][0] is None
    for i in range(1, len(ids)):
        assert told["token_logprobs"][i] == pytest.approx(float(expected[i - 1, ids[i]]), abs=CLOSE)
        values = list(told["top_logprobs"][i].values())
        best = expected[i - 1].topk(2).values.tolist()
        assert sorted(values, reverse=True)[:2] == pytest.approx(best, abs=CLOSE)
        assert max(values) == values[0]


def test_echo_with_logprobs_is_what_transformers_computes(
    server: ServerProcess, oracle: GPT2LMHeadModel, adapters_dir: Path
) -> None:
    answer = first(server, echo=True, logprobs=2, max_tokens=4)
    told = answer["logprobs"]
    assert answer["text"].startswith(PROMPT)
    named = {name: id_ for id_, name in enumerate(NAMES)}
    ids = [named[name] for name in told["tokens"]]
    assert ids[: len(IDS)] == IDS
    check_against(oracle, ids, told)
    for i, (token, logprob, top) in enumerate(
        zip(told["tokens"], told["token_logprobs"], told["top_logprobs"], strict=True)
    ):
        if i:
            assert top[token] == logprob, "bit for bit"
            assert len(top) == 2 or (len(top) == 3 and logprob < min(v for k, v in top.items() if k != token))
        if i >= len(IDS):
            assert logprob == max(top.values()), "greedy took the best"
    adapted = first(server, echo=True, logprobs=2, max_tokens=1, model="beta")["logprobs"]
    adapted_ids = [named[name] for name in adapted["tokens"]]
    check_against(peft_model(DEMO_MODEL, {"beta": adapters_dir / "beta"}).float(), adapted_ids, adapted)


def test_a_harness_computes_what_transformers_would(server: ServerProcess, oracle: GPT2LMHeadModel) -> None:
    """As lm-evaluation-harness reads `local-completions`: context and continuation as ids, one token too many."""
    pairs = [("The capital of France", " is Paris"), ("Once upon a", " time there was"), ("<|endoftext|>", "The")]
    prompts = [TOKENIZER.encode(context) + TOKENIZER.encode(continuation) for context, continuation in pairs]
    lengths = [len(TOKENIZER.encode(context)) for context, _ in pairs]
    answer = complete(server, prompt=prompts, echo=True, logprobs=1, max_tokens=1, seed=1234)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    for choice, ids, length in zip(answer["choices"], prompts, lengths, strict=True):
        told = choice["logprobs"]
        assert len(told["token_logprobs"]) == len(ids) + 1
        scored, tops = told["token_logprobs"][length:-1], told["top_logprobs"][length:-1]
        expected = scores_of(oracle, ids)[length - 1 : -1]
        target = torch.tensor(ids[length:])
        assert sum(scored) == pytest.approx(float(expected.gather(1, target[:, None]).sum()), abs=CLOSE * len(scored))
        greedy = all(logprob == max(top.values()) for logprob, top in zip(scored, tops, strict=True))
        assert greedy == bool((expected.argmax(-1) == target).all())
    continued = complete(server, prompt=IDS, max_tokens=2)["choices"][0]["text"]
    whole = [*IDS, *TOKENIZER.encode(continued)]
    told = first(server, prompt=whole, echo=True, logprobs=1, max_tokens=1)["logprobs"]
    pairs_of_best = zip(told["token_logprobs"][len(IDS) : -1], told["top_logprobs"][len(IDS) : -1], strict=True)
    assert all(logprob == max(top.values()) for logprob, top in pairs_of_best), "greedy's own text is greedy"


def test_a_prompt_scored_alone_equals_one_scored_in_a_list_or_a_stream(server: ServerProcess) -> None:
    asked = {"echo": True, "logprobs": 3, "max_tokens": 0}
    alone = first(server, **asked)
    assert (alone["text"], alone["finish_reason"]) == (PROMPT, "length")
    listed = complete(server, prompt=["Other", PROMPT, PROMPT], **asked)
    assert [choice["logprobs"] for choice in listed["choices"][1:]] == [alone["logprobs"]] * 2
    assert listed["usage"]["completion_tokens"] == 0
    more = first(server, **(asked | {"max_tokens": 2}))["logprobs"]
    assert {name: values[: len(IDS)] for name, values in more.items()} == alone["logprobs"]
    body = {"prompt": PROMPT, "temperature": 0, "stream": True} | asked
    events = httpx.post(f"{server.url}/v1/completions", json=body, timeout=120).text.split("\n\n")
    assert events[1:] == ["data: [DONE]", ""]
    assert json.loads(events[0].removeprefix("data: "))["choices"] == [alone]


def test_offsets_find_each_token_in_the_text(server: ServerProcess) -> None:
    answer = first(server, echo=True, logprobs=0, max_tokens=6)
    told = answer["logprobs"]
    data = [VOCABULARY[NAMES.index(name)] for name in told["tokens"]]
    before = b""
    for each, offset in zip(data, told["text_offset"], strict=True):
        assert len(before.decode(errors="ignore")) == offset
        before += each
    assert all(list(top) == [name] for name, top in zip(told["tokens"], told["top_logprobs"], strict=True) if top)


def test_a_bias_bans_and_forces(server: ServerProcess) -> None:
    plain = first(server, max_tokens=1, logprobs=1)["logprobs"]["tokens"][0]
    best = NAMES.index(plain)
    assert first(server, max_tokens=1, logprobs=1, logit_bias={str(best): -100})["logprobs"]["tokens"][0] != plain
    (forced,) = TOKENIZER.encode(" garden")
    answer = first(server, max_tokens=3, logprobs=0, logit_bias={str(forced): 100})
    assert answer["text"] == " garden" * 3
    assert answer["logprobs"]["token_logprobs"][0] < -1, "the raw distribution's"


@torch.no_grad()
def test_penalties_are_taken_off_the_scores(server: ServerProcess, oracle: GPT2LMHeadModel) -> None:
    def expected(presence: float, frequency: float, bias: dict[int, float]) -> list[int]:
        ids = list(IDS)
        for _ in range(12):
            scores = oracle(input_ids=torch.tensor([ids])).logits[0, -1]
            for id_, added in bias.items():
                scores[id_] += added
            for id_ in set(ids[len(IDS) :]):
                scores[id_] -= presence + frequency * ids[len(IDS) :].count(id_)
            ids.append(int(scores.argmax()))
        return ids[len(IDS) :]

    bias = dict.fromkeys(TOKENIZER.encode(" garden") + TOKENIZER.encode(" river"), 12.0)
    texts: set[str] = set()
    for presence, frequency in ((0, 0), (2, 0), (0, 1.5), (-1, 0.5)):
        asked = {"presence_penalty": presence, "frequency_penalty": frequency, "logprobs": 0, "ignore_eos": True}
        answer = first(server, max_tokens=12, logit_bias={str(id_): added for id_, added in bias.items()}, **asked)
        wanted = expected(presence, frequency, bias)
        assert answer["logprobs"]["tokens"] == [NAMES[id_] for id_ in wanted]
        texts.add(answer["text"])
    assert len(texts) >= 3, "they show"


def test_fewer_than_min_tokens_never_come(server: ServerProcess) -> None:
    forced = {"max_tokens": 8, "logit_bias": {str(EOS): 100}, "logprobs": 0}
    ended = complete(server, **forced)
    assert (ended["choices"][0]["text"], ended["choices"][0]["finish_reason"]) == ("", "stop")
    assert ended["choices"][0]["logprobs"]["tokens"] == ["<|endoftext|>"]
    assert ended["usage"]["completion_tokens"] == 1
    later = complete(server, min_tokens=3, **forced)
    assert later["usage"]["completion_tokens"] == 4
    assert later["choices"][0]["logprobs"]["tokens"][-1] == "<|endoftext|>"
    assert "<|endoftext|>" not in later["choices"][0]["logprobs"]["tokens"][:-1]
    ignored = complete(server, ignore_eos=True, **forced)
    assert ignored["usage"]["completion_tokens"] == 8
    assert (ignored["choices"][0]["text"], ignored["choices"][0]["finish_reason"]) == ("", "length")


def test_the_best_of_several_is_the_likeliest(server: ServerProcess) -> None:
    asked = {"temperature": 1, "seed": 9, "max_tokens": 6, "logprobs": 0}

    def mean(choice: dict) -> float:
        return sum(choice["logprobs"]["token_logprobs"]) / len(choice["logprobs"]["tokens"])

    every = complete(server, n=4, **asked)["choices"]
    best = complete(server, n=2, best_of=4, **asked)
    ranked = sorted(every, key=mean, reverse=True)
    assert [choice["text"] for choice in best["choices"]] == [choice["text"] for choice in ranked[:2]]
    assert best["usage"]["completion_tokens"] == 24
    unscored = complete(server, n=1, best_of=4, **(asked | {"logprobs": None}))["choices"]
    assert [(c["text"], c["logprobs"]) for c in unscored] == [(ranked[0]["text"], None)]
