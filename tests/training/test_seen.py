"""What is measured was never trained on: whatever the seed, the filters, the origin, or how often one comes back."""

import json
from pathlib import Path

import pytest

from training import data, evaluate_command
from training.__main__ import main
from training.base import Base
from training.config import TrainConfig
from training.data import BEYOND, Corpus, load_corpus
from training.errors import DataError
from training.run import summary
from training.seen import HELD_OUT_SHARE, digest_of, learned_by, packed, place, set_aside

ROWS = [{"author": f"A{n % 2}", "quote": f"number {n}", "tags": ["all", f"t{n % 3}"]} for n in range(400)]


def file_of(folder: Path, rows: list[dict]) -> Path:
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def load(base: Base, source: Path, of: Path | None = None, **settings) -> Corpus:
    return load_corpus(TrainConfig("x", data=str(source), **settings), base, of=of)


def keys(rows: list[data.Example]) -> set[str]:
    return {row.key for row in rows}


def test_the_held_out_texts_follow_from_the_texts_alone(base: Base, tmp_path: Path) -> None:
    whole = load(base, file_of(tmp_path, ROWS))
    assert 8 <= len(whole.test) <= 35
    assert 8 <= len(whole.valid) <= 35
    assert all(place(row.key) < HELD_OUT_SHARE for row in whole.test)
    others = [
        load(base, file_of(tmp_path, ROWS), seed=7), load(base, file_of(tmp_path, ROWS[::-1] + GROWN)),
        load(base, file_of(tmp_path, ROWS), authors=("A1",)), load(base, file_of(tmp_path, ROWS), tags=("t2",)),
    ]  # fmt: skip
    for corpus in others:
        assert keys(corpus.test) | keys(corpus.valid)
        assert not (keys(corpus.test) | keys(corpus.valid)) & keys(whole.train)
        assert not keys(corpus.train) & (keys(whole.test) | keys(whole.valid))
    assert keys(others[0].test) == keys(whole.test)
    assert [row.key for row in others[0].train] != [row.key for row in whole.train], "the order is the seed's"


GROWN = [{"author": "A0", "quote": f"grown {n}", "tags": ["all"]} for n in range(50)]


@pytest.mark.parametrize(("n", "least"), [(3, 1), (10, 1), (29, 2), (40, 3)])
def test_few_rows_have_some_of_each(n: int, least: int, base: Base, tmp_path: Path) -> None:
    for start in range(0, 200, 40):
        corpus = load(base, file_of(tmp_path, ROWS[start : start + n]))
        assert min(len(corpus.test), len(corpus.valid)) >= least
        assert len(corpus.test) + len(corpus.valid) + len(corpus.train) == n
        assert len(corpus.train) > 0


def test_there_is_always_a_row_to_train_on() -> None:
    """However the texts' places fall: never more than half is set aside."""
    low = [text for text in map(str, range(2000)) if place(text) < HELD_OUT_SHARE]
    for n in range(2, 8):
        assert len(set_aside(low[:n], str, 0.0)) == n // 2
    assert set_aside(low[:1], str, 0.0) == []


def test_more_than_are_measured_are_left_out_and_told(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = load(base, file_of(tmp_path, ROWS))
    monkeypatch.setattr(data, "MAX_HELD_OUT", 5)
    corpus = load(base, file_of(tmp_path, ROWS))
    assert keys(corpus.train) == keys(whole.train), "no other run's held-out texts are learned"
    assert (len(corpus.test), len(corpus.valid)) == (5, 5)
    assert corpus.filtered[BEYOND] == len(whole.test) + len(whole.valid) - 10


def learned(folder: Path, texts: set[str]) -> Path:
    folder.mkdir()
    report = {"data": {"train_texts": packed(map(digest_of, texts))}}
    (folder / "report.json").write_text(json.dumps(report))
    assert learned_by(folder) == {digest_of(text) for text in texts}
    return folder


def test_what_the_adapter_has_learned_is_not_held_out(base: Base, tmp_path: Path) -> None:
    file = file_of(tmp_path, ROWS)
    plain = load(base, file)
    known = learned(tmp_path / "made", set(sorted(keys(plain.test))[:3]))
    corpus = load(base, file, of=known)
    assert keys(plain.test) - keys(corpus.test) == set(sorted(keys(plain.test))[:3])
    all_of_it = learned(tmp_path / "all", {f"number {n}" for n in range(400)})
    with pytest.raises(DataError, match="too few rows to test on some, which the adapter hasn't learned, of 400"):
        load(base, file, of=all_of_it)


def test_splits_lose_what_the_adapter_has_learned(base: Base, tmp_path: Path) -> None:
    for split, rows in (("train", ROWS[:20]), ("test", ROWS[20:25]), ("valid", ROWS[25:30])):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    corpus = load(base, tmp_path, of=learned(tmp_path / "made", {"number 21", "number 26", "number 3"}))
    assert "number 21" not in keys(corpus.test)
    assert (len(corpus.test), len(corpus.valid)) == (4, 4)
    assert corpus.filtered["held out here, learned before"] == 2


def test_a_folder_that_does_not_say_knows_of_nothing(tmp_path: Path) -> None:
    assert learned_by(tmp_path) is None
    (tmp_path / "report.json").write_text('{"data": {}}')
    assert learned_by(tmp_path) is None


def test_a_run_records_what_it_learned_and_all_after_it_hold_out_nothing_of_that(
    tiny_base: Path, quotes_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trained on one author, gone on with another, and measured on all: through the commands."""
    run = ["--output", str(tmp_path), "--model", str(tiny_base), "--data", str(quotes_file), "--eval-samples", "2",
           "--epochs", "0.2"]  # fmt: skip
    assert main(["--name", "one", "--author", "Author 1", *run]) == 0
    one = learned_by(tmp_path / "one")
    assert one is not None
    assert 10 <= len(one) <= 18, "of 20 rows"
    assert main(["--name", "two", "--author", "Author 2", "--init-from", str(tmp_path / "one"), *run]) == 0
    two = learned_by(tmp_path / "two")
    assert two is not None
    assert one < two
    corpora: list[Corpus] = []
    plain = data.load_corpus

    def noted(*args, **more) -> Corpus:
        corpora.append(plain(*args, **more))
        return corpora[-1]

    monkeypatch.setattr(data, "load_corpus", noted)
    assert evaluate_command.main([str(tmp_path / "two"), "--data", str(quotes_file), "--eval-samples", "2"]) is None
    (corpus,) = corpora
    assert len(corpus.train) + len(corpus.valid) + len(corpus.test) == 80
    assert not {digest_of(row.key) for row in [*corpus.test, *corpus.valid]} & two


def test_a_text_is_known_under_any_template(base: Base, tmp_path: Path) -> None:
    file = file_of(tmp_path, ROWS)
    plain = load(base, file)
    for settings in (
        {"prompt": "Quote by"},
        {"template": "Maxim: {quote}"},
        {"template": "A quote: {quote} -- {author}"},
    ):
        other = load(base, file, **settings)
        assert [row.key for row in other.test] == [row.key for row in plain.test]
        assert not other.skipped


def test_an_origin_that_does_not_say_what_it_learned_is_told(base: Base, tmp_path: Path) -> None:
    corpus = load(base, file_of(tmp_path, ROWS), of=tmp_path / "elsewhere")
    assert corpus.unsaid == [str(tmp_path / "elsewhere")]
    said = summary(TrainConfig("x"), corpus)
    assert f"what {tmp_path / 'elsewhere'} was trained on isn't in its report" in said
