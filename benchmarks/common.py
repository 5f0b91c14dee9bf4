"""What every benchmark shares: models and adapters at gpt2-medium's sizes, alternating runs, rows of results."""

import argparse
import json
import os
import platform
import statistics
import subprocess
import time
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from adapters.adapter import Adapter, AdapterRef, LoraPair, ModuleKey, alone
from adapters.arena import Arena
from adapters.residency import Residency
from server.engine.config import EngineConfig
from server.engine.engine import Engine
from server.engine.kv_cache import KVCache
from server.engine.model_runner import ModelRunner
from server.engine.types import Request, SamplingParams, SequenceOutput, StepOutput
from server.model.backend import choose_backend
from server.model.config import GPT2Config, ModelError
from server.model.gpt2 import GPT2
from server.model.loader import build_model, expected_shapes, load_model

MEDIUM = {"n_embd": 1024, "n_layer": 24, "n_head": 16, "n_positions": 1024}
RANK = 8
TARGETS = ("attn.c_attn", "attn.c_proj")
STEP_TOKENS = 128  # the server's on a CPU
CPU = torch.device("cpu")
K = TypeVar("K")
T = TypeVar("T")


def parser(description: str, model: bool = True, repeats: bool = True) -> argparse.ArgumentParser:
    """Flags that every benchmark has; `model`: whether it runs one, `repeats`: whether it alternates variants."""
    p = argparse.ArgumentParser(description=description)
    if model:
        p.add_argument(
            "--model", type=Path, help="a checkpoint directory instead of random weights at gpt2-medium's sizes"
        )
    if repeats:
        p.add_argument("--repeats", type=count, default=3, help="runs of each variant, alternated")
    p.add_argument("--json", action="store_true", help="one JSON line a row")
    return p


def count(text: str) -> int:
    """A flag's value that counts something. Raises ArgumentTypeError, to which argparse adds the flag."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r}, expected an integer of at least 1")
    return int(text)


def require_positions(p: argparse.ArgumentParser, folder: Path | None, needed: int, what: str) -> None:
    """A usage error, before anything is loaded, if the model has fewer positions than `what` needs (flag and value)."""
    try:
        limit = MEDIUM["n_positions"] if folder is None else GPT2Config.read(folder).n_positions
    except ModelError as error:
        p.error(f"argument --model: {error}")
    if needed > limit:
        model = "gpt2-medium" if folder is None else f"--model {folder}"
        p.error(f"argument {what}: that takes {needed} positions, {model} has {limit}")


def make_model(folder: Path | None, dtype: torch.dtype, kernels: str = "auto") -> GPT2:
    """The checkpoint in `folder`, or random weights at gpt2-medium's sizes; on the CPU."""
    if folder is not None:
        return load_model(folder, CPU, dtype, kernels)
    config = GPT2Config.parse(MEDIUM)
    shapes = expected_shapes(config)
    torch.manual_seed(0)
    backend = choose_backend(CPU, dtype, kernels)
    return build_model(config, backend, lambda name: torch.randn(shapes[name]).mul_(0.02).to(dtype))


def make_adapter(ref: AdapterRef, model: GPT2, rank: int = RANK, dtype: torch.dtype | None = None) -> Adapter:
    """Random weights on c_attn and attn.c_proj, of one digest always the same; its suffix `@r`, if any, is the rank.

    `dtype`: the model's if None.
    """
    generator = torch.Generator().manual_seed(zlib.crc32(ref.digest.encode()))
    rank = int(ref.digest.partition("@")[2] or rank)
    shape, pairs = model.config.adapter_shape, {}
    for layer in range(shape.n_layer):
        for target in TARGETS:
            n_in, n_out = shape.in_out(target)
            sizes = ((rank, n_in), (rank, n_out))
            a, b = (0.02 * torch.randn(size, generator=generator).to(dtype or model.dtype) for size in sizes)
            pairs[ModuleKey(layer, target)] = LoraPair(a, b)
    return Adapter(ref.digest, pairs)


def adapter_bytes(model: GPT2, rank: int = RANK) -> int:
    """What an adapter of `make_adapter` takes on the device."""
    shape = model.config.adapter_shape
    return shape.n_layer * rank * sum(sum(shape.in_out(target)) for target in TARGETS) * model.dtype.itemsize


def make_engine(
    model: GPT2,
    batch: int,
    max_len: int,
    memory: int = 1 << 30,
    load: Callable[[AdapterRef], Adapter] | None = None,
    max_batch_tokens: int = STEP_TOKENS,
) -> Engine:
    """The engine alone over `model`; `memory`: bytes of the adapters' arena; `load`: random adapters if None.

    Raises ValueError for more positions than the model has.
    """
    if max_len > model.config.n_positions:
        raise ValueError(f"max_len {max_len} exceeds the model's {model.config.n_positions} positions")
    residency = Residency(load or (lambda ref: make_adapter(ref, model)), Arena(memory, CPU, model.dtype))
    kv_cache = KVCache(model.config, batch, max_len, CPU, model.dtype)
    config = EngineConfig(batch, max_len, max(max_batch_tokens, batch), memory)
    return Engine(config, ModelRunner(model, kv_cache, residency), residency, None, [])


def warm(engine: Engine, refs: Iterable[AdapterRef]) -> None:
    """Bring adapters in, and the engine's buffers with them: one token for each, before anything is timed.

    Raises RuntimeError with what an adapter or its token failed of.
    """
    for ref in refs:
        engine.add_request(Request(f"warm {ref.digest}", (1,), SamplingParams(max_tokens=1), alone(ref)))
    while engine.has_work:
        if not advance(engine).stats.batch_size:
            time.sleep(0.001)  # a load is under way


def succeeded(outputs: Sequence[SequenceOutput]) -> Sequence[SequenceOutput]:
    """The outputs. Raises RuntimeError with the text of one that is an error: what failed must not be timed."""
    for output in outputs:
        if output.error is not None:
            raise RuntimeError(f"request {output.request_id!r}: {output.error}")
    return outputs


def advance(engine: Engine) -> StepOutput:
    """A step. Raises RuntimeError with the text of an output that is an error."""
    step = engine.step()
    succeeded(step.outputs)
    return step


def alternate(variants: Mapping[K, Callable[[], T]], repeats: int) -> dict[K, list[T]]:
    """Run the variants in turn, `repeats` times; what each gave."""
    results: dict[K, list[T]] = {name: [] for name in variants}
    for _ in range(repeats):
        for name, run in variants.items():
            results[name].append(run())
    return results


def median(values: list[float]) -> float:
    """The median, to four digits."""
    return float(f"{statistics.median(values):.4g}")


def hardware() -> dict[str, Any]:
    """Machine, versions and commit, for a row."""
    names = [line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")]
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return {
        "cpu": names[0] if names else platform.machine(), "cores": os.cpu_count(),
        "threads": torch.get_num_threads(), "torch": torch.__version__, "python": platform.python_version(),
        "commit": commit.stdout.strip() or "unknown",
    }  # fmt: skip


def emit(row: dict[str, Any], as_json: bool) -> None:
    """Print a row: a JSON line with the hardware, or `key value` pairs."""
    print(json.dumps(row | hardware()) if as_json else "  ".join(f"{k} {v}" for k, v in row.items()), flush=True)


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []
