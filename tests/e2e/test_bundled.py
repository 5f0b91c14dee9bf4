"""The bundled adapters: what ships, that our engine gives their golden tokens, and that their reports meet the bars."""

import json
from pathlib import Path

import pytest

from server.engine.engine import Engine
from server.model.source import DEMO_MODEL
from server.settings import Settings
from tests.oracle import adapter_ref, make_engine, request, run

FOLDERS = sorted(path.parent for path in Settings(_env_file=None).adapters_dir.glob("*/adapter_config.json"))
TIE = 1e-3  # logprobs within which another token than the golden one is excused
FILES = {
    "adapter_config.json", "adapter_model.safetensors", "recipe.yaml", "report.json", "report.html", "golden.json",
    "loss.png", "README.md",
}  # fmt: skip


@pytest.fixture(scope="module")
def engine() -> Engine:
    return make_engine(DEMO_MODEL)


def test_enough_of_them_ship() -> None:
    assert {"quotes", "wilde", "aurelius", "maxims", "devils-dictionary"} <= {folder.name for folder in FOLDERS}
    size = sum(file.stat().st_size for folder in FOLDERS for file in folder.iterdir())
    assert size < 8 * 2**20


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_each_is_whole_and_names_its_base(folder: Path) -> None:
    assert {file.name for file in folder.iterdir()} == FILES
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "models/demo"


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_the_engine_gives_the_golden_tokens(folder: Path, engine: Engine) -> None:
    """PEFT and transformers wrote them."""
    golden = json.loads((folder / "golden.json").read_text())
    ref = adapter_ref(DEMO_MODEL, folder)
    entries = golden["prompts"]
    assert entries
    done = run(
        engine,
        [
            request(i, e["prompt_token_ids"], ref, max_tokens=len(e["token_ids"]), logprobs=True, stream=False)
            for i, e in enumerate(entries)
        ],
    )
    for i, entry in enumerate(entries):
        output = done[str(i)]
        for got, expected, ours, theirs in zip(
            output.token_ids, entry["token_ids"], output.logprobs, entry["logprobs"], strict=True
        ):
            assert abs(ours - theirs) < TIE, entry["prompt"]
            if got != expected:
                break  # a tie; what follows it may differ


@pytest.mark.parametrize(("name", "prompts"), [("quotes", "heldout_authors"), ("wilde", "test"), ("aurelius", "test")])
def test_reported_rates_meet_the_bars(name: str, prompts: str) -> None:
    """On authors held out whole; a single voice on its own author's."""
    report = json.loads(next(f for f in FOLDERS if f.name == name).joinpath("report.json").read_text())
    rows = {(row["form"], row["metric"]): row for row in report["rows"] if row["prompts"] == prompts}
    for form in ("punctuated", "bare"):
        for metric, bar in (("eos_rate", 0.95), ("format_rate", 0.9)):
            row = rows[form, metric]
            assert row["n"] >= 200
            assert row["adapter"]["value"] >= bar, (form, metric)
            assert row["base"]["value"] <= 0.05, (form, metric)
