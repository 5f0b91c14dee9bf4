"""The truth that the engine is held to: transformers' GPT-2 and PEFT, in fp32."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel

from adapters.adapter import AdapterRef, WeightedAdapter, alone
from adapters.validation import inspect_adapter
from server.engine.config import EngineConfig
from server.engine.engine import Engine, build_engine
from server.engine.types import Request, SamplingParams, SequenceOutput
from server.model.config import GPT2Config as OurConfig

VOCAB = 211
EOS = VOCAB - 1
KERNELS = "auto"  # what engines compute with; "off" is torch alone
TIE = 1e-4  # a differing token is excused when the two candidates' logits lie this close
TOKEN_BYTES = [bytes([97 + i % 26]) * (1 + i % 3) for i in range(VOCAB)]


def make_checkpoint(folder: Path, seed: int = 0, **fields: Any) -> GPT2LMHeadModel:
    """A random GPT-2 saved in `folder`; weights large enough that logits differ plainly."""
    torch.manual_seed(seed)
    defaults: dict[str, Any] = {
        "vocab_size": VOCAB, "n_positions": 64, "n_embd": 32, "n_layer": 3, "n_head": 4, "initializer_range": 0.25,
        "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": EOS, "eos_token_id": EOS,
    }  # fmt: skip
    config = GPT2Config(**(defaults | fields))
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:  # biases start at zero and norms at one: make them matter
                parameter.add_(0.1 * torch.randn_like(parameter))
            if name.endswith("wte.weight"):
                parameter[EOS].mul_(0.1)  # seldom the best token, so that sequences get long
    model.save_pretrained(folder)
    return model


def make_adapter(
    base: Path, folder: Path, seed: int, targets: list[str] | str, rank: int = 4, size: float = 0.3, **fields: Any
) -> None:
    """A random PEFT adapter for the checkpoint in `base`, saved by PEFT itself."""
    torch.manual_seed(seed)
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=targets, fan_in_fan_out=True, task_type="CAUSAL_LM", **fields
    )
    model = get_peft_model(GPT2LMHeadModel.from_pretrained(base), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=size / rank**0.5)
    model.save_pretrained(folder)


def peft_model(base: Path, adapters: dict[str, Path]) -> PeftModel | GPT2LMHeadModel:
    """The checkpoint with these adapters, ready for `adapter_names`."""
    model: PeftModel | GPT2LMHeadModel = GPT2LMHeadModel.from_pretrained(base).eval()
    for name, folder in adapters.items():
        if isinstance(model, PeftModel):
            model.load_adapter(folder, adapter_name=name)
        else:
            model = PeftModel.from_pretrained(model, folder, adapter_name=name)
    return model.eval()


def make_engine(base: Path, device: str = "cpu", dtype: torch.dtype = torch.float32, **limits: int) -> Engine:
    """Our engine on the same checkpoint."""
    config = OurConfig.read(base)
    vocab = [TOKEN_BYTES[i % VOCAB] for i in range(config.vocab_size)]
    limits.setdefault("max_model_len", config.n_positions)
    limits.setdefault("max_batch_size", 8)
    return build_engine(base, EngineConfig(**limits), torch.device(device), dtype, vocab, KERNELS)


def adapter_ref(base: Path, folder: Path) -> AdapterRef:
    return inspect_adapter(folder, folder.name, OurConfig.read(base).adapter_shape).ref


def make_prompts(count: int, seed: int, longest: int = 20) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (count,), generator=generator)
    return [torch.randint(0, EOS, (int(n),), generator=generator).tolist() for n in lengths]


def request(
    name: object,
    prompt: Sequence[int],
    adapter: AdapterRef | tuple[WeightedAdapter, ...] | None = None,
    *,
    stream: bool = False,
    **params: Any,
) -> Request:
    adapters = adapter if isinstance(adapter, tuple) else alone(adapter)
    return Request(str(name), tuple(prompt), SamplingParams(**params), adapters, stream=stream)


def run(engine: Engine, requests: Iterable[Request], *, per_step: int = 1000) -> dict[str, SequenceOutput]:
    """Feed `per_step` requests before each step and run to the end; the final output of each."""
    queue = iter(requests)
    finished: dict[str, SequenceOutput] = {}
    pending = True
    while pending or engine.has_work:
        arrived = list(itertools.islice(queue, per_step))
        pending = bool(arrived)
        for item in arrived:
            engine.add_request(item)
        step = engine.step()
        if not step.stats.batch_size:
            time.sleep(0.001)  # an adapter is being loaded
        for output in step.outputs:
            if output.finish_reason:
                assert output.request_id not in finished, f"{output.request_id} finished twice"
                finished[output.request_id] = output
    engine.check_integrity()
    return finished


def assert_same_tokens(
    model: torch.nn.Module, prompt: Sequence[int], got: Sequence[int], expected: Sequence[int], label: str
) -> bool:
    """Tokens must be equal; where they first differ, excused only if the two logits lie within TIE of each other.

    Returns whether an excuse was used.
    """
    if list(got) == list(expected):
        return False
    at = next((i for i, (a, b) in enumerate(zip(got, expected, strict=False)) if a != b), None)
    assert at is not None, f"{label}: lengths differ, {len(got)} and {len(expected)}: {got} {expected}"
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*prompt, *expected[:at]]])).logits[0, -1]
    gap = abs(float(logits[got[at]] - logits[expected[at]]))
    assert gap < TIE, f"{label}: token {at} is {got[at]}, the oracle says {expected[at]} (logits {gap:.5f} apart)"
    return True
