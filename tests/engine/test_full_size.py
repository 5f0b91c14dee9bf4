"""At gpt2-medium's full size in fp32: the engine's greedy tokens are those of PEFT's mixed batch."""

from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from tests.oracle import adapter_ref, assert_same_tokens, make_adapter, make_engine, peft_model, request, run

pytestmark = pytest.mark.slow
SIZES = {"n_embd": 1024, "n_layer": 24, "n_head": 16, "n_positions": 1024, "vocab_size": 50257}
ADAPTERS, TOKENS = 4, 12


def test_tokens_are_those_of_pefts_mixed_batch(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = tmp_path / "base"
    # initializer_range makes logits of a trained model's spread, so that a tie is an accident.
    GPT2LMHeadModel(
        GPT2Config(**SIZES, initializer_range=0.06, bos_token_id=50256, eos_token_id=50256)
    ).save_pretrained(base)
    folders = {f"a{i}": tmp_path / f"a{i}" for i in range(ADAPTERS)}
    for i, folder in enumerate(folders.values()):
        make_adapter(base, folder, seed=i, targets=["c_attn", "c_proj", "c_fc"], rank=8 * (i + 1), size=0.1)
    names = [*folders, "__base__"]
    prompts = torch.randint(0, 50256, (len(names), 24)).tolist()
    refs = [adapter_ref(base, folders[name]) if name in folders else None for name in names]
    engine = make_engine(base, max_model_len=64)
    requests = [request(i, p, r, max_tokens=TOKENS) for i, (p, r) in enumerate(zip(prompts, refs, strict=True))]
    mixed = run(engine, requests)
    for item in requests:
        assert run(engine, [item])[item.request_id].token_ids == mixed[item.request_id].token_ids, "alone or in a mix"
    model = peft_model(base, folders)
    expected = model.generate(
        input_ids=torch.tensor(prompts), attention_mask=torch.ones(len(names), 24, dtype=torch.long),
        adapter_names=names, do_sample=False, max_new_tokens=TOKENS, pad_token_id=50256,
    )[:, 24:].tolist()  # fmt: skip
    assert len({tuple(tokens) for tokens in expected}) == len(names)
    for i, name in enumerate(names):
        tokens = expected[i][: len(mixed[str(i)].token_ids)]
        if name == "__base__":
            model.disable_adapter_layers()
        else:
            model.set_adapter(name)
        assert_same_tokens(model, prompts[i], mixed[str(i)].token_ids, tokens, name)
