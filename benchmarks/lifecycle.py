"""The adapter store at scale: `python -m benchmarks.lifecycle`. Small adapters for the demo base (rank 1, one module).

- registered: a store of so many names. `open_s`: a new process opens it; `server_ready_s`: a server over it is ready;
  `bytes_each`: what a name adds to the process; `lookup_us`: one name; `page_ms`: the first hundred records.
- cycles: publish a new version, load it in the engine, remove it, forget it, so many times; the process's memory at a
  tenth of them and at the end, and the time of a load in the first and in the last tenth.
"""

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file

from adapters.adapter import AdapterRef, alone
from adapters.lora_config import CONFIG_FILE
from adapters.store import AdapterStore
from adapters.validation import WEIGHTS_FILE
from benchmarks.common import count, emit, parser
from benchmarks.serving import answers, serving
from server.engine.config import EngineConfig
from server.engine.engine import Engine, build_engine
from server.engine.types import Request, SamplingParams
from server.model.config import GPT2Config
from server.model.source import DEMO_MODEL

SHAPE = GPT2Config.read(DEMO_MODEL).adapter_shape
CONFIG = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["h.0.attn.c_proj"]}
PREFIX = "base_model.model.transformer.h.0.attn.c_proj"
_OPEN = """
import json, os, sys, time
from pathlib import Path
from adapters.adapter import BaseShape
from adapters.store import AdapterStore
def rss(): return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGESIZE")
before, start = rss(), time.perf_counter()
store = AdapterStore(Path(sys.argv[1]), BaseShape(*map(int, sys.argv[2:5])))
opened, after = time.perf_counter() - start, rss()
names = [entry.name for entry in store.entries()]
times = []
for name in names[:: max(1, len(names) // 1000)]:
    start = time.perf_counter()
    assert store.known(name) is not None
    times.append(time.perf_counter() - start)
print(json.dumps([opened, (after - before) / len(names), sorted(times)[len(times) // 2]]))
"""


def write(folder: Path, seed: int) -> Path:
    """An adapter of one module and rank 1."""
    folder.mkdir(parents=True, exist_ok=True)
    n_in, n_out = SHAPE.in_out("attn.c_proj")
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(1, n_in)).astype(np.float32), rng.normal(size=(n_out, 1)).astype(np.float32) / 100
    (folder / CONFIG_FILE).write_text(json.dumps(CONFIG))
    save_file({f"{PREFIX}.lora_A.weight": a, f"{PREFIX}.lora_B.weight": b}, folder / WEIGHTS_FILE)
    return folder


def rss() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


def registered(root: Path, names: int, repeats: int) -> dict[str, Any]:
    """A store of so many names, opened by new processes."""
    store = AdapterStore(root / "store", SHAPE)
    start = time.perf_counter()
    for i in range(names):
        store.publish(store.stage(f"voice-{i:05}", write(root / "folder", i)), "benchmark")
    publish = (time.perf_counter() - start) / names
    store.close()
    shape = [str(SHAPE.n_layer), str(SHAPE.n_embd), str(SHAPE.n_inner)]
    runs: list[list[float]] = []
    for _ in range(repeats):
        command = [sys.executable, "-c", _OPEN, str(root / "store"), *shape]
        runs.append(json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout))
    opened, each, lookup = (statistics.median(column) for column in zip(*runs, strict=True))
    ready, page = serve(root)
    return {
        "names": names, "publish_ms": round(1000 * publish, 2), "open_s": round(opened, 3),
        "server_ready_s": round(ready, 2), "bytes_each": round(each), "lookup_us": round(1e6 * lookup, 1),
        "page_ms": round(1000 * page, 1),
    }  # fmt: skip


def serve(root: Path) -> tuple[float, float]:
    """Seconds until a server over the store is ready, and of a page of its listing."""
    flags = ["--model", str(DEMO_MODEL), "--store-dir", str(root / "store")]
    start = time.perf_counter()
    with serving([*flags, "--device", "cpu", "--dtype", "float32", "--kernels", "auto"]) as url:
        ready, pages = time.perf_counter() - start, list[float]()
        for _ in range(5):
            begun = time.perf_counter()
            assert answers(f"{url}/v1/adapters?limit=100")
            pages.append(time.perf_counter() - begun)
    return ready, statistics.median(pages)


def cycles(root: Path, number: int, versions: int = 50) -> dict[str, Any]:
    """Publish, load, remove and forget, over and over, in one process."""
    store = AdapterStore(root / "cycled", SHAPE)
    config = EngineConfig(max_batch_size=4, max_model_len=64, max_batch_tokens=64, adapter_memory=64 << 20)
    vocab = [b"x"] * GPT2Config.read(DEMO_MODEL).vocab_size
    engine = build_engine(DEMO_MODEL, config, torch.device("cpu"), torch.float32, vocab)
    folders = [write(root / f"version{i}", i) for i in range(versions)]
    loads, sizes = list[float](), list[int]()
    tenth = max(1, number // 10)
    for i in range(number):
        found = store.stage(f"name-{i % 100}", folders[i % versions])
        store.publish(found, "benchmark")
        start = time.perf_counter()
        use(engine, found.ref)
        loads.append(time.perf_counter() - start)
        store.remove(found.ref.name, "benchmark")
        engine.forget(found.ref.digest)
        if (i + 1) % tenth == 0:
            gc.collect()
            sizes.append(rss())
    engine.close()
    return {
        "cycles": number, "MB_at_a_tenth": round(sizes[0] / 1e6, 1), "MB_at_the_end": round(sizes[-1] / 1e6, 1),
        "growth_MB": round((sizes[-1] - sizes[0]) / 1e6, 1),
        "load_ms_first_tenth": round(1000 * statistics.median(loads[:tenth]), 2),
        "load_ms_last_tenth": round(1000 * statistics.median(loads[-tenth:]), 2),
    }  # fmt: skip


def use(engine: Engine, ref: AdapterRef) -> None:
    """One token with an adapter, which loads it. Raises RuntimeError when that fails."""
    engine.add_request(Request("r", (1, 2, 3), SamplingParams(max_tokens=1), alone(ref)))
    while engine.has_work:
        step = engine.step()
        for output in step.outputs:
            if output.error:
                raise RuntimeError(output.error)
        if not step.stats.batch_size:
            time.sleep(0.0005)  # nothing but loads is under way


def main() -> None:
    p = parser(__doc__ or "", model=False)
    p.add_argument("--names", type=count, nargs="+", default=[100, 10_000], help="sizes of the store")
    p.add_argument("--cycles", type=count, default=10_000)
    p.add_argument("--only", choices=("registered", "cycles"), nargs="+", default=("registered", "cycles"))
    args: argparse.Namespace = p.parse_args()
    for names in args.names if "registered" in args.only else ():
        with tempfile.TemporaryDirectory() as root:
            emit({"benchmark": "lifecycle, registered"} | registered(Path(root), names, args.repeats), args.json)
    if "cycles" in args.only:
        with tempfile.TemporaryDirectory() as root:
            emit({"benchmark": "lifecycle, cycles"} | cycles(Path(root), args.cycles), args.json)


if __name__ == "__main__":
    main()
