"""One bad adapter among others: finite weights that diverge harm the requests that asked for them, nobody else's."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapters.adapter import alone
from adapters.validation import WEIGHTS_FILE
from kernels.build import library
from server.engine.types import ErrorKind, FinishReason
from tests.oracle import adapter_ref, make_adapter, make_checkpoint, make_engine, make_prompts, request, run


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("isolation")
    make_checkpoint(root / "base", n_layer=2)
    for seed, name in enumerate(("good", "wild")):
        make_adapter(root / "base", root / name, seed=seed, targets=["c_attn", "c_proj", "c_fc"])
    weights = load_file(root / "wild" / WEIGHTS_FILE)
    save_file({k: torch.full_like(v, 3e38) for k, v in weights.items()}, root / "wild" / WEIGHTS_FILE)
    fields = json.loads((root / "wild" / "adapter_config.json").read_text())
    (root / "wild" / "adapter_config.json").write_text(json.dumps(fields | {"lora_alpha": fields["r"]}))
    return {name: root / name for name in ("base", "good", "wild")}


def test_neighbours_in_the_batch_are_not_harmed(folders: dict[str, Path]) -> None:
    good, wild = (adapter_ref(folders["base"], folders[name]) for name in ("good", "wild"))
    prompts = make_prompts(9, seed=1)
    refs = [None, good, wild] * 3
    requests = [request(i, p, r, max_tokens=12) for i, (p, r) in enumerate(zip(prompts, refs, strict=True))]
    expected = run(make_engine(folders["base"]), [item for item in requests if item.adapters != alone(wild)])
    mixed = run(make_engine(folders["base"]), requests, per_step=2)
    for key, output in expected.items():
        assert mixed[key].token_ids == output.token_ids, f"request {key} was harmed by its neighbour"
    for key in ("2", "5", "8"):
        assert mixed[key].finish_reason is FinishReason.ERROR
        assert mixed[key].error_kind is ErrorKind.GENERATION
        assert "adapter 'wild' gave logits that are not finite" in (mixed[key].error or "")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logprobs_and_draws_are_bit_for_bit_those_of_the_request_alone(
    folders: dict[str, Path], dtype: torch.dtype
) -> None:
    """However the others make the scheduler cut its prompt: what our kernels promise, not up to ties."""
    if library() is None:
        pytest.skip("the kernels are not built")
    good = adapter_ref(folders["base"], folders["good"])
    prompts = make_prompts(40, seed=5, longest=50)
    ways = [{}, {"temperature": 1.0, "top_p": 0.95}, {"temperature": 0.8, "top_k": 20, "repetition_penalty": 1.2}]
    requests = [
        request(i, prompt, good if i % 2 else None, max_tokens=10, logprobs=True, seed=i, **ways[i % 3])
        for i, prompt in enumerate(prompts)
    ]
    limits = {"max_batch_size": 6, "max_batch_tokens": 24, "max_model_len": 64}
    engine = make_engine(folders["base"], dtype=dtype, **limits)
    mixed = run(engine, requests, per_step=2)
    for item in requests:
        alone_ = run(engine, [item])[item.request_id]
        together = mixed[item.request_id]
        assert (together.token_ids, together.logprobs) == (alone_.token_ids, alone_.logprobs)


def test_the_next_request_in_the_same_row_is_not_harmed(folders: dict[str, Path]) -> None:
    """A row keeps the old keys and values behind the new sequence's end, where attention masks them."""
    wild = adapter_ref(folders["base"], folders["wild"])
    short, long = make_prompts(2, seed=2)[0][:3], make_prompts(40, seed=3, longest=40)[-1]
    prompts = [request("short", short, max_tokens=20), request("long", [*long, *long][:40], max_tokens=20)]
    expected = run(make_engine(folders["base"], max_batch_size=2), prompts)
    engine = make_engine(folders["base"], max_batch_size=2)
    spoilt = [request(f"wild{i}", [*long, *long][:40], wild, max_tokens=20, ignore_eos=True) for i in range(2)]
    run(engine, spoilt)
    after = run(engine, prompts)
    for key, output in expected.items():
        assert after[key].token_ids == output.token_ids, f"{key} was harmed by what its row held before"
