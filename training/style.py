"""How far samples are taken for a voice: a small classifier of texts, and how good it is on texts it hasn't seen.

Character n-grams within words (1 to 4), weighted by TF-IDF, and a logistic regression with balanced classes. What it
sees is what stands between the first and the last letter or digit, so that a template's quotation marks tell nothing.
"""

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from training.intervals import Rate

LEAST_TEXTS = 10  # of each voice to learn from, and two to be judged on
MOST_TEXTS = 3000
DEFINITION = (
    "share of samples that a classifier of character n-grams, trained on the voice's training texts against other "
    "voices', takes for the voice"
)


@dataclass(frozen=True)
class StyleTest:
    """What the classifier is worth, on held-out texts of the voice and of the others."""

    contrast: str
    trained_on: tuple[int, int]  # texts of the voice, of the others
    accuracy: float  # balanced: the mean of the voice's recall and the others'
    of_voice: Rate  # held-out texts of the voice that it takes for the voice
    of_others: Rate  # held-out texts of others that it takes for the voice


class Classifier:
    """Tells voices apart by their texts. Seeded; a voice with many texts is learned from MOST_TEXTS of them."""

    def __init__(self, texts: Mapping[str, Sequence[str]], seed: int) -> None:
        from sklearn.feature_extraction.text import TfidfVectorizer  # imported late: it takes a second
        from sklearn.linear_model import LogisticRegression
        from sklearn.multiclass import OneVsRestClassifier

        some = {name: _some(sorted(of_voice), seed) for name, of_voice in texts.items()}
        self.trained_on = {name: len(of_voice) for name, of_voice in some.items()}
        self._features = TfidfVectorizer(analyzer="char_wb", ngram_range=(1, 4), sublinear_tf=True, min_df=2)
        regression: Any = LogisticRegression(class_weight="balanced", solver="liblinear", random_state=seed)
        self._model = OneVsRestClassifier(regression) if len(some) > 2 else regression
        labels = [name for name, of_voice in some.items() for _ in of_voice]
        self._model.fit(self._features.fit_transform([bare(t) for of in some.values() for t in of]), labels)

    def predict(self, texts: Sequence[str]) -> list[str]:
        """The voice that each text is taken for."""
        if not texts:
            return []
        return [str(name) for name in self._model.predict(self._features.transform([bare(t) for t in texts]))]


def bare(text: str) -> str:
    """`text` on one line, without what isn't a letter or digit at either end."""
    return " ".join(re.sub(r"^[\W_]+|[\W_]+$", "", text).split())


class StyleJudge:
    """Tells the voice (`train`, `held_out`: what it has to write) from the texts of `contrast`."""

    def __init__(
        self, train: Sequence[str], held_out: Sequence[str], other_train: Sequence[str],
        other_held_out: Sequence[str], contrast: str, seed: int,
    ) -> None:  # fmt: skip
        self._classifier = Classifier({"voice": train, "others": other_train}, seed)
        of_voice, of_others = self.rate(held_out), self.rate(other_held_out)
        self.test = StyleTest(
            contrast,
            (self._classifier.trained_on["voice"], self._classifier.trained_on["others"]),
            round((of_voice.value + 1 - of_others.value) / 2, 4),
            of_voice,
            of_others,
        )

    def rate(self, texts: Sequence[str]) -> Rate:
        """The share of `texts` taken for the voice."""
        return Rate.of(self._classifier.predict(texts).count("voice"), len(texts))


def why_not(voice: Sequence[Sequence[str]], others: Sequence[Sequence[str]]) -> str | None:
    """Why there are too few texts, each given as (to learn from, held out); None if there are enough."""
    for whose, (train, held_out) in (("this voice", voice), ("other voices", others)):
        if len(train) < LEAST_TEXTS or len(held_out) < 2:
            return (
                f"{len(train)} texts of {whose} to learn from and {len(held_out)} held out are too few: "
                f"it takes {LEAST_TEXTS} and 2"
            )
    return None


def _some(texts: list[str], seed: int) -> list[str]:
    return random.Random(seed).sample(texts, MOST_TEXTS) if len(texts) > MOST_TEXTS else texts
