"""The engine's tokens and logits equal transformers' and PEFT's, alone and in any mix."""

from pathlib import Path

import pytest
import torch

from kernels.build import library
from server.engine.types import FinishReason
from tests import oracle
from tests.oracle import (
    EOS,
    TOKEN_BYTES,
    adapter_ref,
    assert_same_tokens,
    make_adapter,
    make_checkpoint,
    make_engine,
    make_prompts,
    peft_model,
    request,
    run,
)

SHAPES = {
    "plain": {},
    "one-head-deep": {"n_embd": 24, "n_head": 1, "n_layer": 5},
    "odd-inner-relu": {"n_inner": 50, "activation_function": "relu"},
    "inverse-layer-scale": {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True},
    "unscaled-gelu-eps": {"scale_attn_weights": False, "activation_function": "gelu", "layer_norm_epsilon": 1e-3},
    "silu-wide": {"activation_function": "silu", "n_embd": 48, "n_head": 6, "n_layer": 2},
}
ADAPTERS: dict[str, dict] = {
    "attn": {"targets": ["c_attn"], "rank": 1},
    "bare-proj": {"targets": ["c_proj"], "rank": 2},
    "attn-proj": {"targets": ["attn.c_proj"], "rank": 3},
    "mlp-proj": {"targets": ["mlp.c_proj"], "rank": 8},
    "fc": {"targets": ["c_fc"], "rank": 16},
    "all-r64": {"targets": ["c_attn", "c_proj", "c_fc"], "rank": 64},
    "rslora": {"targets": ["c_attn", "c_fc"], "rank": 8, "use_rslora": True},
    "patterns": {
        "targets": ["c_attn", "c_proj", "c_fc"],
        "rank": 4,
        "rank_pattern": {"c_attn": 6, "h.1.mlp.c_proj": 2, "^transformer.h.0.attn.c_proj": 5},
        "alpha_pattern": {"c_fc": 32, "attn.c_proj": 3},
    },
    "some-layers": {"targets": ["c_attn", "c_proj"], "rank": 4, "layers_to_transform": [0, 2], "layers_pattern": "h"},
    "one-layer": {"targets": ["c_fc"], "rank": 4, "layers_to_transform": 1},
    "regex": {"targets": r".*h\.[01]\.(attn\.c_attn|mlp\.c_proj)", "rank": 4},
    "excluded": {"targets": ["c_attn", "c_proj"], "rank": 4, "exclude_modules": ["mlp.c_proj"]},
    "all-linear": {"targets": "all-linear", "rank": 2},
}


@pytest.fixture(autouse=True, params=["kernels", "torch"])
def _backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything holds with our kernels and with torch alone."""
    if request.param == "kernels" and not library().is_file():
        pytest.skip("no C++ compiler built the kernels")
    monkeypatch.setattr(oracle, "KERNELS", "auto" if request.param == "kernels" else "off")


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Path]]:
    """One checkpoint and an adapter of every kind."""
    root = tmp_path_factory.mktemp("zoo")
    make_checkpoint(root / "base", n_layer=3)
    for i, (name, fields) in enumerate(ADAPTERS.items()):
        make_adapter(root / "base", root / name, seed=i, **fields)
    return root / "base", {name: root / name for name in ADAPTERS}


@pytest.mark.parametrize("shape", SHAPES)
def test_base_generates_what_transformers_generates(shape: str, tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path, **SHAPES[shape])
    prompts = make_prompts(12, seed=3)
    outputs = run(make_engine(tmp_path), [request(i, p, max_tokens=30) for i, p in enumerate(prompts)], per_step=2)
    for i, prompt in enumerate(prompts):
        expected = model.generate(torch.tensor([prompt]), max_new_tokens=30, do_sample=False, pad_token_id=EOS)
        assert_same_tokens(model, prompt, outputs[str(i)].token_ids, expected[0, len(prompt) :].tolist(), f"prompt {i}")


def test_logprobs_are_those_of_transformers(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path)
    prompt = make_prompts(1, seed=5)[0]
    output = run(make_engine(tmp_path), [request("a", prompt, max_tokens=20, logprobs=True)])["a"]
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *output.token_ids]])).logits[0, len(prompt) - 1 : -1]
    expected = logits.log_softmax(-1).gather(1, torch.tensor(output.token_ids)[:, None])[:, 0]
    assert torch.tensor(output.logprobs).allclose(expected, atol=1e-4)


@pytest.mark.parametrize("chunk", [8, 13, 512])
def test_a_prompt_in_chunks_gives_the_same_tokens(tmp_path: Path, chunk: int) -> None:
    model = make_checkpoint(tmp_path)
    prompts = make_prompts(6, seed=9, longest=40)
    engine = make_engine(tmp_path, max_batch_tokens=chunk)
    outputs = run(engine, [request(i, p, max_tokens=16) for i, p in enumerate(prompts)], per_step=2)
    for i, prompt in enumerate(prompts):
        expected = model.generate(torch.tensor([prompt]), max_new_tokens=16, do_sample=False, pad_token_id=EOS)
        assert_same_tokens(model, prompt, outputs[str(i)].token_ids, expected[0, len(prompt) :].tolist(), f"prompt {i}")


@pytest.mark.parametrize("name", ADAPTERS)
def test_one_adapter_generates_what_peft_generates(zoo: tuple[Path, dict[str, Path]], name: str) -> None:
    base, folders = zoo
    model = peft_model(base, {name: folders[name]})
    ref = adapter_ref(base, folders[name])
    prompts = make_prompts(4, seed=11)
    requests = [request(i, p, ref, max_tokens=24, logprobs=True) for i, p in enumerate(prompts)]
    outputs = run(make_engine(base), requests)
    plain = run(make_engine(base), [request(i, p, max_tokens=24) for i, p in enumerate(prompts)])
    assert any(outputs[k].token_ids != plain[k].token_ids for k in plain), "the adapter changes nothing: a vain test"
    for i, prompt in enumerate(prompts):
        got = outputs[str(i)]
        expected = model.generate(
            input_ids=torch.tensor([prompt]), max_new_tokens=24, do_sample=False, pad_token_id=EOS
        )
        if assert_same_tokens(model, prompt, got.token_ids, expected[0, len(prompt) :].tolist(), f"{name} {i}"):
            continue
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[*prompt, *got.token_ids]])).logits[0, len(prompt) - 1 : -1]
        logprobs = logits.log_softmax(-1).gather(1, torch.tensor(got.token_ids)[:, None])[:, 0]
        assert torch.tensor(got.logprobs).allclose(logprobs, atol=2e-4)


def test_a_mixed_batch_equals_pefts_mixed_batch(zoo: tuple[Path, dict[str, Path]]) -> None:
    base, folders = zoo
    model = peft_model(base, folders)
    names = [*folders, "__base__", "__base__", *list(folders)[:3]]
    prompts = [p[:6] for p in make_prompts(60, seed=13) if len(p) >= 6][: len(names)]  # one length: no padding
    assert len(prompts) == len(names)
    refs = {name: adapter_ref(base, folder) for name, folder in folders.items()}
    requests = [request(i, p, refs.get(n), max_tokens=20) for i, (p, n) in enumerate(zip(prompts, names, strict=True))]
    outputs = run(make_engine(base, max_batch_size=len(names)), requests)
    expected = model.generate(
        input_ids=torch.tensor(prompts),
        attention_mask=torch.ones(len(prompts), 6, dtype=torch.long),
        adapter_names=names,
        max_new_tokens=20,
        do_sample=False,
        pad_token_id=EOS,
    )
    for i, name in enumerate(names):
        tokens = expected[i, 6:].tolist()
        tokens = tokens[: tokens.index(EOS) + 1] if EOS in tokens else tokens
        if name != "__base__":
            model.set_adapter(name)
            assert_same_tokens(model, prompts[i], outputs[str(i)].token_ids, tokens, f"row {i}, {name}")
        else:
            with model.disable_adapter():
                assert_same_tokens(model, prompts[i], outputs[str(i)].token_ids, tokens, f"row {i}, base")


def test_a_request_gives_the_same_tokens_alone_and_in_any_mix(zoo: tuple[Path, dict[str, Path]]) -> None:
    """1,000 requests, greedy and sampled, over all adapters, joining and leaving a batch of 8 between steps."""
    base, folders = zoo
    refs = [None, *(adapter_ref(base, folder) for folder in folders.values())]
    models = {ref.digest: peft_model(base, {ref.name: folders[ref.name]}) for ref in refs if ref}
    models[""] = peft_model(base, {})
    requests = []
    for i, prompt in enumerate(make_prompts(1000, seed=17, longest=12)):
        sampled = {"temperature": 0.9, "seed": i, "top_p": 0.9 if i % 4 == 1 else 1.0, "top_k": 20 if i % 6 == 1 else 0}
        requests.append(request(i, prompt, refs[i % len(refs)], max_tokens=3 + i % 9, **(sampled if i % 2 else {})))
    mixed = run(make_engine(base), requests, per_step=3)
    engine = make_engine(base, max_batch_size=1)
    excused = 0
    for item in requests:
        alone = run(engine, [item])[item.request_id].token_ids
        model = models[item.adapters[0].ref.digest if item.adapters else ""]
        if item.sampling_params.temperature == 0:
            excused += assert_same_tokens(
                model, item.prompt_token_ids, mixed[item.request_id].token_ids, alone, item.request_id
            )
        else:
            assert mixed[item.request_id].token_ids == alone, f"sampled request {item.request_id} depends on the mix"
    assert excused <= 2, f"{excused} of 1000 requests needed the excuse of a tie"


def test_every_way_to_end(tmp_path: Path) -> None:
    make_checkpoint(tmp_path)
    engine = make_engine(tmp_path)
    prompt = [1, 2, 3]
    full = run(engine, [request("long", prompt, max_tokens=61, ignore_eos=True)])["long"]
    assert full.finish_reason is FinishReason.LENGTH
    assert len(full.token_ids) == 61, "a row holds max_model_len tokens, and all of them are used"
    text = b"".join(TOKEN_BYTES[t] for t in full.token_ids)
    stop = text[7:12]  # straddles tokens of one to three bytes
    stopped = run(engine, [request("stop", prompt, max_tokens=61, ignore_eos=True, stop=(b"#never#", stop))])["stop"]
    assert stopped.finish_reason is FinishReason.STOP
    assert stopped.stop_offset == text.find(stop)
