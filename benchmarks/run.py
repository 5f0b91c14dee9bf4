"""`make bench`: a bounded selection of the benchmarks, about twenty minutes, rendered into benchmarks/results/.

llama.cpp is compared where `make llamacpp` has built it.

Writes NAME.jsonl (every row with hardware, versions, commit), NAME.md (tables) and NAME.png (decode steps).
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.build_llamacpp import BUILD, TOOL

RESULTS = Path(__file__).resolve().parent / "results"
SELECTION: dict[str, list[str]] = {
    "floor": [],
    "decode": ["--repeats", "3"],
    "peft": ["--adapters", "8", "32", "--repeats", "3"],
    "sampler": ["--repeats", "2"],
    "prefill": ["--repeats", "2"],
    "adapters": [],
    "server": ["--repeats", "3"],
    "llamacpp": [],
}
HARDWARE = ("cpu", "cores", "threads", "torch", "python", "commit")
LIMIT_SECONDS = 900


def run(name: str, flags: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of one benchmark. Raises subprocess.CalledProcessError, TimeoutExpired."""
    command = [sys.executable, "-m", f"benchmarks.{name}", "--json", *flags]
    print("running", " ".join(command[2:]), flush=True)
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=LIMIT_SECONDS)
    return [json.loads(line) for line in done.stdout.splitlines()]


def tables(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown, a table for each benchmark."""
    first = rows[0]
    lines = ["# Benchmarks", "", "Made by `make bench`. " + ", ".join(f"{k} {first[k]}" for k in HARDWARE) + "."]
    lines += ["Medians of alternated runs; definitions are in each benchmark's docstring. Shared machines are noisy:"]
    lines += ["ratios within one run are worth more than milliseconds.", ""]
    for name in dict.fromkeys(row["benchmark"] for row in rows):
        own = [{k: v for k, v in row.items() if k not in HARDWARE} for row in rows if row["benchmark"] == name]
        columns = [column for column in own[0] if column != "benchmark"]
        lines += [f"## {name}", "", f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
        lines += ["| " + " | ".join(str(row[column]) for column in columns) + " |" for row in own]
        lines.append("")
    return "\n".join(lines)


def plot(rows: Sequence[dict[str, Any]], file: Path) -> None:
    """Decode steps by batch size, a line for each type and number of adapters."""
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    decode = [row for row in rows if row["benchmark"] == "decode"]
    for dtype, adapters in sorted({(row["dtype"], row["adapters"]) for row in decode}):
        points = [(r["batch"], r["ms_per_step"]) for r in decode if (r["dtype"], r["adapters"]) == (dtype, adapters)]
        axes.plot(*zip(*points, strict=True), marker="o", label=f"{dtype}, {adapters or 'no'} adapters")
    axes.set(xlabel="batch", ylabel="ms a decode step", ylim=(0, None))
    axes.legend(fontsize="small")
    figure.savefig(file, dpi=90, metadata={"Software": None})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", default="cpu", help="of the files in benchmarks/results")
    built = [name for name in SELECTION if name != "llamacpp" or (BUILD / TOOL).is_file()]
    parser.add_argument("--only", nargs="+", choices=list(SELECTION), default=built)
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    failed: list[str] = []
    for name in args.only:
        try:
            rows += run(name, SELECTION[name])
        except subprocess.SubprocessError as error:
            print(f"{name}: {error}", file=sys.stderr)
            failed.append(name)
    if not rows:
        return 1
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{args.name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (RESULTS / f"{args.name}.md").write_text(tables(rows))
    if any(row["benchmark"] == "decode" for row in rows):
        plot(rows, RESULTS / f"{args.name}.png")
    print(tables(rows))
    if failed:
        print(f"failed, their rows are missing: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
