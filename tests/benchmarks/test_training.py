"""The training benchmark at tiny sizes: equal work on both sides, whole rows. No times are judged."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks.training import flags, measure
from benchmarks.training_runs import Run
from tests.training.conftest import tiny_base  # noqa: F401

SPEED = {"benchmark", "variant", "real_tokens", "tokens_per_second", "peak_MB", "speedup"}


def rows(part: str, base: Path) -> dict[str, dict[str, Any]]:
    args = flags(["--quick", "--repeats", "1", "--model", str(base)])
    return {row["variant"]: row for row in measure(args, part)}


@pytest.mark.parametrize(
    ("part", "variants"),
    [
        ("equal loss", {"ours", "ours, fp32", "lesson"}), ("tokens", {"ours", "ours, bf16", "lesson"}),
        ("dtype", {"float32", "bfloat16"}), ("choir", {"together", "one after another"}),
    ],
)  # fmt: skip
def test_variants_do_the_same_work(
    part: str,
    variants: set[str],
    tiny_base: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("benchmarks.training.auto_dtype", lambda device: "bfloat16")
    found = rows(part, tiny_base)
    assert found.keys() == variants
    assert len({row["real_tokens"] for row in found.values()}) == 1, "the same rows went through"
    assert all(row["real_tokens"] > 0 and row["peak_MB"] > 0 for row in found.values())
    assert all(row.keys() >= SPEED for row in found.values())
    assert len({tuple(row) for row in found.values()}) == 1, "one table's columns"
    if "lesson" in found:
        assert found["lesson"]["padding"] > found["ours"]["padding"]
        assert found["lesson"]["steps"] == found["ours"]["steps"]
    if part != "choir":
        losses = [row["held_out_loss"] for row in found.values()]
        assert max(losses) - min(losses) < 0.5, "of one random base, trained a few steps"


def test_time_to_a_loss_lies_on_the_line_between_evaluations() -> None:
    run = Run([(0, 0.0, 0, 4.0), (8, 10.0, 80, 3.0), (16, 20.0, 160, 2.0)])
    assert run.seconds_to(2.5) == pytest.approx(15.0)
    assert run.seconds_to(3.0) == pytest.approx(10.0)
    assert run.seconds_to(1.9) is None
    assert run.best == 2.0
    assert run.tokens_per_second == pytest.approx(8.0)
