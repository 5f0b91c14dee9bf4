"""Reads a GPT-2 `config.json`. Every field that changes the forward pass is honoured or refused. Without torch."""

import json
import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from adapters.adapter import BaseShape

logger = logging.getLogger(__name__)

ACTIVATIONS = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu", "relu", "silu", "swish", "tanh")
DTYPES = ("float32", "float16", "bfloat16")

_INERT = {
    "_name_or_path", "_num_labels", "architectures", "attn_pdrop", "attention_probs_dropout_prob", "bos_token_id",
    "chunk_size_feed_forward", "embd_pdrop", "finetuning_task", "gradient_checkpointing", "id2label",
    "initializer_range", "is_decoder", "is_encoder_decoder", "label2id", "n_ctx", "output_attentions",
    "output_hidden_states", "output_past", "pad_token_id", "predict_special_tokens", "problem_type", "resid_pdrop",
    "return_dict", "summary_activation", "summary_first_dropout", "summary_proj_to_labels", "summary_type",
    "summary_use_proj", "task_specific_params", "torchscript", "transformers_version", "use_cache",
}  # fmt: skip
_NEUTRAL: dict[str, Any] = {
    "add_cross_attention": False,
    "tie_word_embeddings": True,
    "pruned_heads": {},
    "quantization_config": None,
}


class ModelError(Exception):
    """A checkpoint that can't be found, read or served; the message says what to change."""


@dataclass(frozen=True)
class GPT2Config:
    """What decides GPT-2's forward pass; names as in `transformers.GPT2Config`."""

    vocab_size: int
    n_positions: int
    n_embd: int
    n_layer: int
    n_head: int
    n_inner: int
    activation_function: str
    layer_norm_epsilon: float
    scale_attn_weights: bool
    scale_attn_by_inverse_layer_idx: bool
    reorder_and_upcast_attn: bool
    eos_token_id: int | None
    dtype: str  # of the checkpoint, as it says itself

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.n_embd // self.n_head

    @property
    def adapter_shape(self) -> BaseShape:
        """The sizes an adapter has to fit."""
        return BaseShape(self.n_layer, self.n_embd, self.n_inner)

    @classmethod
    def read(cls, folder: Path) -> "GPT2Config":
        """Parse `folder/config.json`. Raises ModelError naming the field and its value."""
        path = folder / "config.json"
        try:
            raw: Any = json.loads(path.read_text())
        except OSError as error:
            raise ModelError(f"{path} can't be read ({error.strerror}): not a model directory") from error
        except ValueError as error:
            raise ModelError(f"{path} is not valid JSON: {error}") from None
        if not isinstance(raw, dict):
            raise ModelError(f"{path} holds {type(raw).__name__}, expected an object")
        return cls.parse(cast("dict[str, Any]", raw))

    @classmethod
    def parse(cls, raw: dict[str, Any]) -> "GPT2Config":
        """Check the fields of a config.json. Raises ModelError naming the field and its value."""
        if raw.get("model_type", "gpt2") != "gpt2":
            raise ModelError(f"model_type is {raw['model_type']!r}; only gpt2 is served")
        for field, neutral in _NEUTRAL.items():
            if field in raw and raw[field] not in (neutral, None):
                raise ModelError(f"{field} is {raw[field]!r} in config.json; only {neutral!r} is supported")
        n_embd = _size(raw, "n_embd", 768)
        config = cls(
            vocab_size=_size(raw, "vocab_size", 50257),
            n_positions=_size(raw, "n_positions", 1024),
            n_embd=n_embd,
            n_layer=_size(raw, "n_layer", 12),
            n_head=_size(raw, "n_head", 12),
            n_inner=4 * n_embd if raw.get("n_inner") is None else _size(raw, "n_inner", 0),
            activation_function=_activation(raw.get("activation_function", "gelu_new")),
            layer_norm_epsilon=_epsilon(raw.get("layer_norm_epsilon", 1e-5)),
            scale_attn_weights=_flag(raw, "scale_attn_weights", default=True),
            scale_attn_by_inverse_layer_idx=_flag(raw, "scale_attn_by_inverse_layer_idx", default=False),
            reorder_and_upcast_attn=_flag(raw, "reorder_and_upcast_attn", default=False),
            eos_token_id=_eos(raw.get("eos_token_id", 50256)),
            dtype=_dtype(raw.get("dtype", raw.get("torch_dtype"))),
        )
        if config.n_embd % config.n_head:
            raise ModelError(f"n_embd {config.n_embd} is not a multiple of n_head {config.n_head}")
        known = _INERT | _NEUTRAL.keys() | set(cls.__dataclass_fields__) | {"model_type", "torch_dtype"}
        if unknown := sorted(raw.keys() - known):
            logger.warning("config.json has fields that GPT-2 does not know; not used: %s", ", ".join(unknown))
        return config


def _size(raw: dict[str, Any], field: str, default: int) -> int:
    value = raw.get(field, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ModelError(f"{field} is {value!r} in config.json; expected a positive integer")
    return value


def _flag(raw: dict[str, Any], field: str, *, default: bool) -> bool:
    value = raw.get(field, default)
    if not isinstance(value, bool):
        raise ModelError(f"{field} is {value!r} in config.json; expected true or false")
    return value


def _activation(value: Any) -> str:
    if value not in ACTIVATIONS:
        raise ModelError(f"activation_function is {value!r} in config.json; supported: {', '.join(ACTIVATIONS)}")
    return value


def _epsilon(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ModelError(f"layer_norm_epsilon is {value!r} in config.json; expected a positive number")
    return float(value)


def _eos(value: Any) -> int | None:
    if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
        raise ModelError(f"eos_token_id is {value!r} in config.json; expected one token id or null")
    return value


def _dtype(value: Any) -> str:
    name = str(value or "float32").removeprefix("torch.")
    if name not in DTYPES:
        raise ModelError(f"dtype is {value!r} in config.json; supported: {', '.join(DTYPES)}")
    return name
