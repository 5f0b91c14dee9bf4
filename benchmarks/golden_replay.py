"""How far an engine lies from golden prompts: of its own adapter, of the base, of others, of a doubled alpha.

    python -m benchmarks.golden_replay [--device cuda]

One row for each dtype and kernel setting: how far the worst of the right pairs lies off, and the nearest of the wrong
ones; nats at the worst token, and on average. docs/decisions/0009-golden-replay.md holds the numbers.
"""

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path

import torch

from adapters.adapter import AdapterRef, alone
from adapters.golden import GOLDEN_FILE, Golden, read_golden
from adapters.validation import inspect_adapter
from server.engine.config import EngineConfig
from server.engine.engine import Engine, build_engine
from server.engine.types import Request, SamplingParams, SequenceOutput
from server.model.config import GPT2Config
from server.model.source import DEMO_MODEL
from server.settings import BUNDLED_ADAPTERS


def gaps(engine: Engine, golden: Golden, ref: AdapterRef | None) -> tuple[float, float]:
    """How far `ref` is from the adapter of `golden`, at the worst token that is compared and on average; nats."""
    for i, prompt in enumerate(golden.prompts):
        params = SamplingParams(max_tokens=len(prompt.token_ids), ignore_eos=True, logprobs=True)
        engine.add_request(Request(str(i), prompt.prompt_token_ids, params, alone(ref), time.monotonic()))
    done: dict[int, SequenceOutput] = {}
    while engine.has_work:
        done |= {int(output.request_id): output for output in engine.step().outputs}
    found: list[float] = []
    for i, prompt in enumerate(golden.prompts):
        output = done[i]
        assert output.error is None, output.error
        for token, logprob, expected, theirs in zip(
            output.token_ids, output.logprobs, prompt.token_ids, prompt.logprobs, strict=True
        ):
            found.append(abs(logprob - theirs))
            if token != expected:
                break
    return max(found), sum(found) / len(found)


def variants(scratch: Path) -> dict[str, dict[str, AdapterRef]]:
    """name -> {"own", "doubled"} -> the adapter without its golden.json, so that it isn't proved."""
    shape = GPT2Config.read(DEMO_MODEL).adapter_shape
    made: dict[str, dict[str, AdapterRef]] = {}
    for source in sorted(path.parent for path in BUNDLED_ADAPTERS.glob(f"*/{GOLDEN_FILE}")):
        made[source.name] = {}
        for kind, factor in (("own", 1), ("doubled", 2)):
            folder = scratch / kind / source.name
            shutil.copytree(source, folder, ignore=shutil.ignore_patterns(GOLDEN_FILE))
            config = json.loads((folder / "adapter_config.json").read_text())
            config["lora_alpha"] *= factor
            (folder / "adapter_config.json").write_text(json.dumps(config))
            made[source.name][kind] = inspect_adapter(folder, source.name, shape).ref
    return made


def main() -> None:
    """Print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    device = torch.device(parser.parse_args().device)
    config = GPT2Config.read(DEMO_MODEL)
    print("| dtype | kernels | own, most | base, least | doubled alpha, least | another adapter, least |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        made = variants(Path(scratch))
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for kernels in ("auto", "off") if dtype is not torch.float16 else ("auto",):  # torch alone takes minutes
                limits = EngineConfig(max_model_len=128)
                engine = build_engine(DEMO_MODEL, limits, device, dtype, [b""] * config.vocab_size, kernels)
                found: dict[str, list[tuple[tuple[float, float], str]]] = {
                    "own": [],
                    "base": [],
                    "doubled": [],
                    "another": [],
                }
                for name, refs in made.items():
                    golden = read_golden(BUNDLED_ADAPTERS / name)
                    assert golden is not None
                    found["own"].append((gaps(engine, golden, refs["own"]), name))
                    found["base"].append((gaps(engine, golden, None), name))
                    found["doubled"].append((gaps(engine, golden, refs["doubled"]), name))
                    for other in made.keys() - {name}:
                        found["another"].append((gaps(engine, golden, made[other]["own"]), f"{other} as {name}"))
                engine.close()
                worst, mean = zip(*(pair for pair, _ in found["own"]), strict=True)
                shown = f"{max(worst):.2g}, {max(mean):.2g}"
                for kind in ("base", "doubled", "another"):
                    (at_worst, on_average), name = min(found[kind], key=lambda each: each[0][1])
                    shown += f" | {at_worst:.2g}, {on_average:.2g} ({name})"
                print(f"| {str(dtype).removeprefix('torch.')} | {kernels} | {shown} |", flush=True)


if __name__ == "__main__":
    main()
