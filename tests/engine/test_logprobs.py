"""What is told of tokens' probabilities, against log_softmax of transformers' logits."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from transformers import GPT2LMHeadModel

from kernels.build import library
from kernels.native import Native
from server.engine.engine import Engine
from server.engine.logprobs import logprobs_at
from server.engine.types import FinishReason, Request, SequenceOutput, TopTokens
from tests import oracle
from tests.engine.sampling_oracle import BACKENDS, make_logits
from tests.engine.toy import Toys
from tests.oracle import VOCAB, adapter_ref, make_adapter, make_checkpoint, make_engine, make_prompts, request, run


@pytest.mark.parametrize("native", BACKENDS, ids=lambda backend: "kernels" if backend else "torch")
@pytest.mark.parametrize("step", [None, 0.5], ids=["", "full of ties"])
def test_the_best_tokens_of_a_row(native: Native | None, step: float | None) -> None:
    logits = make_logits(6, 9)
    if step:
        logits = (logits / step).round() * step
        logits[0, 3:9] = torch.tensor([0.0, -0.0, 0.0, -0.0, 0.0, -0.0])
        logits[0, 9:] = -1.0
        logits[0, :3] = -2.0
    counts = [7, 0, 1, 5, logits.shape[1], 10_000]
    tokens = [4, 1, int(logits[2].argmax()), 0, 5, 6]
    told = logprobs_at(logits, tokens, counts, native)
    expected = logits.double().log_softmax(-1)
    assert told.logprobs == pytest.approx([float(expected[i, token]) for i, token in enumerate(tokens)], abs=1e-5)
    for i, (top, count) in enumerate(zip(told.top_logprobs, counts, strict=True)):
        ids = sorted(range(logits.shape[1]), key=lambda token, i=i: (-float(logits[i, token]), token))[:count]
        assert [token for token, _ in top] == ids
        assert [logprob for _, logprob in top] == pytest.approx([float(expected[i, t]) for t in ids], abs=1e-5)
        assert dict(top).get(tokens[i], told.logprobs[i]) == told.logprobs[i], "one number for one token"


@pytest.mark.parametrize("native", BACKENDS, ids=lambda backend: "kernels" if backend else "torch")
def test_a_row_that_is_not_finite_has_no_logprobs(native: Native | None) -> None:
    logits = make_logits(4, 2, vocab=50)
    logits[1, 7], logits[2] = math.nan, -math.inf
    logits[3, 5] = -math.inf  # one token left out
    told = logprobs_at(logits, [0, 0, 0, 5], [2, 2, 2, 50], native)
    assert [math.isnan(logprob) for logprob in told.logprobs] == [False, True, True, False]
    assert [len(top) for top in told.top_logprobs] == [2, 0, 0, 50]
    assert told.top_logprobs[3][-1] == (5, -math.inf)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, GPT2LMHeadModel]:
    folder = tmp_path_factory.mktemp("logprobs")
    model = make_checkpoint(folder / "base", n_layer=2)
    make_adapter(folder / "base", folder / "adapter", 1, ["c_attn", "c_fc"])
    return folder, model


@pytest.fixture(params=["auto", "off"], ids=["kernels", "torch"])
def engine(
    request: pytest.FixtureRequest, base: tuple[Path, GPT2LMHeadModel], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Engine]:
    monkeypatch.setattr(oracle, "KERNELS", request.param)
    engine = make_engine(base[0] / "base", max_batch_size=4, max_batch_tokens=24)
    yield engine
    engine.close()


def assert_told(tops: Sequence[TopTokens], logprobs: Sequence[float], truth: torch.Tensor, tokens: list[int]) -> None:
    """truth [n, V]: log-softmax at the position before each token."""
    assert len(logprobs) == len(tokens)
    expected = [float(row[token]) for row, token in zip(truth, tokens, strict=True)]
    assert list(logprobs) == pytest.approx(expected, abs=1e-4)
    for top, row, token, logprob in zip(tops, truth, tokens, logprobs, strict=True):
        assert [value for _, value in top] == pytest.approx(row.topk(len(top)).values.tolist(), abs=1e-4)
        assert [value for _, value in top] == pytest.approx([float(row[each]) for each, _ in top], abs=1e-4)
        assert dict(top).get(token, logprob) == logprob
        assert list(top) == sorted(top, key=lambda pair: (-pair[1], pair[0]))


WAYS = [
    {"logprobs": True, "top_logprobs": 5},
    {"prompt_logprobs": True},
    {"logprobs": True, "prompt_logprobs": True, "top_logprobs": 1},
    {"prompt_logprobs": True, "top_logprobs": VOCAB + 9, "temperature": 1.0, "typical_p": 0.5},
    {"top_logprobs": 3},  # of no position
    {"logprobs": True, "top_logprobs": 2, "frequency_penalty": 9.0, "min_tokens": 3, "logit_bias": ((4, 6.0),)},
]


def work(count: int = 12, **fields: bool) -> list[Request]:
    prompts = make_prompts(count, seed=6, longest=50)  # some longer than a step, and than a block
    return [
        request(i, prompt, max_tokens=5, ignore_eos=True, seed=i, **WAYS[i % len(WAYS)], **fields)
        for i, prompt in enumerate(prompts)
    ]


def test_logprobs_of_prompt_and_output_are_transformers(engine: Engine, base: tuple[Path, GPT2LMHeadModel]) -> None:
    requests = work()
    assert max(len(item.prompt_token_ids) for item in requests) > 32
    outputs = run(engine, requests, per_step=3)
    for item in requests:
        params, output, prompt = item.sampling_params, outputs[item.request_id], list(item.prompt_token_ids)
        with torch.no_grad():
            truth = base[1](torch.tensor([[*prompt, *output.token_ids]])).logits[0].log_softmax(-1)
        count = min(params.top_logprobs, VOCAB)
        if params.prompt_logprobs:
            tops = output.prompt_top_logprobs or [()] * (len(prompt) - 1)
            assert_told(tops, output.prompt_logprobs, truth[: len(prompt) - 1], prompt[1:])
        if params.logprobs:
            tops = output.top_logprobs or [()] * 5
            assert_told(tops, output.logprobs, truth[len(prompt) - 1 : -1], [*output.token_ids])
        lengths = [len(output.logprobs), len(output.top_logprobs), len(output.prompt_logprobs)]
        told = [5 * params.logprobs, 5 * (params.logprobs and count > 0), (len(prompt) - 1) * params.prompt_logprobs]
        assert lengths == told, "only what was asked for"
        assert [len(top) for top in output.prompt_top_logprobs] == [count] * (told[2] if count else 0)
        assert all(len(top) == count for top in output.top_logprobs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_all_is_bit_for_bit_that_of_the_request_alone(base: tuple[Path, GPT2LMHeadModel], dtype: torch.dtype) -> None:
    """However the others make the scheduler cut its prompt."""
    if not library().is_file():
        pytest.skip("the kernels are not built")
    folder = base[0]
    adapter = adapter_ref(folder / "base", folder / "adapter")
    requests = [
        request(i, item.prompt_token_ids, adapter if i % 2 else None, **vars(item.sampling_params))
        for i, item in enumerate(work(24))
    ]
    engine = make_engine(folder / "base", dtype=dtype, max_batch_size=6, max_batch_tokens=24)
    mixed = run(engine, requests, per_step=2)
    for item in requests:
        alone, together = run(engine, [item])[item.request_id], mixed[item.request_id]
        for field in ("token_ids", "logprobs", "top_logprobs", "prompt_logprobs", "prompt_top_logprobs"):
            assert getattr(together, field) == getattr(alone, field), f"request {item.request_id}: {field}"
    engine.close()


def test_asking_changes_no_token(engine: Engine) -> None:
    plain = [request(i, item.prompt_token_ids, max_tokens=5, temperature=1.0, seed=i) for i, item in enumerate(work())]
    asking = [
        request(i, item.prompt_token_ids, max_tokens=5, temperature=1.0, seed=i, logprobs=True, prompt_logprobs=True)
        for i, item in enumerate(work())
    ]
    expected, got = run(engine, plain), run(engine, asking)
    assert {key: output.token_ids for key, output in expected.items()} == {
        key: output.token_ids for key, output in got.items()
    }


def test_a_stream_tells_of_new_tokens_only_and_of_the_prompt_once(engine: Engine) -> None:
    whole = run(engine, work())
    streams: dict[str, list[SequenceOutput]] = {}
    for item in work():
        engine.add_request(request(item.request_id, item.prompt_token_ids, stream=True, **vars(item.sampling_params)))
    while engine.has_work:
        for output in engine.step().outputs:
            streams.setdefault(output.request_id, []).append(output)
    for key, outputs in streams.items():
        assert [len(output.token_ids) for output in outputs] == [1] * 5
        for field in ("token_ids", "logprobs", "top_logprobs"):
            parts = [getattr(output, field) for output in outputs]
            assert sum(parts, ()) == getattr(whole[key], field)
            assert len({len(part) for part in parts}) == 1, f"{field} beside each token"
        for field in ("prompt_logprobs", "prompt_top_logprobs"):
            assert getattr(outputs[0], field) == getattr(whole[key], field)
            assert not any(getattr(output, field) for output in outputs[1:])


def test_a_prompt_of_one_token_has_nothing_to_tell(engine: Engine) -> None:
    output = run(engine, [request("a", [3], max_tokens=1, prompt_logprobs=True, logprobs=True)])["a"]
    assert (output.prompt_logprobs, len(output.logprobs)) == ((), 1)


def test_logits_of_a_prompt_are_computed_for_those_that_ask_block_by_block(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, sizes = engine._runner._model, list[int]()
    compute = model.logits

    def logits(hidden: torch.Tensor) -> torch.Tensor:
        sizes.append(len(hidden))
        return compute(hidden)

    monkeypatch.setattr(model, "logits", logits)
    run(engine, [request("a", [1] * 40, max_tokens=2)])
    assert sum(sizes) <= 4, f"{sizes}: only rows that are sampled"
    sizes.clear()
    run(engine, [request("a", [1] * 40, max_tokens=2, prompt_logprobs=True)])
    assert 39 + 2 <= sum(sizes) <= 39 + 4
    assert max(sizes) <= 32


def test_a_sequence_that_ends_early_tells_what_it_knows(toys: Toys) -> None:
    toy = toys(max_batch_tokens=8, max_batch_size=2)
    toy.add("a", prompt=20, prompt_logprobs=True, top_logprobs=1, max_tokens=1)
    toy.engine.step()
    toy.runner.fail = RuntimeError("out of memory")
    output = toy.run()["a"]
    assert (output.finish_reason, output.prompt_logprobs) == (FinishReason.ERROR, ())
