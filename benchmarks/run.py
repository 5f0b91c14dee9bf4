"""`make bench`: a bounded selection of the benchmarks, about forty minutes, rendered into benchmarks/results/.

llama.cpp is compared where `make llamacpp` has built it.

Writes NAME.jsonl (every row with hardware, versions, commit), NAME.md (tables) and NAME.png (decode steps).
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
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
    "lifecycle": ["--cycles", "10000", "--names", "100", "10000"],
    "training": [],
}
HARDWARE = ("cpu", "cores", "threads", "torch", "python", "commit")
LIMIT_SECONDS = 900  # of one benchmark
GRACE_SECONDS = 15  # between SIGTERM and SIGKILL


def run(command: Sequence[str], limit: float = LIMIT_SECONDS) -> tuple[list[dict[str, Any]], str | None]:
    """The rows that a benchmark printed, and what ended it if that isn't its own success: they are kept all the same.

    It gets a process group of its own, of which nothing is left afterwards.
    """
    problem = None
    with tempfile.TemporaryFile("w+") as out:
        process = subprocess.Popen(command, stdout=out, start_new_session=True)
        try:
            if status := process.wait(limit):
                problem = f"exit status {status}"
        except subprocess.TimeoutExpired:
            problem = f"not done after {limit:g} s"
        finally:
            end_group(process)
        out.seek(0)
        return read_rows(out), problem


def end_group(leader: "subprocess.Popen[bytes]") -> None:
    """SIGTERM to all that is left of a process group; SIGKILL after GRACE_SECONDS."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + GRACE_SECONDS
        try:
            os.killpg(leader.pid, number)
            while time.monotonic() < deadline:
                leader.poll()  # as long as it isn't waited for, its group exists
                os.killpg(leader.pid, 0)
                time.sleep(0.05)
        except ProcessLookupError:
            return


def read_rows(lines: Iterable[str]) -> list[dict[str, Any]]:
    """The rows among the lines of a benchmark; what else it printed is told on stderr."""
    rows: list[dict[str, Any]] = []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if isinstance(row, dict) and "benchmark" in row:
            rows.append(row)
        elif line.strip():
            print(f"not a row: {line.rstrip()}", file=sys.stderr)
    return rows


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
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that what runs is ended, too
    rows: list[dict[str, Any]] = []
    failed: list[str] = []
    for name in args.only:
        command = [sys.executable, "-m", f"benchmarks.{name}", "--json", *SELECTION[name]]
        print("running", *command[2:], flush=True)
        more, problem = run(command)
        rows += more
        if problem:
            print(f"{name}: {problem}, {len(more)} rows are kept", file=sys.stderr)
            failed.append(name)
    if not rows:
        print("no rows: nothing is written", file=sys.stderr)
        return 1
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{args.name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (RESULTS / f"{args.name}.md").write_text(tables(rows))
    if any(row["benchmark"] == "decode" for row in rows):
        plot(rows, RESULTS / f"{args.name}.png")
    print(tables(rows))
    if failed:
        print(f"failed, rows of theirs are missing: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
