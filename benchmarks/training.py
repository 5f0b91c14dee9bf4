"""Training: the lesson's recipe against ours on the same data, in one run: `python -m benchmarks.training`.

The lesson's recipe is a beginner's: transformers' Trainer over a PEFT model in fp32, every text padded with EOS to the
model's maximum (its padding masked by place, so that it learns to stop; its prompts learned too), full logits. Ours is
`python -m training`'s loop with the same rows, rank, targets, learning rate, schedule, batch and seed. Variants
alternate, every repeat has its own seed, and the allocator's settings that ours makes help both.

- equal loss, on the demo base: one epoch of --steps steps of --batch rows; ours in what `--dtype auto` is here, and in
  fp32. Eight times, off the clock, all are evaluated by `training.loop.example_losses` on the same held-out rows.
  `seconds`: until a variant first has the lesson's best loss, by the line between the evaluations around it; `speedup`:
  the lesson's over its own, median (bar: 4).
- tokens: real tokens a second at gpt2-medium's shape (random weights), over --medium-steps steps of --medium-batch rows
  after one that isn't timed (bar: 4); `ours` is fp32 here, bf16 is named.
- dtype: ours in fp32 and bf16 on the demo base, the same steps: tokens a second, the last held-out loss.
- choir, on the demo base: --voices authors of --voice-rows quotes each, together and one after another. `seconds` are
  those of the steps, `all_seconds` with evaluations and checkpoints, `processes_s` with a process's start for each.
- gpu: where there is one, gpt2-medium's shape on 2,500 quotes, one epoch (bar: 10 s).

`peak_MB` is the process's on a CPU (ours runs first, each part in a process of its own), torch's on a GPU. `padding`:
the share of places that no token fills, of all that is computed for the lesson, of attention's grid alone for ours.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.utils import logging as transformers_logging

from benchmarks.common import MEDIUM, alternate, count, emit, median, parser
from benchmarks.training_runs import Run, job_of, lesson, ours, part_of, unload
from training.base import Base, open_base
from training.config import DEMO_BASE, ROOT, TrainConfig
from training.data import load_corpus
from training.distributed import Ranks, auto_dtype, join
from training.run import keep_heap, quiet
from training.train import Job, train

AUTHORS = (
    "William Shakespeare", "Oscar Wilde", "Mark Twain", "Marcus Aurelius", "Friedrich Nietzsche", "Jane Austen",
    "Leo Tolstoy", "Charles Dickens",
)  # fmt: skip
PARTS = ("equal loss", "dtype", "choir", "tokens", "gpu")
START = "from training.base import open_base; import sys, training.run; open_base(sys.argv[1]).load()"
SIZES = {  # flag -> its default, that of --quick, what it is
    "steps": (40, 8, "of equal loss and dtype"), "batch": (8, 2, "rows in a step of them"),
    "held-out": (64, 4, "rows on which loss is taken"), "medium-steps": (2, 2, "timed at gpt2-medium's shape"),
    "medium-batch": (1, 2, "rows in a step of them"), "voices": (8, 2, "of the choir"),
    "voice-rows": (96, 8, "quotes of each"), "gpu-rows": (2500, 8, "quotes on the GPU"),
    "gpu-batch": (64, 4, "rows in a step of them"),
}  # fmt: skip
Rows = list[dict[str, Any]]


def rows_of(name: str, runs: dict[str, list[Run]], **more: dict[str, Any]) -> Rows:
    """A row for each variant; `more`: further columns, by variant."""
    return [
        {
            "benchmark": f"training, {name}", "variant": variant, "steps": own[0].points[-1][0],
            "real_tokens": own[0].points[-1][2], "tokens_per_second": median([run.tokens_per_second for run in own]),
            "padding": round(own[0].padding, 3), "peak_MB": round(own[0].peak_bytes / 1e6),
            "held_out_loss": median([run.points[-1][3] for run in own]),
        } | {column: values[variant] for column, values in more.items()}
        for variant, own in runs.items()
    ]  # fmt: skip


def equal_loss(args: argparse.Namespace, base: Base, ranks: Ranks, folder: Path) -> Rows:
    """Seconds until the lesson's best held-out loss."""
    config = configured(args, limit=args.steps * args.batch, batch_size=args.batch)
    weights, default = base.load(), auto_dtype(ranks.device)
    seeds: Counter[str] = Counter()

    def job(variant: str, dtype: str = "float32") -> Job:
        seeds[variant] += 1
        seeded = replace(config, seed=seeds[variant])
        corpus = part_of(load_corpus(seeded, base), args.steps * args.batch, args.held_out)
        return job_of(seeded, corpus, seeded.seed, folder, dtype=dtype)

    variants = {
        "ours": lambda: ours(base, weights, job("ours", default), ranks),
        "ours, fp32": lambda: ours(base, weights, job("ours, fp32"), ranks),
        "lesson": lambda: lesson(weights, job("lesson"), ranks, base.context, base.eos),
    }
    if default == "float32":
        del variants["ours, fp32"]
    runs = alternate(variants, args.repeats)
    needed = {name: [r.seconds_to(aim.best) for r, aim in zip(own, runs["lesson"], strict=True)]
              for name, own in runs.items()}  # fmt: skip
    ratios = {
        name: [b / a for a, b in zip(own, needed["lesson"], strict=True) if a and b] for name, own in needed.items()
    }
    return rows_of(
        "equal loss", runs, seconds={name: median([s for s in own if s] or [0.0]) for name, own in needed.items()},
        reached={name: f"{sum(s is not None for s in own)} of {len(own)}" for name, own in needed.items()},
        speedup={name: median(own or [0.0]) for name, own in ratios.items()},
    )  # fmt: skip


def tokens(args: argparse.Namespace, base: Base, ranks: Ranks, folder: Path) -> Rows:
    """Real tokens a second at gpt2-medium's shape."""
    rows = args.medium_batch * (args.medium_steps + 1)
    config = configured(args, limit=rows, batch_size=args.medium_batch)
    weights, base = shaped(args, base)
    job = job_of(config, part_of(load_corpus(config, base), rows, 1), 0, folder)
    near = job_of(config, job.corpus, 0, folder, dtype="bfloat16")
    runs = alternate(
        {
            "ours": lambda: ours(base, weights, job, ranks), "ours, bf16": lambda: ours(base, weights, near, ranks),
            "lesson": lambda: lesson(weights, job, ranks, base.context, base.eos),
        },
        args.repeats,
    )  # fmt: skip
    speeds = {name: median([run.tokens_per_second for run in own]) for name, own in runs.items()}
    return rows_of("tokens", runs, speedup={name: round(speed / speeds["lesson"], 2) for name, speed in speeds.items()})


def dtype(args: argparse.Namespace, base: Base, ranks: Ranks, folder: Path) -> Rows:
    """Ours in fp32 and in bf16."""
    config = configured(args, limit=args.steps * args.batch, batch_size=args.batch)
    corpus, weights = part_of(load_corpus(config, base), args.steps * args.batch, args.held_out), base.load()
    jobs = {name: job_of(config, corpus, 0, folder, dtype=name) for name in ("float32", "bfloat16")}
    runs = alternate(
        {name: lambda job=job: ours(base, weights, job, ranks) for name, job in jobs.items()}, args.repeats
    )
    speeds = {name: median([run.tokens_per_second for run in own]) for name, own in runs.items()}
    return rows_of("dtype", runs, speedup={name: round(v / speeds["float32"], 2) for name, v in speeds.items()})


def choir(args: argparse.Namespace, base: Base, ranks: Ranks, folder: Path) -> Rows:
    """Several voices together against one after another."""
    jobs: list[Job] = []
    for number, author in enumerate(AUTHORS[: args.voices]):
        config = configured(args, authors=(author,), limit=args.voice_rows, name=f"voice-{number}", output=str(folder))
        jobs.append(Job(config, part_of(load_corpus(config, base), args.voice_rows, 8)))
    weights = base.load()

    def timed(groups: Sequence[Sequence[Job]]) -> tuple[float, float, int, int]:
        start, steps, done, peak = time.perf_counter(), 0.0, 0, 0
        for group in groups:
            model, voices = train(base, weights, group, ranks, quiet)
            steps += sum(voice.history.seconds for voice in voices)
            done += sum(voice.history.tokens for voice in voices)
            peak = max(peak, *(voice.history.peak_bytes for voice in voices))
            unload(model, group)
        return steps, time.perf_counter() - start, done, peak

    groups = {"together": [jobs], "one after another": [[job] for job in jobs]}
    runs = alternate({name: lambda own=own: timed(own) for name, own in groups.items()}, args.repeats)
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", START, str(base.folder)], cwd=ROOT, check=True)
    started = time.perf_counter() - started
    found = []
    slow = [run[0] for run in runs["one after another"]]
    for name, own in runs.items():
        seconds, whole = median([run[0] for run in own]), median([run[1] for run in own])
        found.append({
            "benchmark": "training, choir", "variant": name, "voices": len(jobs), "real_tokens": own[0][2],
            "seconds": seconds, "tokens_per_second": median([run[2] / run[0] for run in own]), "all_seconds": whole,
            "processes_s": round(whole + started * len(groups[name]), 2), "peak_MB": round(own[0][3] / 1e6),
            "speedup": median([other / run[0] for other, run in zip(slow, own, strict=True)]),
        })  # fmt: skip
    return found


def gpu(args: argparse.Namespace, base: Base, ranks: Ranks, folder: Path) -> Rows:
    """gpt2-medium's shape on 2,500 quotes, one epoch; nothing where there is no GPU."""
    if ranks.device.type != "cuda":
        print("gpu: torch finds no GPU here, nothing is measured", file=sys.stderr)
        return []
    config = configured(args, limit=args.gpu_rows, batch_size=args.gpu_batch, dtype="bfloat16")
    weights, base = shaped(args, base)
    job, walls = job_of(config, load_corpus(config, base), 0, folder), list[float]()

    def timed() -> Run:
        start = time.perf_counter()
        run = ours(base, weights, job, ranks)
        torch.cuda.synchronize()
        walls.append(time.perf_counter() - start)
        return run

    timed()  # compiles, and fills the allocator
    walls.clear()
    runs = {"ours, bf16": [timed() for _ in range(args.repeats)]}
    return rows_of(
        "gpu", runs, seconds={"ours, bf16": median(walls)}, device={"ours, bf16": torch.cuda.get_device_name()}
    )


def configured(args: argparse.Namespace, **more: Any) -> TrainConfig:
    """One epoch, in fp32 unless said."""
    return TrainConfig(**{"name": "benchmark", "model": str(args.model), "epochs": 1.0, "dtype": "float32"} | more)


def shaped(args: argparse.Namespace, base: Base) -> tuple[GPT2LMHeadModel, Base]:
    """Random weights at gpt2-medium's shape, and a base that says so; with --quick the base as it is."""
    if args.quick:
        return base.load(), base
    sizes: dict[str, Any] = {**MEDIUM, "bos_token_id": base.eos, "eos_token_id": base.eos}
    config = GPT2Config(**sizes)
    torch.manual_seed(0)
    return GPT2LMHeadModel(config), replace(base, config=config)


def flags(argv: Sequence[str] | None) -> argparse.Namespace:
    p = parser(__doc__ or "", model=False)
    p.add_argument("--model", type=Path, default=DEMO_BASE, help="a base instead of the demo base")
    p.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    p.add_argument("--quick", action="store_true", help="tiny sizes, and --model's shape for gpt2-medium's")
    p.add_argument("--threads", type=count, help="torch's; its own choice if not given")
    for name, (size, _, text) in SIZES.items():
        p.add_argument(f"--{name}", type=count, help=f"{text} (default: {size})")
    args = p.parse_args(argv)
    for name, (size, quick, _) in SIZES.items():
        field = name.replace("-", "_")
        if getattr(args, field) is None:
            setattr(args, field, quick if args.quick else size)
    return args


def measure(args: argparse.Namespace, part: str) -> Rows:
    """The rows of one part, in this process."""
    keep_heap()
    transformers_logging.set_verbosity_error()
    if args.threads:
        torch.set_num_threads(args.threads)
    work = {"equal loss": equal_loss, "tokens": tokens, "dtype": dtype, "choir": choir, "gpu": gpu}[part]
    with tempfile.TemporaryDirectory() as folder:
        return work(args, open_base(str(args.model)), join(), Path(folder))


def main() -> int:
    args = flags(None)
    if len(args.only) == 1:
        for row in measure(args, args.only[0]):
            emit(row, args.json)
        return 0
    # A process for each part: what one has held isn't another's peak. The last --only counts.
    command = [sys.executable, "-m", "benchmarks.training", *sys.argv[1:], "--only"]
    return max(subprocess.run([*command, part], check=False).returncode for part in args.only)


if __name__ == "__main__":
    sys.exit(main())
