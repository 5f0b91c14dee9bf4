"""`config.json`: what changes the forward pass is honoured or refused by name."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config as TheirConfig
from transformers.activations import ACT2FN

from server.model.backend import torch_activation
from server.model.config import ACTIVATIONS, GPT2Config, ModelError

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another model": ({"model_type": "llama"}, "model_type is 'llama'; only gpt2"),
    "untied": ({"tie_word_embeddings": False}, "tie_word_embeddings is False"),
    "cross attention": ({"add_cross_attention": True}, "add_cross_attention is True"),
    "pruned": ({"pruned_heads": {"0": [1]}}, "pruned_heads is {'0': .1.}"),
    "quantised": ({"quantization_config": {"bits": 4}}, "quantization_config is {'bits': 4}"),
    "width is text": ({"n_embd": "768"}, "n_embd is '768' in config.json; expected a positive integer"),
    "no layers": ({"n_layer": 0}, "n_layer is 0"),
    "layers are true": ({"n_layer": True}, "n_layer is True"),
    "half a head": ({"n_head": 7}, "n_embd 768 is not a multiple of n_head 7"),
    "inner is negative": ({"n_inner": -1}, "n_inner is -1"),
    "no vocabulary": ({"vocab_size": None}, "vocab_size is None"),
    "unknown activation": ({"activation_function": "mish"}, "activation_function is 'mish' .*supported: gelu_new"),
    "activation is a list": ({"activation_function": ["relu"]}, "activation_function is"),
    "epsilon zero": ({"layer_norm_epsilon": 0}, "layer_norm_epsilon is 0"),
    "epsilon is text": ({"layer_norm_epsilon": "1e-5"}, "layer_norm_epsilon is '1e-5'"),
    "epsilon is NaN": ({"layer_norm_epsilon": float("nan")}, "layer_norm_epsilon is nan"),
    "epsilon is infinite": ({"layer_norm_epsilon": float("inf")}, "layer_norm_epsilon is inf"),
    "scaling is text": ({"scale_attn_weights": "yes"}, "scale_attn_weights is 'yes' .*expected true or false"),
    "layer scaling": ({"scale_attn_by_inverse_layer_idx": None}, "scale_attn_by_inverse_layer_idx is None"),
    "upcast": ({"reorder_and_upcast_attn": 1}, "reorder_and_upcast_attn is 1"),
    "several ends": ({"eos_token_id": [1, 2]}, r"eos_token_id is \[1, 2\]"),
    "dtype": ({"dtype": "float64"}, "dtype is 'float64'"),
    "old name of dtype": ({"torch_dtype": "int8"}, "dtype is 'int8'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_honoured_is_refused_by_name(case: str) -> None:
    fields, message = REFUSED[case]
    with pytest.raises(ModelError, match=message):
        GPT2Config.parse(fields)


def test_defaults_are_those_of_transformers() -> None:
    ours, theirs = GPT2Config.parse({}), TheirConfig()
    for field in vars(ours):
        if field not in ("n_inner", "dtype"):
            assert getattr(ours, field) == getattr(theirs, field), field
    assert ours.n_inner == 4 * theirs.n_embd
    assert ours.dtype == "float32"


def test_what_transformers_saves_is_read_back(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    theirs = TheirConfig(
        vocab_size=77, n_positions=12, n_embd=24, n_layer=5, n_head=3, n_inner=50, activation_function="relu",
        layer_norm_epsilon=1e-3, scale_attn_weights=False, scale_attn_by_inverse_layer_idx=True,
        reorder_and_upcast_attn=True, eos_token_id=7, bos_token_id=7, dtype="bfloat16",
    )  # fmt: skip
    theirs.save_pretrained(tmp_path)
    ours = GPT2Config.read(tmp_path)
    for field in vars(ours):
        if field != "dtype":
            assert getattr(ours, field) == getattr(theirs, field), field
    assert ours.dtype == "bfloat16"
    assert (ours.head_dim, ours.adapter_shape.n_inner) == (8, 50)
    assert not caplog.records, "nothing in it is unknown"


def test_old_and_null_spellings_are_read() -> None:
    assert GPT2Config.parse({"torch_dtype": "torch.float16"}).dtype == "float16"
    assert GPT2Config.parse({"n_inner": None, "n_embd": 24}).n_inner == 96
    assert GPT2Config.parse({"eos_token_id": None}).eos_token_id is None
    assert GPT2Config.parse({"quantization_config": None, "pruned_heads": {}}).n_layer == 12


def test_an_unknown_field_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "server.model.config"):
        GPT2Config.parse({"rope_theta": 1, "architectures": ["GPT2LMHeadModel"]})
    assert "does not know; not used: rope_theta" in caplog.text
    assert "architectures" not in caplog.text


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "not valid JSON"), ("[]", "holds list, expected an object"), (None, "not a model dir")],
)
def test_a_file_that_is_no_configuration_is_refused(content: str | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ModelError, match=message):
        GPT2Config.read(tmp_path)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_activation_is_what_transformers_has_under_its_name(name: str) -> None:
    x = torch.linspace(-8, 8, 2001)
    torch.testing.assert_close(torch_activation(name)(x), ACT2FN[name](x), atol=1e-6, rtol=1e-5)


def test_the_demo_base_says_nothing_unknown(caplog: pytest.LogCaptureFixture) -> None:
    from server.model.source import DEMO_MODEL

    GPT2Config.read(DEMO_MODEL)
    assert not caplog.records, json.loads((DEMO_MODEL / "config.json").read_text())
