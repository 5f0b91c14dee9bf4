"""A tiny GPT-2 with the demo base's tokenizer, and a small file of quotes."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from training.base import Base, open_base
from training.config import DEMO_BASE

WORDS = "the sea a man wife love hope time never always finds keeps loses wants and or but of in with".split()


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint directory: 2 layers, width 32, 64 positions, random weights."""
    folder = tmp_path_factory.mktemp("tiny-base")
    torch.manual_seed(0)
    config = GPT2Config(n_positions=64, n_embd=32, n_layer=2, n_head=2, bos_token_id=50256, eos_token_id=50256)
    GPT2LMHeadModel(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO_BASE / name, folder)
    return folder


@pytest.fixture(scope="session")
def base(tiny_base: Path) -> Base:
    """The same, opened for training."""
    return open_base(str(tiny_base))


@pytest.fixture(scope="session")
def quotes_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """80 different quotes by four authors."""
    rng = random.Random(0)
    file = tmp_path_factory.mktemp("data") / "quotes.jsonl"
    rows = [
        {"author": f"Author {i % 4}", "quote": " ".join(rng.choices(WORDS, k=8)) + f" {i}.", "tags": [f"t{i % 2}"]}
        for i in range(80)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file
