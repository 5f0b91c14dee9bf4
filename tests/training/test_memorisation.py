"""Overlaps and copies against brute force."""

import random
import time

import pytest

from training.memorisation import NEAR, NEAR_WORDS, Memory, common_subsequence
from training.seen import digest_of


def longest_by_force(words: list[str], texts: list[list[str]]) -> int:
    runs = {tuple(words[i:j]) for i in range(len(words)) for j in range(i + 1, len(words) + 1)}
    return max(
        (len(run) for run in runs for text in texts
         if any(tuple(text[i : i + len(run)]) == run for i in range(len(text) - len(run) + 1))),
        default=0,
    )  # fmt: skip


def copied_by_force(words: list[str], texts: list[list[str]]) -> bool:
    return words in texts or any(
        min(len(words), len(text)) >= NEAR_WORDS
        and 2 * common_subsequence(words, text) > NEAR * (len(words) + len(text))
        for text in texts
    )


def changed(text: list[str], changes: int, rng: random.Random) -> list[str]:
    words = list(text)
    for _ in range(changes):
        place = rng.randrange(len(words))
        words[place : place + rng.randint(0, 1)] = rng.choice(([], ["new"], ["new", "words"]))
        words = words or ["new"]
    return words


def test_a_text_that_was_learned_before_is_known_by_its_digest() -> None:
    memory = Memory(["of this run"], {digest_of("of another run")})
    assert memory.copied("of another run".split())
    assert memory.longest("of another run".split()) == 1
    assert not memory.copied("of no run".split())


def test_it_is_what_brute_force_finds() -> None:
    rng = random.Random(1)
    texts = [rng.choices("abcdefghij", k=rng.randint(1, 25)) for _ in range(30)]
    memory = Memory([" ".join(text) for text in texts])
    samples = [rng.choices("abcdefghijxyz", k=rng.randint(1, 25)) for _ in range(60)]
    samples += [changed(rng.choice(texts), rng.randint(0, 4), rng) for _ in range(200)]
    for words in samples:
        assert memory.longest(words) == longest_by_force(words, texts)
        assert memory.copied(words) == copied_by_force(words, texts)
    assert 20 < sum(map(memory.copied, samples)) < 200, "the test has to see both"


@pytest.mark.parametrize(
    ("a", "b", "length"), [("", "a", 0), ("a b c", "a b c", 3), ("a x b y c", "a b z c", 3), ("a b", "b a", 1)]
)
def test_common_subsequences(a: str, b: str, length: int) -> None:
    assert common_subsequence(a.split(), b.split()) == length


def test_runs_do_not_cross_texts_and_nothing_is_no_copy() -> None:
    memory = Memory(["a b c d", "e f g h"])
    assert memory.longest("c d e f".split()) == 2
    assert memory.longest([]) == 0
    assert not memory.copied([])
    assert memory.copied("a b c d".split())
    assert not memory.copied("a b c".split())


def test_nine_thousand_texts_and_as_many_samples_as_a_report_has_are_quick() -> None:
    rng = random.Random(2)
    words = [f"w{int(rng.paretovariate(0.7))}" for _ in range(9000 * 18)]  # a few words are most of all, as in speech
    texts = [words[i : i + 18] for i in range(0, len(words), 18)]
    started = time.process_time()
    memory = Memory([" ".join(text) for text in texts])
    for _ in range(800):
        sample = [f"w{int(rng.paretovariate(0.7))}" for _ in range(25)]
        memory.longest(sample)
        memory.copied(sample)
    assert time.process_time() - started < 20
