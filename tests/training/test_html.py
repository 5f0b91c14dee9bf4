"""The pages: whole, without any other host, and deaf to what a text says."""

import json
import random
from html.parser import HTMLParser
from pathlib import Path

import pytest

from adapters.adapter import BaseShape
from adapters.folders import Folders
from server.model.config import GPT2Config
from tests.training.test_run import flags
from training.__main__ import main
from training.base import Base
from training.choir_report import confusion, write_choir
from training.config import TrainConfig
from training.data import Corpus, Example, normalised
from training.evaluate import Evaluation, Row, Sampled
from training.figures import Written
from training.gate import judge
from training.intervals import Interval, Perplexities, Rate
from training.run import Finished
from training.sampling import SamplingSettings
from training.voice import History

HOSTILE = "</style><script>x</script>&\"'"
VOID = {"meta", "br", "img", "link", "hr", "input"}


class Page(HTMLParser):
    """Every tag is closed in its order; what would be fetched or run is noted."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.fetched: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []
        assert "url(http" not in text
        assert "@import" not in text

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            assert not name.startswith("on"), f"{tag} has {name}"
            if name in ("src", "href", "xlink:href", "srcset", "data") and not str(value).startswith("#"):
                (self.links if tag == "a" else self.fetched).append(str(value))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def hostile(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostile")
    rng = random.Random(0)
    rows = [{"author": HOSTILE, "quote": f"<img onerror=x> {rng.randrange(999)} {i}"} for i in range(20)]
    rows += [{"author": "B", "quote": f"{rng.randrange(999)} and {i}"} for i in range(20)] + [{"author": HOSTILE}]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = flags("voice", folder, tiny_base, folder / "rows.jsonl", "--author", HOSTILE, "--max-chars", "150")
    assert main(run) == 0
    return folder / "voice"


def test_the_report_is_a_whole_page_and_hostile_texts_are_texts(hostile: Path) -> None:
    text = (hostile / "report.html").read_text()
    page = Page(text)
    assert page.fetched == []
    assert page.links == ["report.json"]
    assert "script" not in page.tags
    assert "img" not in page.tags
    assert page.tags.count("svg") == 2
    assert f"Quote by {HOSTILE}:" in page.text
    for word in ("Perplexity", "Stops by itself", "Style", "Recipe", "Left out by --author", "no gate"):
        assert word in page.text
    assert "var(--adapter)" in text
    assert "#050505" not in text


def test_the_report_json_says_it_all(hostile: Path) -> None:
    report = json.loads((hostile / "report.json").read_text(), parse_constant=pytest.fail)
    assert report["gate"] is None
    assert report["perplexity_ratio"]["test"].keys() == {"value", "low", "high", "examples", "tokens"}
    lengths = report["lengths"][0]
    assert lengths["training"].keys() == lengths["adapter"].keys() == {"p5", "p25", "p50", "p75", "p95"}
    assert report["style"]["trained_on"] == [report["data"]["used"]["train"], 18]
    assert report["style"]["of_voice"]["n"] == report["data"]["used"]["valid"] + report["data"]["used"]["test"]
    assert report["references"]["held_out_texts"].keys() >= {"n", "distinct_2", "longest_overlap"}


def member(name: str, words: str, output: Path, gate: dict[str, float] | None, own: bool = True) -> Finished:
    rng = random.Random(name)

    def example(i: int) -> Example:
        quote = " ".join(rng.choices(words.split(), k=6)) + f" {i}"
        return Example({"author": HOSTILE, "quote": quote}, [1] * 9, 3, 2, normalised(quote))

    corpus = Corpus([example(i) for i in range(30)], [example(30)], [example(i) for i in (31, 32)])
    texts = [row.fields["quote"] for row in corpus.train[:8]]
    of_adapter = [Written(f' "{text}"' if own else ' "zzz"', 7, True, True) for text in texts]
    of_base = [Written("plough furrow acre", 7, False, False)] * 8
    rows = [Row("eos_rate", "test", "punctuated", 8, 0, Rate.of(0, 8), Rate.of(8, 8))]
    one = Interval(10.0, 9.0, 11.0)
    compared = {"test": Perplexities(one, one, Interval(1.0, 0.9, 1.1), 2, 12)}
    sampled = [Sampled("test", "punctuated", ["x"] * 8, of_base, of_adapter, [7])]
    evaluation = Evaluation(rows, sampled, SamplingSettings(), compared, "none", {})
    config = TrainConfig(name, output=str(output), authors=(HOSTILE,), gate=gate)
    verdict = judge(gate, evaluation)
    folder = config.folder if verdict.passed else config.rejected
    return Finished(config, corpus, History(steps=3), evaluation, verdict, folder)


def test_a_choir_is_told_apart_and_written_as_files(tmp_path: Path, tiny_base: Path) -> None:
    members = [
        member("sea", "wave sail harbour gull tide", tmp_path, None),
        member("land", "plough acre barn furrow", tmp_path, {}),
        member("sky", "cloud star moon wind comet", tmp_path, None),
    ]  # fmt: skip
    (tmp_path / "sea").mkdir()
    summary = write_choir(tmp_path, HOSTILE, members, [("fire", HOSTILE)])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["choir.html", "choir.json", "sea"]
    report = json.loads((tmp_path / "choir.json").read_text())
    told = report["confusion"]
    assert told["voices"] == ["sea", "land", "sky"]
    assert told["accuracy"] == 1.0
    assert told["texts"] == [3, 3, 3]
    assert told["real"] == told["samples"] == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
    assert told["of_base"] == [0, 1, 0], "the base writes as the land does, whatever it is asked"
    assert [voice["gate"] for voice in report["voices"]] == ["none", "failed", "none"]
    assert [voice["report"] for voice in report["voices"]] == ["sea/report.html", None, None]
    page = Page((tmp_path / "choir.html").read_text())
    assert page.fetched == []
    assert page.links == ["sea/report.html", "choir.json"]
    assert "script" not in page.tags
    assert HOSTILE in page.text
    assert "perplexity_ratio is 1.1 and has to be below 1" in page.text
    lines = summary.splitlines()
    assert [line.split()[0] for line in lines] == ["voice", "sea", "land", "sky", "fire", "told"]
    assert "right on 100.0% of real held-out texts (chance 33.3%)" in lines[-1]


def test_a_text_that_a_voice_learned_or_that_two_hold_out_tells_nobody_apart(tmp_path: Path) -> None:
    sea, land = (member(name, words, tmp_path, None) for name, words in (("sea", "wave sail"), ("land", "barn acre")))
    sea.corpus.test[0] = land.corpus.train[0]
    sea.corpus.test[1] = land.corpus.test[1]
    told = confusion([sea, land])
    assert not isinstance(told, str)
    assert told.texts == [1, 2]


def test_one_voice_is_no_choir_to_be_told_apart_in(tmp_path: Path) -> None:
    alone = [member("sea", "wave sail harbour", tmp_path, None)]
    assert "it takes two voices" in str(confusion(alone))
    assert "Not measured: it takes two voices" in Page(_page(tmp_path, alone)).text
    assert write_choir(tmp_path, "base", [], [("x", "no rows")]).splitlines()[1] == "x     failed: no rows"


def _page(output: Path, members: list[Finished]) -> str:
    write_choir(output, "base", members, [])
    return (output / "choir.html").read_text()


def test_a_server_takes_the_folder_and_leaves_the_choirs_files_alone(
    hostile: Path, tiny_base: Path, base: Base
) -> None:
    write_choir(hostile.parent, "base", [], [])
    shape: BaseShape = GPT2Config.read(tiny_base).adapter_shape
    folders = Folders(hostile.parent, shape, frozenset())
    assert [folder.name for folder in folders.scan()] == ["voice"]
    assert folders.digest("voice") is not None
