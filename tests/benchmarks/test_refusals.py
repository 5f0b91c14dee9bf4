"""What fails is not timed, and what can't be run is refused before anything is."""

import importlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch

from adapters.adapter import Adapter, AdapterRef
from benchmarks import peft, prefill, server
from benchmarks.closed_loop import PROMPT, TOKENS, Clients, closed_loop
from benchmarks.common import advance, make_engine, make_model, warm
from server.engine.engine import Engine
from server.engine.types import FinishReason, Request, SamplingParams, SequenceOutput, StepOutput
from server.model.gpt2 import GPT2
from server.model.source import DEMO_MODEL

REF = AdapterRef("digest", "a0", "")


@pytest.fixture(scope="module")
def model() -> GPT2:
    return make_model(DEMO_MODEL, torch.float32)


@pytest.fixture
def engine(model: GPT2) -> Iterator[Engine]:
    """One whose adapters can't be loaded."""

    def load(ref: AdapterRef) -> Adapter:
        raise OSError("no such disk")

    engine = make_engine(model, 4, 64, load=load)
    yield engine
    engine.close()


@pytest.mark.parametrize(
    "run",
    [
        lambda engine: warm(engine, [REF]),
        lambda engine: peft.ours(engine, torch.ones(1, 8, dtype=torch.int64), ["a0"], 2),
        lambda engine: closed_loop(engine, 50257, [REF] * 80),
    ],
    ids=["warm", "peft", "closed loop"],
)
def test_an_adapter_that_fails_ends_the_run_with_its_error(engine: Engine, run: Callable[[Engine], object]) -> None:
    with pytest.raises(RuntimeError, match="no such disk"):
        run(engine)


def test_clients_send_tokens_that_the_model_has(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Request] = []
    monkeypatch.setattr(engine, "add_request", sent.append)
    Clients(engine, 7, seed=0).send(None, 1, prompt=200)
    assert set(sent[0].prompt_token_ids) == set(range(7))


def test_a_client_whose_request_failed_is_not_one_that_ended(engine: Engine) -> None:
    clients = Clients(engine, 50257, seed=0)
    good = SequenceOutput("0", (1,), (), FinishReason.LENGTH)
    assert clients.ended([good, replace(good, request_id="1", finish_reason=None)]) == 1
    with pytest.raises(RuntimeError, match="request '0': out of luck"):
        clients.ended([replace(good, token_ids=(), finish_reason=FinishReason.ERROR, error="out of luck")])


def test_a_first_token_that_is_an_error_has_no_time(model: GPT2, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Engine.step

    def step(engine: Engine) -> StepOutput:
        done = real(engine)
        return replace(done, outputs=tuple(replace(o, error="generation failed: it broke") for o in done.outputs))

    assert prefill.first_token(model, 16, 0, 128)[0] > 0
    monkeypatch.setattr(Engine, "step", step)
    with pytest.raises(RuntimeError, match="generation failed: it broke"):
        prefill.first_token(model, 16, 0, 128)
    engine = make_engine(model, server.STREAMS, server.LENGTH)
    with pytest.raises(RuntimeError, match="generation failed: it broke"):
        server.alone(engine)
    engine.add_request(Request("one", (1,), SamplingParams(max_tokens=1)))
    with pytest.raises(RuntimeError, match="it broke"):
        advance(engine)
    engine.close()


def test_a_prompt_is_timed_on_an_engine_that_has_answered(model: GPT2, monkeypatch: pytest.MonkeyPatch) -> None:
    real, idle = Engine.add_request, list[tuple[str, bool]]()

    def add(engine: Engine, request: Request) -> None:
        idle.append((request.request_id, not engine.has_work))
        real(engine, request)

    monkeypatch.setattr(Engine, "add_request", add)
    prefill.first_token(model, 16, 0, 128)
    assert idle == [("warm", True), ("prompt", True)]


def test_an_engine_longer_than_its_model_is_refused(model: GPT2) -> None:
    with pytest.raises(ValueError, match="max_len 257 exceeds the model's 256 positions"):
        prefill.first_token(model, 256, 0, 128)
    assert model.config.n_positions >= PROMPT + TOKENS


DEMO = ["--model", str(DEMO_MODEL)]
COUNT = "expected an integer of at least 1"


@pytest.mark.parametrize(
    ("name", "flags", "said"),
    [
        ("prefill", DEMO, f"--prompt 896: that takes 897 positions, --model {DEMO_MODEL} has 256"),
        ("prefill", ["--prompt", "1024"], "--prompt 1024: that takes 1025 positions, gpt2-medium has 1024"),
        ("prefill", ["--model", "none"], "--model: none/config.json can't be read"),
        (
            "decode",
            [*DEMO, "--steps", "300"],
            "--steps 300 with --batch 1 and prompts of 32 tokens: that takes 336 pos",
        ),
        ("decode", ["--steps", "0"], f"--steps: '0', {COUNT}"),
        ("decode", ["--batch", "8", "-1"], f"--batch: '-1', {COUNT}"),
        ("llamacpp", ["--prompt", "1000"], "--steps 16 with --batch 1 and prompts of 1000 tokens"),
        ("adapters", ["--repeats", "0"], f"--repeats: '0', {COUNT}"),
        ("adapters", ["--requests", "2"], "--requests: 2, expected at least 32"),
        ("adapters", ["--registered", "none"], f"--registered: 'none', {COUNT}"),
        ("peft", ["--adapters", "33"], "--adapters: 33, expected at most 32"),
        ("sampler", ["--repeats", "0"], f"--repeats: '0', {COUNT}"),
        ("server", ["--repeats", "x"], f"--repeats: 'x', {COUNT}"),
    ],
)
def test_flags_are_refused_by_name(
    name: str, flags: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [name, *flags])
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module(f"benchmarks.{name}").main()
    assert stopped.value.code == 2
    assert f"error: argument {said}" in capsys.readouterr().err
