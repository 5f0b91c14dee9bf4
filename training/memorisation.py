"""What of the training texts a sample repeats word for word. Words are those of `texts.normalised`.

A run of words that a sample shares with one training text is found through an index of all runs of SEED words: rare
enough to have few places, each of which is then followed to its end. Shorter runs are looked up in sets.
"""

from collections.abc import Collection, Sequence

from training.seen import digest_of

SEED = 4
NEAR = 0.9
NEAR_WORDS = 8
COPY = (
    f"a sample that is, in its letters and digits, a training text; or, where both have {NEAR_WORDS} words or more, "
    f"shares a subsequence of words with one that makes up more than {NEAR:.0%} of the words of both together"
)


class Memory:
    """An index of training texts, each given normalised: words joined by single spaces.

    `learned`: digests of texts that were learned before, of which only whole copies can be told.
    """

    def __init__(self, texts: Sequence[str], learned: Collection[bytes] = ()) -> None:
        self.learned = learned
        self._texts = [text.split() for text in texts]
        self._whole = {" ".join(words) for words in self._texts}
        self._short: list[set[tuple[str, ...]]] = [set() for _ in range(SEED)]  # [n]: the runs of n words
        self._places: dict[tuple[str, ...], list[tuple[int, int]]] = {}  # run of SEED words -> (text, first word)
        for number, words in enumerate(self._texts):
            for size in range(1, SEED):
                self._short[size].update(_windows(words, size))
            for start, window in enumerate(_windows(words, SEED)):
                self._places.setdefault(window, []).append((number, start))

    def longest(self, words: Sequence[str]) -> int:
        """How many words the longest run has that is also a run of one training text."""
        best = 0
        for start, window in enumerate(_windows(words, SEED)):
            for number, place in self._places.get(window, ()):
                text, length = self._texts[number], SEED
                room = min(len(words) - start, len(text) - place)
                while length < room and words[start + length] == text[place + length]:
                    length += 1
                best = max(best, length)
        if best:
            return best
        sizes = range(SEED - 1, 0, -1)
        return next((size for size in sizes if not self._short[size].isdisjoint(_windows(words, size))), 0)

    def copied(self, words: Sequence[str]) -> bool:
        """Whether the sample is a copy, as COPY defines it."""
        if not words:
            return False
        whole = " ".join(words)
        if whole in self._whole or digest_of(whole) in self.learned:
            return True
        if len(words) < NEAR_WORDS:
            return False
        # So near a text always shares a run of SEED words: it has too few changes to break all of them.
        near = {number for window in _windows(words, SEED) for number, _ in self._places.get(window, ())}
        return any(_alike(words, self._texts[number]) for number in near)


def _alike(a: Sequence[str], b: Sequence[str]) -> bool:
    both = len(a) + len(b)
    if len(b) < NEAR_WORDS or 2 * min(len(a), len(b)) <= NEAR * both:
        return False
    return 2 * common_subsequence(a, b) > NEAR * both


def common_subsequence(a: Sequence[str], b: Sequence[str]) -> int:
    """How many words the longest common subsequence has."""
    row = [0] * (len(b) + 1)
    for word in a:
        diagonal = 0
        for j, other in enumerate(b, start=1):
            diagonal, row[j] = row[j], diagonal + 1 if word == other else max(row[j], row[j - 1])
    return row[-1]


def _windows(words: Sequence[str], size: int) -> list[tuple[str, ...]]:
    return [tuple(words[i : i + size]) for i in range(len(words) - size + 1)]
