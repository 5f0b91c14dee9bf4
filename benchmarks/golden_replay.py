"""How far an engine lies from golden prompts: of its own adapter, of the base, of others, of a doubled alpha.

    python -m benchmarks.golden_replay [--device cuda]

One row for each dtype and kernel setting: the tolerance that the worst of the right pairs needs, and what the nearest of
the wrong ones would need to pass. docs/decisions/0009-golden-replay.md holds the numbers.
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


def needed(engine: Engine, golden: Golden, ref: AdapterRef | None) -> float:
    """The least tolerance at which `ref` would pass for the adapter of `golden`, nats."""
    for i, prompt in enumerate(golden.prompts):
        params = SamplingParams(max_tokens=len(prompt.token_ids), ignore_eos=True, logprobs=True)
        engine.add_request(Request(str(i), prompt.prompt_token_ids, params, alone(ref), time.monotonic()))
    done: dict[int, SequenceOutput] = {}
    while engine.has_work:
        done |= {int(output.request_id): output for output in engine.step().outputs}
    worst = 0.0
    for i, prompt in enumerate(golden.prompts):
        output = done[i]
        assert output.error is None, output.error
        for token, logprob, expected, theirs in zip(
            output.token_ids, output.logprobs, prompt.token_ids, prompt.logprobs, strict=True
        ):
            worst = max(worst, abs(logprob - theirs))
            if token != expected:
                break
    return worst


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
            for kernels in ("auto", "off"):
                limits = EngineConfig(max_model_len=config.n_positions)
                engine = build_engine(DEMO_MODEL, limits, device, dtype, [b""] * config.vocab_size, kernels)
                found: dict[str, list[tuple[float, str]]] = {"own": [], "base": [], "doubled": [], "another": []}
                for name, refs in made.items():
                    golden = read_golden(BUNDLED_ADAPTERS / name)
                    assert golden is not None
                    found["own"].append((needed(engine, golden, refs["own"]), name))
                    found["base"].append((needed(engine, golden, None), name))
                    found["doubled"].append((needed(engine, golden, refs["doubled"]), name))
                    for other in made.keys() - {name}:
                        found["another"].append((needed(engine, golden, made[other]["own"]), f"{other} as {name}"))
                engine.close()
                cells = [max(found["own"]), *(min(found[kind]) for kind in ("base", "doubled", "another"))]
                shown = " | ".join(f"{value:.2g} ({name})" for value, name in cells)
                print(f"| {str(dtype).removeprefix('torch.')} | {kernels} | {shown} |", flush=True)


if __name__ == "__main__":
    main()
