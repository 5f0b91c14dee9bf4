from collections.abc import Callable, Iterator

import pytest

from tests.engine.toy import Toy


@pytest.fixture
def toys() -> Iterator[Callable[..., Toy]]:
    made: list[Toy] = []
    yield lambda **limits: made.append(Toy(**limits)) or made[-1]
    for toy in made:
        for gate in toy.gates.values():
            gate.set()
        toy.engine.close()
