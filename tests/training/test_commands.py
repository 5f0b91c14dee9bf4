"""evaluate, compare and export with adapters made elsewhere; pushing has tests of its own."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel

from server.tokenizer import Tokenizer
from tests.oracle import make_engine, request
from tests.oracle import run as run_engine
from training import compare
from training.__main__ import main
from training.base import open_base
from training.sampling import greedy


def made_with_peft(base: Path, folder: Path, **settings) -> Path:
    """An adapter as PEFT itself makes one, with an effect."""
    torch.manual_seed(5)
    model = get_peft_model(GPT2LMHeadModel.from_pretrained(base), LoraConfig(fan_in_fan_out=True, **settings))
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="module")
def adapters(tiny_base: Path, quotes_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """One of ours, with its report, and one of PEFT's with other targets, ranks by layer and one layer left out."""
    folder = tmp_path_factory.mktemp("adapters")
    run = [
        "--name", "ours", "--output", str(folder), "--model", str(tiny_base), "--data", str(quotes_file), "--rank", "2",
        "--epochs", "1", "--eval-samples", "4", "--author", "Author 1", "--template", "{author} says: {quote}",
    ]  # fmt: skip
    assert main(run) == 0
    uneven = {"target_modules": ["c_fc", "attn.c_proj"], "rank_pattern": {"h.0.mlp.c_fc": 3}, "use_rslora": True}
    return folder / "ours", made_with_peft(tiny_base, folder / "theirs", r=2, lora_alpha=3, **uneven)


def listing(folder: Path) -> dict[str, int]:
    return {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}


def test_evaluate_measures_adapters_of_any_make(
    adapters: tuple[Path, Path], tiny_base: Path, quotes_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ours, theirs = adapters
    before = listing(ours), listing(theirs)
    capsys.readouterr()
    output = tmp_path / "figures.json"
    flags = ["--model", str(tiny_base), "--data", str(quotes_file), "--output", str(output), "--eval-samples", "4"]
    assert main(["evaluate", str(ours), *flags, str(theirs)]) == 0
    printed = capsys.readouterr().out
    assert any(line.split() == ["ours", "theirs"] for line in printed.splitlines()), "a column for each"
    assert "left out by --author" not in printed, "another --data comes without the recorded one's filters"
    values = json.loads(output.read_text())["adapters"]
    assert [one["name"] for one in values] == ["ours", "theirs"]
    perplexity = [next(r for r in one["evaluation"]["rows"] if r["metric"] == "perplexity") for one in values]
    assert perplexity[0]["base"] != perplexity[0]["adapter"]
    assert values[0]["config"]["template"] == "{author} says: {quote}"
    assert values[1]["config"]["template"] == 'Quote by {author}: "{quote}"'
    assert (listing(ours), listing(theirs)) == before, "nothing is written into an adapter's folder"


def test_evaluate_again_gives_the_reports_figures(adapters: tuple[Path, Path], tmp_path: Path) -> None:
    ours = adapters[0]
    assert main(["evaluate", str(ours), "--output", str(tmp_path / "f.json")]) == 0
    report = json.loads((ours / "report.json").read_text())
    (again,) = json.loads((tmp_path / "f.json").read_text())["adapters"]
    assert again["evaluation"]["rows"] == report["rows"]


def test_evaluate_takes_a_test_set_alone(
    adapters: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is held against training texts then; what it has learned is left out all the same."""
    data = tmp_path / "data"
    data.mkdir()
    rows = [{"author": "Author 1", "quote": f"entirely new {n}"} for n in range(5)]
    (data / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = tmp_path / "found.json"
    assert main(["evaluate", str(adapters[0]), "--data", str(data), "--eval-samples", "2", "--output", str(file)]) == 0
    (found,) = json.loads(file.read_text())["adapters"]
    metrics = {row["metric"] for row in found["evaluation"]["rows"]}
    assert {"perplexity", "eos_rate", "distinct_2"} <= metrics
    assert not {"overlap_rate", "length_distance"} & metrics


@pytest.mark.parametrize("command", ["evaluate", "compare", "export"])
def test_what_is_no_adapter_is_refused(
    command: str, adapters: tuple[Path, Path], tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "p").write_text("A prompt\n")
    more = {"compare": ["--base", "--prompts", str(tmp_path / "p")], "export": ["--output", str(tmp_path / "out")]}

    def refused(folder: Path) -> str:
        assert main([command, str(folder), "--model", str(tiny_base), *more.get(command, [])]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    capsys.readouterr()
    assert "there is no such folder" in refused(tmp_path / "nowhere")
    pickled = Path(shutil.copytree(adapters[1], tmp_path / "pickled"))
    (pickled / "adapter_model.safetensors").rename(pickled / "adapter_model.bin")
    assert "adapter_model.bin is a pickle: convert it to safetensors" in refused(pickled)
    (pickled / "report.json").write_text("{")
    assert "report.json can't be read" in refused(pickled)
    assert not (tmp_path / "out").exists()


def test_compare_has_all_answer_with_the_same_seeds(
    adapters: tuple[Path, Path], tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "Author 1 says:"}\n\n{"prompt": "Quote by"}\n')
    run = ["compare", *map(str, adapters), "--model", str(tiny_base), "--prompts", str(prompts), "--max-tokens", "6"]
    output = tmp_path / "answers.json"
    assert main([*run, "base", "--samples", "2", "--output", str(output)]) == 0
    first, second = json.loads(output.read_text())["prompts"]
    assert first["prompt"] == "Author 1 says:"
    assert list(first["answers"]) == ["base", "ours", "theirs"]
    assert all(len(answers) == 2 for answers in second["answers"].values())
    assert first["answers"]["base"] != first["answers"]["theirs"]

    prompts.write_text('{"prompt": "Author 1 says:"}\n')
    again = tmp_path / "again.json"
    assert main([*run[:1], str(adapters[1]), *run[3:], "--base", "--samples", "2", "--output", str(again)]) == 0
    (alone,) = json.loads(again.read_text())["prompts"]
    assert alone["answers"]["theirs"] == first["answers"]["theirs"], "whoever else answers, to whatever else"

    capsys.readouterr()
    assert main([*run, "--greedy", "--output", str(tmp_path / "answers.md")]) == 0
    assert "(token limit)" in capsys.readouterr().out
    assert "| ours | theirs |" in (tmp_path / "answers.md").read_text()


def test_answers_stand_side_by_side_where_there_is_room() -> None:
    answers = {
        "wilde": [compare.Answer("one two three four five six seven eight\nnine", compare.STOPPED, 9)],
        "aurelius": [compare.Answer("up and up \x1b[31m", compare.LIMIT, 64)],
    }
    wide = compare.for_terminal([compare.Answered("Quote by X:", answers)], 70).splitlines()
    assert wide[0] == "Quote by X:"
    assert wide[1].split() == ["wilde", "|", "aurelius"]
    assert wide[3] == "one two three four five six seven | up and up [31m ... (token limit)"
    assert wide[4] == "eight\\nnine <EOS>                 |"
    narrow = compare.for_terminal([compare.Answered("Quote by X:", answers)], 40).splitlines()
    assert all(len(line) <= 40 for line in narrow)
    assert narrow[1].startswith("  wilde    | one two")
    table = compare.as_markdown([compare.Answered("a|b", {"x": [compare.Answer("c|d", compare.STOPPED, 1)]})])
    assert table.splitlines() == ["## a\\|b", "", "| x |", "|---|", "| c\\|d &lt;EOS> |"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--temperature", "0"], "give a number above 0, or --greedy"),
        (["--greedy", "--samples", "2"], "leave --samples out"),
        (["--output", "x.txt"], "name it .md or .json"),
        ([], "give two adapters or more, or one and --base"),
    ],
)
def test_compare_names_a_bad_flag(
    flags: list[str], message: str, adapters: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "p").write_text("x\n")
    assert main(["compare", str(adapters[0]), "--prompts", str(tmp_path / "p"), *flags]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", "\n \n", "holds no prompt"),
        ("p.jsonl", '{"prompt": "a"}\n{"text": "b"}\n', "line 2 is not a JSON object with a text as its `prompt`"),
        ("p.txt", "word " * 80, "tokens; the base takes 1 to 63"),
    ],
)
def test_bad_prompts_are_named(
    name: str, content: str, message: str, adapters: tuple[Path, Path], tiny_base: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / name).write_text(content)
    flags = ["--base", "--model", str(tiny_base), "--prompts", str(tmp_path / name)]
    assert main(["compare", str(adapters[0]), *flags]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("which", [0, 1])
def test_an_exported_checkpoint_has_the_adapters_logits(
    which: int, adapters: tuple[Path, Path], tiny_base: Path, tmp_path: Path
) -> None:
    output = tmp_path / "merged"
    assert main(["export", str(adapters[which]), "--model", str(tiny_base), "--output", str(output)]) == 0
    assert [folder.name for folder in tmp_path.iterdir()] == ["merged"]
    base = open_base(str(tiny_base))
    ids = torch.tensor([base.encode("Author 1 says: the sea a man")])
    unmerged = PeftModel.from_pretrained(GPT2LMHeadModel.from_pretrained(tiny_base), str(adapters[which])).eval()
    with torch.no_grad():
        expected = unmerged(input_ids=ids).logits[0]
        merged = AutoModelForCausalLM.from_pretrained(output)(input_ids=ids).logits[0]
    assert (merged - expected).abs().max() < 1e-5
    assert AutoTokenizer.from_pretrained(output)("the sea")["input_ids"] == base.encode("the sea")
    prompt = base.encode("Author 1 says:")
    tokens, _ = greedy(unmerged, prompt, base.eos, 8)
    outputs = run_engine(make_engine(output), [request("x", prompt, max_tokens=8)])
    assert list(outputs["x"].token_ids) == tokens, "the server takes it as its --model"
    assert Tokenizer(output).encode("the sea") == base.encode("the sea")
    card = (output / "README.md").read_text()
    assert base.weights_sha256() in card
    assert "digest `" in card
    assert str(tiny_base.parent) not in (output / "config.json").read_text()


def test_export_rounds_when_told_and_replaces_only_a_checkpoint(
    adapters: tuple[Path, Path], tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "merged"
    run = ["export", str(adapters[1]), "--model", str(tiny_base), "--output", str(output), "--dtype", "bfloat16"]
    assert main(run) == 0
    assert "its logits differ from the unmerged adapter's by" in capsys.readouterr().out
    assert AutoModelForCausalLM.from_pretrained(output, dtype="auto").dtype is torch.bfloat16
    assert main(run) == 2
    assert "exists: choose another --output, or --overwrite" in capsys.readouterr().err
    assert main([*run, "--overwrite"]) == 0
    (output / "mine").mkdir()
    assert main([*run, "--overwrite"]) == 2
    assert "is no checkpoint's folder" in capsys.readouterr().err
    copy = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    assert main(["export", str(adapters[1]), "--model", str(copy), "--output", str(copy), "--overwrite"]) == 2
    assert "is what is merged" in capsys.readouterr().err
