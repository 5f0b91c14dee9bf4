"""Builds the engine in the worker process: the one module of `server.api` that needs torch."""

import logging
import os
import time
from pathlib import Path

import torch

from server.api.messages import EngineInfo
from server.engine.config import EngineConfig
from server.engine.engine import Engine, build_engine
from server.model.config import GPT2Config, ModelError
from server.settings import Settings
from server.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


def build(settings: Settings, model_dir: Path) -> tuple[Engine, EngineInfo]:
    """Load the model as `settings` say. Raises ModelError or ValueError with the setting to change."""
    device = _device(settings.device)
    dtype = _dtype(settings.dtype, device)
    config = GPT2Config.read(model_dir)
    start = time.perf_counter()
    vocab = Tokenizer(model_dir).vocabulary(config.vocab_size)
    engine = build_engine(model_dir, engine_config(settings, config, device), device, dtype, vocab, settings.kernels)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    seconds = time.perf_counter() - start
    logger.info("model ready in %.1f s: %s, %s, %s, %s", seconds, model_dir, name, dtype, engine.backend)
    epoch = f"{os.getpid()}.{time.time_ns()}"
    info = EngineInfo(
        epoch, os.getpid(), device.type, str(dtype).removeprefix("torch."), engine.weight_bytes, engine.backend
    )
    return engine, info


def engine_config(settings: Settings, config: GPT2Config, device: torch.device) -> EngineConfig:
    """The engine's limits."""
    batch = settings.max_batch_size
    return EngineConfig(
        max_batch_size=batch,
        max_model_len=settings.max_model_len or config.n_positions,
        max_batch_tokens=settings.max_batch_tokens or max(128 if device.type == "cpu" else 512, 2 * batch),
        adapter_memory=int(settings.adapter_memory),
        host_cache=int(settings.host_cache),
    )


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise ModelError("--device cuda: torch sees no CUDA device; use --device cpu, or install a CUDA build of torch")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
