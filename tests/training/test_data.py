"""Rows from files: every one is used, filtered or reported with its place and reason."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from training.base import Base, open_base
from training.config import TrainConfig
from training.data import Corpus, load_corpus
from training.errors import BaseError, DataError

GOOD = [{"author": "A", "quote": f"number {n}"} for n in range(6)]


def load(base: Base, source: Path, **settings) -> Corpus:
    return load_corpus(TrainConfig("x", data=str(source), **settings), base)


def jsonl(path: Path, rows: list) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def texts(corpus: Corpus) -> list[str]:
    splits = (corpus.train, corpus.valid, corpus.test)
    return sorted(example.fields["quote"] for split in splits for example in split)


@pytest.mark.parametrize("kind", ["jsonl", "csv", "tsv", "parquet"])
def test_formats_agree(kind: str, base: Base, tmp_path: Path) -> None:
    file = tmp_path / f"data.{kind}"
    if kind == "jsonl":
        jsonl(file, GOOD)
    elif kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(GOOD), file)
    else:
        mark = "," if kind == "csv" else "\t"
        file.write_text("".join(mark.join(row) + "\n" for row in [("author", "quote"), *(r.values() for r in GOOD)]))
    corpus = load(base, file)
    assert texts(corpus) == [row["quote"] for row in GOOD]
    assert not corpus.skipped


def test_unusable_rows_are_reported_by_line_and_reason(base: Base, tmp_path: Path) -> None:
    rows = [
        *GOOD,
        "{not json",
        '["a list"]',
        {"author": "A"},
        {"author": "", "quote": "nobody's"},
        {"author": "B", "quote": "Number,  3!"},
        {"author": "A", "quote": "word " * 35 + "end"},
        {"author": "A", "quote": "half a \ud800 pair"},
        {"author": "A", "quote": "an end<|endoftext|> in the middle"},
        {"author": "A", "quote": "..."},
    ]
    corpus = load(
        base, jsonl(tmp_path / "data.jsonl", rows), template='Quote by {author}, who said: "{quote}" ' + "x " * 20
    )
    assert [(row.line, row.reason) for row in corpus.skipped] == [
        (7, "unreadable row"), (8, "unreadable row"), (9, "missing field"), (10, "missing field"),
        (11, "duplicate"), (12, "longer than the context"), (13, "not valid Unicode"),
        (14, "holds the token that ends a text"), (15, "without a letter or digit"),
    ]  # fmt: skip
    assert corpus.skipped[4].detail == "the same text as data.jsonl:4"
    assert "tokens; the base takes 64" in corpus.skipped[5].detail


def test_splits_that_share_texts_are_refused_as_leaking(base: Base, tmp_path: Path) -> None:
    jsonl(tmp_path / "train.jsonl", [*GOOD, {"author": "A", "quote": "held"}, {"author": "B", "quote": "Number 1"}])
    jsonl(tmp_path / "test.jsonl", [{"author": "A", "quote": "Number 2."}])
    jsonl(tmp_path / "heldout_authors.jsonl", [{"author": "Z", "quote": "Held!"}])
    with pytest.raises(DataError) as caught:
        load(base, tmp_path)
    assert str(caught.value) == (
        f"--data {tmp_path}: its splits leak, 2 of their texts are in two of them (train.jsonl:3 is the same text as "
        "test.jsonl:1; train.jsonl:7 is the same text as heldout_authors.jsonl:1). Remove each from one of them, or "
        "give one file with all rows: it is split without leaks"
    )
    jsonl(tmp_path / "heldout_authors.jsonl", [{"author": "Z", "quote": "nowhere else"}])
    jsonl(tmp_path / "test.jsonl", [{"author": "A", "quote": "nor this"}])
    corpus = load(base, tmp_path)
    assert [(row.line, row.reason, row.detail) for row in corpus.skipped] == [
        (8, "duplicate", "the same text as train.jsonl:2")
    ]
    assert [e.key for e in corpus.test] == ["nor this"]


def test_one_split_is_one_file(base: Base, tmp_path: Path) -> None:
    for name in ("train", "valid", "dev"):
        jsonl(tmp_path / f"{name}.jsonl", GOOD)
    with pytest.raises(DataError, match=r"dev.jsonl and valid.jsonl are one split; keep one of them"):
        load(base, tmp_path)
    (tmp_path / "valid.jsonl").unlink()
    (tmp_path / "dev.jsonl").write_text("\n")
    with pytest.raises(DataError, match=r"dev.jsonl: is empty"):
        load(base, tmp_path)


def test_a_folder_with_a_file_of_no_split_is_refused(base: Base, tmp_path: Path) -> None:
    jsonl(tmp_path / "train.jsonl", GOOD[:4])
    jsonl(tmp_path / "val.jsonl", GOOD[4:])
    assert len(load(base, tmp_path).valid) == 2
    jsonl(tmp_path / "more.jsonl", GOOD)
    with pytest.raises(DataError, match=r"more.jsonl is named after no split \(train, valid"):
        load(base, tmp_path)


def test_filters_and_columns(base: Base, tmp_path: Path) -> None:
    rows = [
        {"who": "A" if n % 2 else "B", "text": f"line {n}" + "!" * n, "tags": "x, y" if n < 8 else []}
        for n in range(12)
    ]
    file = jsonl(tmp_path / "data.jsonl", rows)
    names = {"author": "who", "quote": "text"}
    corpus = load(base, file, columns=names, authors=("A",), tags=("y",), max_chars=11)
    assert texts(corpus) == ["line 1!", "line 3!!!", "line 5!!!!!"]
    assert corpus.filtered == {"--author": 6, "--tag": 2, "--max-chars": 1}
    assert len(load(base, file, columns=names, limit=4).train) == 4


def test_examples_end_in_eos_and_know_their_prompt(base: Base, tmp_path: Path) -> None:
    example = load(base, jsonl(tmp_path / "data.jsonl", GOOD)).train[0]
    text = base.tokenizer.decode(example.token_ids)
    assert text == f'Quote by A: "{example.fields["quote"]}"<|endoftext|>'
    assert base.tokenizer.decode(example.token_ids[: example.prompt_length]) == "Quote by A:"
    assert base.tokenizer.decode(example.token_ids[: example.bare_length]) == "Quote by A"


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        ([], {}, "data.jsonl: is empty"),
        (["nonsense"], {}, "no usable row; data.jsonl line 1: not valid JSON"),
        ([{"quote": "a"}], {}, "no column 'author'; it has 'quote'"),
        ([{"author": "A", "quotes": "a"}], {}, "--column quote=quotes"),
        ([{"who": "A", "text": "a"}], {}, "Say which it is: --column author=COLUMN --column quote=COLUMN"),
        ([{**row, "tags": ["love"]} for row in GOOD], {"tags": ("loev",)}, "has this tag; nearest: 'love' (6 rows)"),
        ([{"author": "", "quote": "a"}], {}, "left out: 1 missing field"),
        (GOOD, {"max_chars": 2}, "left out: 6 by --max-chars"),
        (GOOD, {"authors": ("a",)}, "--author 'a': no row of"),
        ([*GOOD, {"quote": "nobody's"}], {"authors": ("None",)}, "nearest: 'A' (6 rows)"),
        (GOOD[:2], {}, "2 usable rows; give at least 3"),
    ],
)
def test_a_file_without_usable_rows_is_an_error(rows, settings, message: str, base: Base, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        load(base, jsonl(tmp_path / "data.jsonl", rows), **settings)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\xef\xbb\xbf\n", "is empty"),
        (b"author,quote\n", r"has a header \(author, quote\) and no rows"),
        (b"author,quote,quote\nA,b,c\n", "two of its columns are named 'quote'; rename one"),
        (b"author;quote\nA;b\n", "columns are separated by ';', not by ','; save it with commas"),
        ("author,quote\nA,d\u00e9j\u00e0\n".encode("latin1"), r"line 2 is not UTF-8 \(byte 0xe9, 'é' if.*-f LATIN1"),
        ("author,quote\nA,\u201chi\u201d\n".encode("cp1252"), r"line 2 is not UTF-8 \(byte 0x93, '“'.*WINDOWS-1252"),
        ("author,quote\nA,b\n".encode("utf-16"), "is UTF-16, not UTF-8; .*iconv -f UTF-16 -t UTF-8 data.csv"),
        ("author,quote\nA,b\n".encode("utf-16-be"), "is UTF-16BE, not UTF-8"),
        ("author,quote\nA,b\n".encode("utf-32"), "is UTF-32, not UTF-8"),
    ],
)
def test_a_file_that_is_no_table_of_utf8_is_told_what_it_is(
    content: bytes, message: str, base: Base, tmp_path: Path
) -> None:
    (tmp_path / "data.csv").write_bytes(content)
    with pytest.raises(DataError, match=message):
        load(base, tmp_path / "data.csv")


def test_a_cell_that_is_too_long_leaves_out_its_row(base: Base, tmp_path: Path) -> None:
    rows = "".join(f"A,number {n}\n" for n in range(6))
    (tmp_path / "data.csv").write_text(f"author,quote\nA,{'long ' * 40_000}\n{rows}")
    corpus = load(base, tmp_path / "data.csv")
    assert texts(corpus) == [row["quote"] for row in GOOD]
    assert corpus.filtered == {"--max-chars": 1}


def test_a_quote_is_known_by_itself_wherever_the_author_stands(base: Base, tmp_path: Path) -> None:
    rows = [{"author": "A", "quote": text} for text in ("one long text", "_one long text_", "another text", "a third")]
    corpus = load(base, jsonl(tmp_path / "data.jsonl", rows), template="{quote} -- {author}", prompt="{quote}")
    assert [(row.line, row.reason) for row in corpus.skipped] == [(2, "duplicate")]


def test_other_formats_are_named(base: Base, tmp_path: Path) -> None:
    (tmp_path / "data.xlsx").write_bytes(b"PK")
    with pytest.raises(DataError, match=r"can't tell the format.*\.jsonl"):
        load(base, tmp_path / "data.xlsx")
    pyarrow.parquet.write_table(pyarrow.table({"author": [], "quote": []}), tmp_path / "data.parquet")
    with pytest.raises(DataError, match=r"data.parquet: has no rows"):
        load(base, tmp_path / "data.parquet")


def test_a_base_that_is_no_gpt2_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BaseError, match=r"no such directory.*leave --model out for the demo base"):
        open_base("./nowhere")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(BaseError, match="is a 'llama' model"):
        open_base(str(tmp_path))


def test_an_unreachable_hub_is_told_with_the_way_out(tmp_path: Path) -> None:
    """In a process of its own: the hub's address is read once, at import."""
    environment = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "hf")}
    script = "import json, sys; from training.__main__ import main; sys.exit(sum(map(main, json.loads(sys.argv[1]))))"
    run = ["--name", "x", "--output", str(tmp_path / "out")]
    runs = [[*run, "--model", "openai-community/gpt2-medium"], [*run, "--data", "someone/quotes"]]
    done = subprocess.run(
        [sys.executable, "-c", script, json.dumps(runs)],
        env=environment, capture_output=True, text=True, timeout=240, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 4, done.stderr
    of_model, of_data = (line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert "the hub can't be reached" in of_model
    assert "leave --model out" in of_model
    assert "no data set of this id could be loaded from the hub" in of_data
    assert "the hub can't be reached" in of_data
    assert "leave --data out" in of_data
    assert "Retrying" not in done.stderr, "nobody waits for half a minute to be told"
