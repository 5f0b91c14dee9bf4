"""The gate: what it asks for, what it says, and what becomes of an adapter that fails it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.training.test_run import FILES, flags
from training.__main__ import main
from training.cli import parse_args
from training.errors import ConfigError
from training.evaluate import Evaluation, Row
from training.gate import DEFAULT, LIMITS, judge
from training.intervals import Interval, Perplexities, Rate
from training.sampling import SamplingSettings


def evaluation(eos: int = 95, bare_format: int = 90, ratio_high: float = 0.9, copies: int = 0) -> Evaluation:
    def row(metric: str, form: str, hits: int, prompts: str = "test") -> Row:
        return Row(metric, prompts, form, 100, 0, Rate.of(10, 100), Rate.of(hits, 100))

    one = Interval(1, 1, 1)
    rows = [
        row("eos_rate", "punctuated", eos), row("eos_rate", "bare", 99), row("format_rate", "punctuated", 99),
        row("format_rate", "bare", bare_format), row("copy_rate", "punctuated", 0), row("copy_rate", "bare", copies),
        row("style_rate", "punctuated", 40), row("style_rate", "bare", 35),
        row("eos_rate", "punctuated", 1, "heldout_authors"),
    ]  # fmt: skip
    compared = Perplexities(one, one, Interval(0.8, 0.7, ratio_high), 10, 100)
    return Evaluation(rows, [], SamplingSettings(), {"test": compared}, "none", {})


def failed(gate: dict[str, float], of: Evaluation) -> list[str]:
    return [check.figure for check in judge(gate, of).failed]


def test_the_default_gate_looks_at_the_worse_form_of_its_own_prompts() -> None:
    verdict = judge({}, evaluation())
    assert verdict.passed
    assert {check.figure for check in verdict.checks} == DEFAULT.keys()
    assert [check.found for check in verdict.checks] == [0.95, 0.9, 0.9, 0.0]


@pytest.mark.parametrize(
    ("change", "figure"),
    [
        ({"eos": 89}, "eos_rate"), ({"bare_format": 84}, "format_rate"), ({"ratio_high": 1.0}, "perplexity_ratio"),
        ({"copies": 6}, "copy_rate"),
    ],
)  # fmt: skip
def test_each_figure_alone_can_fail_it(change: dict, figure: str) -> None:
    assert failed({}, evaluation(**change)) == [figure]


def test_limits_themselves_are_good_enough_where_they_are_no_strict_bound() -> None:
    assert judge({}, evaluation(eos=90, bare_format=85, copies=5)).passed


def test_overrides_change_the_default_and_add_to_it() -> None:
    assert failed({"eos_rate": 0.96}, evaluation()) == ["eos_rate"]
    assert failed({"eos_rate": 0.0}, evaluation(eos=1)) == []
    assert failed({"style_rate": 0.36}, evaluation()) == ["style_rate"]
    assert failed({"style_gain": 0.25}, evaluation()) == []
    assert judge(None, evaluation(eos=0)).passed, "without --gate everything is published"


def test_what_cannot_be_measured_does_not_pass() -> None:
    of = evaluation()
    of.perplexities["test"] = replace(of.perplexities["test"], ratio=None)
    assert failed({}, of) == ["perplexity_ratio"], "a single text"
    verdict = judge({"longest_overlap": 20}, evaluation())
    assert str(verdict.failed[0]) == "longest_overlap can't be measured on this data and has to be at most 20"


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("eos_rat=0.9", "--gate eos_rat: there is no such figure; did you mean eos_rate?"),
        ("zzz=1", "--gate zzz: there is no such figure; there are eos_rate, format_rate"),
        ("eos_rate=90", "--gate eos_rate=90: give a number from 0 to 1"),
        ("perplexity=nan", "--gate perplexity=nan: give a number"),
    ],
)
def test_a_gate_that_cannot_be_is_refused_before_anything_is_loaded(flag: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_args(["--name", "x", "--gate", flag])
    assert message in str(caught.value)


def test_flags_give_the_default_gate_or_overrides() -> None:
    assert parse_args(["--name", "x"]).gate is None
    assert parse_args(["--name", "x", "--gate"]).gate == {}
    config = parse_args(["--name", "x", "--gate", "--gate", "eos_rate=0.5"])
    assert config.gate == {"eos_rate": 0.5}
    assert "gate" not in config.recorded()
    assert set(DEFAULT) <= set(LIMITS)


def test_a_failed_gate_keeps_the_folder_aside_and_what_was_there_in_its_place(
    tiny_base: Path, quotes_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = flags("voice", tmp_path, tiny_base, quotes_file)
    weak = [*run, "--epochs", "0.2", "--author", "Author 1"]
    assert main(weak) == 0
    before = (tmp_path / "voice" / "adapter_model.safetensors").read_bytes()
    capsys.readouterr()
    assert main([*weak, "--overwrite", "--seed", "7", "--gate", "--gate", "perplexity=9e9"]) == 3
    error = capsys.readouterr().err
    aside = tmp_path / ".voice.rejected"
    assert error.startswith("gate: voice is not published: eos_rate is ")
    assert " and has to be at least 0.9; " in error
    assert error.endswith(f"Its folder is {aside}\n")
    assert (tmp_path / "voice" / "adapter_model.safetensors").read_bytes() == before
    assert {file.name for file in aside.iterdir()} == FILES
    assert sorted(folder.name for folder in tmp_path.iterdir()) == [".voice.rejected", "voice"]
    gate = json.loads((aside / "report.json").read_text())["gate"]
    assert gate["passed"] is False
    checks = {check["figure"]: check for check in gate["checks"]}
    assert checks["eos_rate"]["required"] == "at least 0.9"
    assert checks["eos_rate"]["passed"] is False
    assert checks["perplexity"]["passed"] is True
    assert "failed its gate" in (aside / "report.html").read_text()
    lenient = [f"{figure}={limit}" for figure, limit in (("eos_rate", 0), ("format_rate", 0), ("copy_rate", 1))]
    lenient = [word for pair in [*lenient, "perplexity_ratio=1000"] for word in ("--gate", pair)]
    assert main([*weak, "--overwrite", *lenient]) == 0
    assert [folder.name for folder in tmp_path.iterdir()] == ["voice"], "what was rejected before is forgotten"
    assert json.loads((tmp_path / "voice" / "report.json").read_text())["gate"]["passed"] is True
