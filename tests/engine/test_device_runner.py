"""The GPU's runner against the CPU's, token for token: Triton's kernels through its interpreter where there is no GPU.

A captured graph replays what was launched when it was captured. The fake does the same: it runs the first work it was
given under a key, so that a value of one step that had crept into the work would show in the next.
"""

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from adapters.adapter import WeightedAdapter
from adapters.slots import SlotTable
from server.engine import cuda_graph
from server.engine.cuda_graph import Graphs, Work, buckets
from server.engine.engine import Engine
from server.engine.types import FinishReason, Request, SequenceOutput
from server.model import loader
from server.model.triton_backend import TritonBackend
from tests.interpreter import quicken
from tests.oracle import adapter_ref, make_adapter, make_checkpoint, make_engine, make_prompts, request, run

quicken()

CUDA = torch.cuda.is_available()
TARGETS = {"a": ["c_attn"], "b": ["c_attn", "c_proj", "c_fc"], "c": ["attn.c_proj"]}
RANKS = {"a": 2, "b": 8, "c": 20}


class FakeCapture:
    """Counts what is captured and replays it by running it."""

    def __init__(self, device: torch.device) -> None:
        self.captured = 0

    def __call__(self, work: Work) -> Work:
        self.captured += 1
        work()
        return work


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("device")
    make_checkpoint(root / "base", n_layer=2)
    for seed, (name, targets) in enumerate(TARGETS.items()):
        make_adapter(root / "base", root / name, seed, targets, rank=RANKS[name])
    return {name: root / name for name in ("base", *TARGETS)}


def requests(folders: dict[str, Path]) -> list[Request]:
    """Adapters of several projections and ranks, some composed; greedy, and sampled with all that sampling has."""
    rng = random.Random(0)
    a, b, c = (adapter_ref(folders["base"], folders[name]) for name in TARGETS)
    refs = [
        None,
        a,
        b,
        c,
        *(tuple(map(WeightedAdapter, *mix)) for mix in (((a, c), (0.6, -0.8)), ((c, b, a), (1, 0.2, 0.5)))),
    ]
    ways = (
        {},
        {"temperature": 0.8, "top_p": 0.8, "logprobs": True},
        {"temperature": 1.2, "top_k": 5, "repetition_penalty": 1.4},
        {"repetition_penalty": 1.3, "logprobs": True},
        {"logprobs": True, "top_logprobs": 3, "prompt_logprobs": True},
        {
            "frequency_penalty": 1.5,
            "logit_bias": ((3, 2.0), (5, -9.0)),
            "repetition_penalty": 1.2,
            "prompt_logprobs": True,
        },
        {"temperature": 1.1, "typical_p": 0.7, "top_k": 40, "logprobs": True, "top_logprobs": 2, "min_tokens": 3},
    )
    return [
        request(i, prompt, refs[i % len(refs)], max_tokens=rng.randrange(1, 7), seed=i, **ways[i // 2 % len(ways)])
        for i, prompt in enumerate(make_prompts(15, seed=4, longest=14))
    ]


Truth = Callable[[list[Request]], dict[str, SequenceOutput]]


@pytest.fixture(scope="module")
def truth(folders: dict[str, Path]) -> Iterator[Truth]:
    """What the CPU's engine says, made before the other one's kernels are put in its place."""
    engine = make_engine(folders["base"], max_batch_size=3, max_model_len=40)
    assert engine.backend != "triton"
    yield lambda work: run(engine, work)
    engine.close()


@pytest.fixture
def device_engine(folders: dict[str, Path], truth: Truth, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    monkeypatch.setattr(loader, "choose_backend", lambda *_: TritonBackend())
    if not CUDA:
        monkeypatch.setattr(cuda_graph, "CudaCapture", FakeCapture)
    engine = make_engine(
        folders["base"], device="cuda" if CUDA else "cpu", max_batch_size=3, max_model_len=40, max_batch_tokens=12
    )
    assert engine.backend == "triton"
    yield engine
    engine.close()


def test_tokens_and_logprobs_are_those_of_the_cpu(
    device_engine: Engine, folders: dict[str, Path], truth: Truth
) -> None:
    work = requests(folders)
    expected = truth(work)
    outputs = run(device_engine, work, per_step=2)
    assert outputs.keys() == expected.keys()
    for key, output in expected.items():
        assert outputs[key].token_ids == output.token_ids, f"request {key}"
        assert outputs[key].finish_reason is output.finish_reason
        assert outputs[key].logprobs == pytest.approx(output.logprobs, abs=1e-4)
        assert outputs[key].prompt_logprobs == pytest.approx(output.prompt_logprobs, abs=1e-4)
        for field in ("top_logprobs", "prompt_top_logprobs"):
            for got, told in zip(getattr(outputs[key], field), getattr(output, field), strict=True):
                assert [token for token, _ in got] == [token for token, _ in told]
                assert [logprob for _, logprob in got] == pytest.approx([logprob for _, logprob in told], abs=1e-4)
    device_engine.check_integrity()


def test_a_slot_that_changes_hands_means_its_new_adapter(
    device_engine: Engine, folders: dict[str, Path], truth: Truth, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one slot for adapters, each replaces the last one in the same slot, and under the same graph."""
    residency = device_engine._residency
    monkeypatch.setattr(residency._residents, "_slots", SlotTable(2))
    for name in ("a", "c", "a", "c"):
        work = [request(name, [3, 5, 7], adapter_ref(folders["base"], folders[name]), max_tokens=4)]
        assert run(device_engine, work)[name].token_ids == truth(work)[name].token_ids
        assert residency.resident == 1


@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # numpy's, of the interpreter
def test_an_adapter_that_diverges_is_told_and_harms_nobody(
    device_engine: Engine, folders: dict[str, Path], truth: Truth
) -> None:
    ref = adapter_ref(folders["base"], folders["b"])
    run(device_engine, [request("warm", [1], ref, max_tokens=1)])
    device_engine._residency.arena.memory.fill_(torch.inf)
    good = request("good", [1, 2], max_tokens=4)
    outputs = run(device_engine, [request("bad", [1, 2], ref, max_tokens=4), good])
    assert outputs["bad"].finish_reason is FinishReason.ERROR
    assert "not finite" in (outputs["bad"].error or "")
    assert outputs["good"].token_ids == truth([good])["good"].token_ids


def test_work_is_captured_once_for_each_key_and_replayed() -> None:
    capture, ran = FakeCapture(torch.device("cpu")), list[str]()
    graphs = Graphs(capture)
    for key in ("x", "y", "x", "x"):
        graphs.run(key, lambda key=key: ran.append(key))
    assert (capture.captured, len(graphs)) == (2, 2)
    assert ran == ["x", "x", "y", "y", "x", "x"], "recorded and replayed, then only replayed"


@pytest.mark.parametrize("largest", [1, 2, 3, 8, 32, 33, 64, 100, 256, 300, 1024])
def test_a_bucket_holds_every_batch_with_little_padding(largest: int) -> None:
    sizes = buckets(largest)
    assert sizes == sorted(set(sizes))
    assert len(sizes) < 30
    for batch in range(1, largest + 1):
        size = next(size for size in sizes if size >= batch)
        assert size <= max(8, 2 * batch, batch + 7 + batch // 2)
