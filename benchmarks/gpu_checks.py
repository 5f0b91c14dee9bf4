"""What `gpu` checks before it times anything: the tests that a GPU changes, and tokens against the CPU's."""

import subprocess
import sys
from typing import Any

import torch

from adapters.adapter import AdapterRef, alone
from adapters.arena import Arena
from adapters.residency import Residency
from benchmarks.common import RANK, adapter_bytes, advance, make_adapter
from server.engine.config import EngineConfig
from server.engine.engine import Engine, make_runner
from server.engine.types import Request, SamplingParams
from server.model.backend import choose_backend
from server.model.config import GPT2Config
from server.model.gpt2 import GPT2
from server.model.loader import build_model, expected_shapes

CUDA = torch.device("cuda")
TESTS = [
    *(f"tests/kernels/test_gpu_{name}.py" for name in ("lora", "attention", "sampling", "norm")),
    "tests/engine/test_device_runner.py",
]
AGREE = 0.95  # of the requests have equal tokens; docs/decisions/0007-gpu-path.md says why not all
Row = dict[str, Any]


def type_name(dtype: torch.dtype) -> str:
    """As --dtype says it."""
    return str(dtype).removeprefix("torch.")


def random_model(fields: dict[str, int], device: torch.device, dtype: torch.dtype) -> GPT2:
    """Random weights, the same on every device."""
    config, generator = GPT2Config.parse(fields), torch.Generator().manual_seed(0)
    shapes = expected_shapes(config)

    def take(name: str) -> torch.Tensor:
        return torch.randn(shapes[name], generator=generator).mul_(0.05).to(device, dtype)

    return build_model(config, choose_backend(device, dtype), take)


def new_engine(model: GPT2, batch: int, max_len: int) -> Engine:
    """An engine over `model` on its device, captured and warm, with room for an adapter of rank 8 for each sequence.

    Raises ValueError for more positions than the model has.
    """
    if max_len > model.config.n_positions:
        raise ValueError(f"max_len {max_len} exceeds the model's {model.config.n_positions} positions")
    arena = Arena(max(1 << 30, batch * adapter_bytes(model, 2 * RANK)), model.device, model.dtype)
    residency = Residency(lambda ref: make_adapter(ref, model), arena)
    config = EngineConfig(batch, max_len, max(512, batch), arena.nbytes)
    return Engine(config, make_runner(model, config, residency), residency, None, [])


def run_until_done(engine: Engine) -> dict[str, tuple[int, ...]]:
    """The tokens of everything that was added. Raises RuntimeError for a request that failed."""
    done: dict[str, tuple[int, ...]] = {}
    while engine.has_work:
        for output in advance(engine).outputs:
            done[output.request_id] = output.token_ids
    return done


def check_tests() -> list[Row]:
    """pytest over the kernels, compiled, and the runner. Raises RuntimeError; the failures are on stderr."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", *TESTS]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    summary = done.stdout.strip().splitlines()[-1:]
    if done.returncode:
        print(done.stdout[-6000:], done.stderr[-2000:], file=sys.stderr)
        raise RuntimeError(f"{summary}")
    return [{"part": "check", "what": "tests of kernels and runner", "result": " ".join(summary)}]


def check_engine() -> list[Row]:
    """Greedy tokens of a small model in fp32: captured on the GPU, and on the CPU by its backend (named in the row).

    Raises RuntimeError if more than AGREE lets pass differ.
    """
    small = {"n_embd": 256, "n_layer": 4, "n_head": 4, "n_positions": 256, "vocab_size": 1000}
    answers: list[dict[str, tuple[int, ...]]] = []
    backend = ""
    for device in (CUDA, torch.device("cpu")):
        model = random_model(small, device, torch.float32)
        backend = model.backend.name
        engine = new_engine(model, 16, 128)
        for i in range(64):
            ref = AdapterRef(f"d{i % 7}@{(8, 16, 64)[i % 3]}", f"a{i % 7}", "") if i % 4 else None
            prompt = tuple((7 * i + 3 * j) % 1000 for j in range(1 + i))
            engine.add_request(Request(str(i), prompt, SamplingParams(max_tokens=24), alone(ref)))
        answers.append(run_until_done(engine))
        engine.close()
    ours, theirs = answers
    equal = sum(ours[key] == theirs[key] for key in theirs)
    if equal < AGREE * len(theirs):
        raise RuntimeError(f"only {equal} of {len(theirs)} requests have the tokens of the CPU ({backend})")
    what = f"greedy tokens equal the CPU's ({backend})"
    return [{"part": "check", "dtype": "float32", "what": what, "result": f"{equal} of {len(theirs)}"}]
