"""Loading and unloading doesn't grow the process: the benchmark's ten thousand cycles in short."""

from pathlib import Path

from benchmarks.lifecycle import cycles


def test_cycles_of_loading_and_unloading_do_not_grow_the_process(tmp_path: Path) -> None:
    row = cycles(tmp_path, 400, versions=20)
    assert row["cycles"] == 400
    assert row["growth_MB"] < 8, "from the 40th to the 400th; 50 MB are allowed in ten thousand"
