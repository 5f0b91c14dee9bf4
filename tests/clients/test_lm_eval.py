"""lm-evaluation-harness scores us as it scores transformers on the same checkpoint."""

import json
from typing import Any

import pytest

from server.model.source import DEMO_MODEL
from tests.api.conftest import ServerProcess
from tests.clients.conftest import KEY
from tests.clients.environments import run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def found(served: ServerProcess) -> dict[str, Any]:
    out = run("lm-eval", "lm_eval_client.py", served.url, str(DEMO_MODEL), env={"OPENAI_API_KEY": KEY}, seconds=900)
    return json.loads(out.rsplit("FOUND ", 1)[1])


def test_the_likelihood_of_each_choice_and_whether_it_is_greedy(found: dict[str, Any]) -> None:
    ours, theirs = (found[side]["answers"]["chorus_choice"] for side in ("http", "transformers"))
    assert sum(map(len, ours)) >= 12
    for mine, yours in zip(ours, theirs, strict=True):
        for ((got, greedy),), ((expected, also),) in zip(mine, yours, strict=True):
            assert float(got) == pytest.approx(float(expected), abs=1e-3)
            assert greedy == also
    assert found["http"]["results"]["chorus_choice"] == found["transformers"]["results"]["chorus_choice"]


def test_perplexity(found: dict[str, Any]) -> None:
    ours, theirs = (found[side]["results"]["chorus_rolling"] for side in ("http", "transformers"))
    assert ours["word_perplexity,none"] == pytest.approx(theirs["word_perplexity,none"], rel=1e-4)


def test_generation_until_a_stop_string(found: dict[str, Any]) -> None:
    assert found["http"]["answers"]["chorus_generate"] == found["transformers"]["answers"]["chorus_generate"]
