"""Voices that can be told apart are, and those that can't aren't; what the contrast of a run is."""

import json
import random
from pathlib import Path

import pytest

from training.base import Base
from training.config import TrainConfig
from training.data import load_corpus
from training.errors import DataError
from training.evaluate import style_judge
from training.style import StyleJudge, bare, why_not

SEA, LAND = "wave sail harbour gull tide anchor".split(), "plough acre barn furrow hedge clover".split()


def texts(words: list[str], n: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    return [f' "The {" ".join(rng.choices(words, k=6))}."' for _ in range(n)]


def test_different_voices_are_told_apart() -> None:
    judge = StyleJudge(texts(SEA, 40, 0), texts(SEA, 10, 1), texts(LAND, 60, 2), texts(LAND, 10, 3), "land", seed=0)
    assert judge.test.accuracy == 1.0
    assert judge.test.trained_on == (40, 60)
    assert (judge.test.of_voice.hits, judge.test.of_others.hits) == (10, 0)
    assert judge.rate([*texts(SEA, 3, 4), *texts(LAND, 1, 5)]).value == 0.75


def test_like_voices_are_not() -> None:
    judge = StyleJudge(texts(SEA, 60, 0), texts(SEA, 60, 1), texts(SEA, 60, 2), texts(SEA, 60, 3), "itself", seed=0)
    assert 0.35 < judge.test.accuracy < 0.65


def test_only_what_is_between_letters_counts() -> None:
    assert bare(': "“Well,\n said he!”"') == "Well, said he"
    assert bare(' "..."') == ""


def test_too_few_texts_are_said_to_be() -> None:
    enough = (["x"] * 10, ["x"] * 2)
    assert why_not(enough, enough) is None
    assert "9 texts of this voice" in str(why_not((["x"] * 9, ["x"] * 2), enough))
    assert "1 held out" in str(why_not(enough, (["x"] * 10, ["x"])))


def write(folder: Path, **splits: list[tuple[str, str]]) -> str:
    folder.mkdir()
    for split, rows in splits.items():
        lines = [json.dumps({"author": author, "quote": quote}) for author, quote in rows]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return str(folder)


def test_the_contrast_is_what_the_filter_left_out_by_its_own_splits(base: Base, tmp_path: Path) -> None:
    ours = {split: [("Sea", f"{split} sea {i}") for i in range(n)] for split, n in (("train", 20), ("test", 3))}
    others = {split: [("Land", f"{split} land {i}") for i in range(n)] for split, n in (("train", 30), ("test", 4))}
    others["train"] += [("Land", "test land 1"), ("Land", "Train sea 7!"), ("Land", "x" * 300)]  # held out, ours, long
    data = write(tmp_path / "data", **{split: ours[split] + others[split] for split in ours})
    config = TrainConfig("x", data=data, authors=("Sea",))
    contrast = load_corpus(config, base).contrast
    assert sorted(contrast.train) == sorted(f' "train land {i}"' for i in range(30))
    assert sorted(contrast.held_out) == [f' "test land {i}"' for i in range(4)]
    assert "that --author left out" in contrast.source
    assert not any("Land" in text or "Sea" in text for text in contrast.train), "a name is no style"


def test_where_nothing_is_left_to_tell_it_apart_from_the_reason_is_given(base: Base) -> None:
    config = TrainConfig("x", limit=20)
    assert "no other to tell it apart from" in str(style_judge(load_corpus(config, base), config))


def test_other_data_is_told_apart_from_the_shipped_quotes_or_from_what_is_named(
    base: Base, tmp_path: Path, quotes_file: Path
) -> None:
    file = tmp_path / "words.jsonl"
    file.write_text("".join(json.dumps({"word": f"w{i}", "text": f"a thing of {i}"}) + "\n" for i in range(40)))
    template = {"data": str(file), "template": "{word}: {text}"}
    corpus = load_corpus(TrainConfig("x", **template), base)
    assert corpus.contrast.source == "training/corpora/quotes"
    assert len(corpus.contrast.train) > 5000
    named = load_corpus(TrainConfig("x", **template, contrast=str(quotes_file)), base).contrast
    assert len(named.train) + len(named.held_out) == 80
    assert 3 <= len(named.held_out) <= 20
    (tmp_path / "bad.csv").write_text("a,b\n1,2\n")
    with pytest.raises(DataError, match=r"--contrast .*: it has neither the column 'text' nor"):
        load_corpus(TrainConfig("x", **template, contrast=str(tmp_path / "bad.csv")), base)
    with pytest.raises(DataError, match=r"--contrast nowhere\.csv: there is no such file"):
        load_corpus(TrainConfig("x", **template, contrast="nowhere.csv"), base)
