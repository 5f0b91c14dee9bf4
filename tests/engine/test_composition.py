"""Several weighted adapters in one request: equal to PEFT's `cat`, alone and beside rows of every other kind."""

from itertools import combinations
from pathlib import Path

import pytest
import torch

from adapters.adapter import WeightedAdapter, alone
from kernels.build import library
from server.engine.types import Request
from tests import oracle
from tests.oracle import (
    EOS,
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

Folders = tuple[Path, dict[str, Path]]
ADAPTERS: dict[str, dict] = {
    "attn": {"targets": ["c_attn"], "rank": 3},
    "all": {"targets": ["c_attn", "c_proj", "c_fc"], "rank": 8},
    "rslora": {"targets": ["attn.c_proj", "c_fc"], "rank": 5, "use_rslora": True},
    "some-layers": {
        "targets": ["c_attn", "mlp.c_proj"],
        "rank": 16,
        "layers_to_transform": [0, 2],
        "layers_pattern": "h",
    },
}
MIXES: list[dict[str, float]] = [
    {"attn": 0.7, "all": 0.3},
    {"all": 1.0, "rslora": 1.0},
    {"rslora": -0.6, "attn": 1.5},
    {"attn": 0.5, "all": 0.25, "rslora": -0.4},
    {"all": 0.4, "rslora": 0.9, "some-layers": 0.8},
    {"all": -1.0},
]


@pytest.fixture(autouse=True, params=["kernels", "torch"])
def _backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything holds with our kernels and with torch alone."""
    if request.param == "kernels" and not library().is_file():
        pytest.skip("no C++ compiler built the kernels")
    monkeypatch.setattr(oracle, "KERNELS", "auto" if request.param == "kernels" else "off")


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    root = tmp_path_factory.mktemp("compose")
    make_checkpoint(root / "base", n_layer=3)
    for i, (name, fields) in enumerate(ADAPTERS.items()):
        make_adapter(root / "base", root / name, seed=20 + i, **fields)
    return root / "base", {name: root / name for name in ADAPTERS}


def composed(zoo: Folders, mix: dict[str, float]) -> tuple[WeightedAdapter, ...]:
    base, folders = zoo
    return tuple(WeightedAdapter(adapter_ref(base, folders[name]), weight) for name, weight in mix.items())


def pefts(zoo: Folders, mix: dict[str, float]) -> torch.nn.Module:
    """PEFT's model with what `add_weighted_adapter` makes of a mix.

    It takes rsLoRA and the layers from the first one's config, so that one has to be plain, and needs one of them on
    every module of the union: the mixes are chosen so.
    """
    base, folders = zoo
    mix = {name: mix[name] for name in ADAPTERS if name in mix}
    model = peft_model(base, {name: folders[name] for name in mix})
    if mix:
        model.add_weighted_adapter(list(mix), list(mix.values()), "mix", combination_type="cat")
        model.set_adapter("mix")
    return model.eval()


def test_a_mixed_batch_has_pefts_tokens_and_logprobs(zoo: Folders) -> None:
    """Composed rows, rows of one adapter and the base's, joining and leaving between steps."""
    mixes = [*MIXES, {}, {"all": 1.0}, {}]
    prompts = make_prompts(2 * len(mixes), seed=31)
    requests = [
        request(i, prompt, composed(zoo, mixes[i % len(mixes)]), max_tokens=20, logprobs=True)
        for i, prompt in enumerate(prompts)
    ]
    outputs = run(make_engine(zoo[0], max_batch_size=7), requests, per_step=2)
    for m, mix in enumerate(mixes):
        model = pefts(zoo, mix)
        for i in range(m, len(prompts), len(mixes)):
            prompt, got = prompts[i], outputs[str(i)]
            full = model.generate(
                input_ids=torch.tensor([prompt]), max_new_tokens=20, do_sample=False, pad_token_id=EOS
            )[0]
            assert_same_tokens(model, prompt, got.token_ids, full[len(prompt) :].tolist(), f"{mix}, prompt {i}")
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([[*prompt, *got.token_ids]])).logits[0, len(prompt) - 1 : -1]
            logprobs = logits.log_softmax(-1).gather(1, torch.tensor(got.token_ids)[:, None])[:, 0]
            assert torch.tensor(got.logprobs).allclose(logprobs, atol=2e-4), mix


def test_a_composed_request_gives_the_same_tokens_alone_and_in_any_mix(zoo: Folders) -> None:
    kinds = [
        {},
        *MIXES,
        {"attn": 1.0},
        {"all": 1.0},
        *({a: 0.8, b: -0.3} for a, b in combinations(list(ADAPTERS)[:3], 2)),
    ]
    requests: list[Request] = []
    for i, prompt in enumerate(make_prompts(200, seed=33, longest=12)):
        how = {"temperature": 0.9, "seed": i} if i % 2 else {}
        requests.append(request(i, prompt, composed(zoo, kinds[i % len(kinds)]), max_tokens=3 + i % 9, **how))
    mixed = run(make_engine(zoo[0]), requests, per_step=3)
    engine = make_engine(zoo[0], max_batch_size=1)
    models = {i: pefts(zoo, mix) for i, mix in enumerate(kinds)}
    for i, item in enumerate(requests):
        one = run(engine, [item])[item.request_id].token_ids
        assert_same_tokens(models[i % len(kinds)], item.prompt_token_ids, mixed[str(i)].token_ids, one, f"request {i}")


def test_the_order_in_which_a_request_names_them_does_not_matter(zoo: Folders) -> None:
    mix = composed(zoo, MIXES[4])
    engine = make_engine(zoo[0])
    answers = [run(engine, [request("r", [1, 2, 3], order, max_tokens=30)])["r"] for order in (mix, mix[::-1])]
    assert answers[0].token_ids == answers[1].token_ids


def test_one_adapter_of_weight_one_is_that_adapter(zoo: Folders) -> None:
    ref = adapter_ref(zoo[0], zoo[1]["all"])
    engine = make_engine(zoo[0])
    plain, doubled = (
        run(engine, [request("r", [5, 6], adapters, max_tokens=30, logprobs=True)])["r"]
        for adapters in (alone(ref), (WeightedAdapter(ref, 2.0),))
    )
    assert plain.logprobs != doubled.logprobs, "the weight has an effect"
