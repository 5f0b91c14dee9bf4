"""The embedded demo base is what its card says: these files, this size, GPT-2's tokenizer, readable by both sides."""

import hashlib
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, GPT2LMHeadModel

from server.model.gpt2 import ForwardBatch, PromptChunk
from server.model.loader import load_model

DEMO = Path(__file__).resolve().parents[2] / "models" / "demo"
SUMS = "SHA256SUMS"


def test_files_are_the_recorded_ones() -> None:
    recorded = {name: digest for digest, name in (line.split() for line in (DEMO / SUMS).read_text().splitlines())}
    found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in DEMO.iterdir() if path.name != SUMS}
    assert found == recorded, f"after a change on purpose: cd models/demo && sha256sum $(ls | grep -v {SUMS}) > {SUMS}"


def test_the_card_names_the_weights() -> None:
    digest = hashlib.sha256((DEMO / "model.safetensors").read_bytes()).hexdigest()
    assert digest in (DEMO / "README.md").read_text()


def test_it_is_small() -> None:
    assert sum(path.stat().st_size for path in DEMO.iterdir()) <= 40e6


def test_its_tokenizer_is_gpt2s() -> None:
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    assert len(tokenizer) == 50_257
    assert tokenizer.eos_token_id == 50_256
    assert tokenizer.eos_token == "<|endoftext|>"
    # OpenAI's own ids.
    assert tokenizer.encode("Hello world, it's 1984!\n") == [15496, 995, 11, 340, 338, 12844, 0, 198]
    text = "Naïve café — 東京 🦜\t  end"
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("prompt", ["Quote by Oscar Wilde:", "It is a truth universally acknowledged, that"])
def test_our_loader_gives_the_logits_of_transformers(prompt: str) -> None:
    ids = AutoTokenizer.from_pretrained(DEMO)(prompt, return_tensors="pt").input_ids[0]  # [N]
    theirs = GPT2LMHeadModel.from_pretrained(DEMO, dtype=torch.float32).eval()
    assert theirs.config.eos_token_id == 50_256
    with torch.no_grad():
        want = theirs(ids[None]).logits[0]  # [N, V]

    ours = load_model(DEMO, torch.device("cpu"), torch.float32)
    c, n = ours.config, len(ids)
    cache = torch.zeros(2, c.n_layer, 1, c.n_head, n, c.head_dim)
    batch = ForwardBatch(
        token_ids=ids,
        positions=torch.arange(n),
        rows=torch.zeros(n, dtype=torch.int64),
        num_decode=0,
        decode_rows=None,
        max_decode_len=0,
        chunks=(PromptChunk(start=0, length=n, row=0, context=0),),
        output_index=torch.arange(n),
    )
    got = ours.forward(batch, cache[0], cache[1], lora=None)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
