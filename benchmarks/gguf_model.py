"""GPT-2 of random weights as a GGUF file for llama.cpp.

Types as llama.cpp's own converter chooses them: matrices in the type asked for; biases, norms and positions in fp32.
The token embedding is there once; llama.cpp takes it for the output too. The vocabulary is the demo model's: GPT-2's.
"""

import json
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from server.model.config import GPT2Config
from server.model.loader import expected_shapes
from server.model.source import DEMO_MODEL

FILE_TYPES = {torch.float32: "ALL_F32", torch.bfloat16: "MOSTLY_BF16"}
_NAMES = {"wte": "token_embd", "wpe": "position_embd", "ln_f": "output_norm"}
_LAYER_NAMES = {
    "ln_1": "attn_norm", "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output", "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down",
}  # fmt: skip


def gguf_name(name: str) -> str:
    """llama.cpp's name of a checkpoint's tensor: `h.3.ln_1.bias` -> `blk.3.attn_norm.bias`."""
    stem, _, kind = name.rpartition(".")
    if not stem.startswith("h."):
        return f"{_NAMES[stem]}.{kind}"
    _, layer, module = stem.split(".", 2)
    return f"blk.{layer}.{_LAYER_NAMES[module]}.{kind}"


def gguf_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of a checkpoint's tensor: GPT-2's projections (in, out) become (out, in)."""
    return shape[::-1] if name.startswith("h.") else shape


def write_gguf(gguf: ModuleType, config: GPT2Config, dtype: torch.dtype, file: Path) -> None:
    """Write the model to `file`, whole or not at all. gguf: the package of that name.

    The weights are distributed as in `benchmarks.common.make_model`.
    """
    partial = file.with_name(f".{file.name}.partial")
    writer: Any = gguf.GGUFWriter(partial, "gpt2")
    writer.add_name("random weights")
    writer.add_file_type(gguf.LlamaFileType[FILE_TYPES[dtype]])
    writer.add_context_length(config.n_positions)
    writer.add_embedding_length(config.n_embd)
    writer.add_feed_forward_length(config.n_inner)
    writer.add_block_count(config.n_layer)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)
    _add_vocabulary(writer, gguf)
    for name, shape in expected_shapes(config).items():
        tensor = torch.randn(gguf_shape(name, shape)).mul_(0.02)
        if dtype == torch.bfloat16 and tensor.dim() == 2 and name != "wpe.weight":
            raw = tensor.bfloat16().view(torch.uint8)  # [out, 2 * in]: numpy has no bf16
            writer.add_tensor(gguf_name(name), raw.numpy(), raw_dtype=gguf.GGMLQuantizationType.BF16)
        else:
            writer.add_tensor(gguf_name(name), tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.replace(partial, file)


def _add_vocabulary(writer: Any, gguf: ModuleType) -> None:
    tokenizer = json.loads((DEMO_MODEL / "tokenizer.json").read_text(encoding="utf-8"))
    ids: dict[str, int] = tokenizer["model"]["vocab"]
    special = {token["id"] for token in tokenizer["added_tokens"]}
    tokens = sorted(ids, key=lambda token: ids[token])
    types = [gguf.TokenType.CONTROL if ids[token] in special else gguf.TokenType.NORMAL for token in tokens]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(len(tokens) - 1)
    writer.add_eos_token_id(len(tokens) - 1)
