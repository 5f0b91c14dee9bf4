"""The bundled adapters pass their own golden prompts on the demo base, and nothing else passes for them."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from server.engine.engine import Engine
from server.engine.types import ErrorKind
from server.model.source import DEMO_MODEL
from server.settings import BUNDLED_ADAPTERS
from tests.oracle import adapter_ref, make_engine, request, run

FOLDERS = sorted(path.parent for path in BUNDLED_ADAPTERS.glob("*/golden.json"))


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    made = make_engine(DEMO_MODEL, dtype=request.param, max_model_len=64, max_batch_size=32)
    yield made
    made.close()


def refusals(engine: Engine, folders: list[Path]) -> list[str | None]:
    """Why each folder is refused; None if it serves."""
    requests = [
        request(i, [464], adapter_ref(DEMO_MODEL, folder), max_tokens=1, stream=False)
        for i, folder in enumerate(folders)
    ]
    done = run(engine, requests)
    for output in done.values():
        assert output.error_kind in (None, ErrorKind.ADAPTER_REFUSED), output.error
    return [done[str(i)].error for i in range(len(folders))]


def pretender(golden: Path, weights: Path, scale: float, folder: Path) -> Path:
    """A folder with the golden.json of one adapter and the weights of another, their effect multiplied by `scale`."""
    shutil.copytree(weights, folder)
    shutil.copy(golden / "golden.json", folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    config["lora_alpha"] *= scale
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_the_bundled_adapters_pass(engine: Engine) -> None:
    assert refusals(engine, FOLDERS) == [None] * len(FOLDERS)


@pytest.mark.parametrize(
    ("shift", "scale"), [(0, 1e-6), (0, 2), (1, 1)], ids=["the base", "a doubled lora_alpha", "another adapter"]
)
def test_nothing_else_passes_for_them(engine: Engine, tmp_path: Path, shift: int, scale: float) -> None:
    """An adapter whose effect is a millionth is the base in all but name."""
    others = FOLDERS[shift:] + FOLDERS[:shift]
    made = [pretender(a, b, scale, tmp_path / a.name) for a, b in zip(FOLDERS, others, strict=True)]
    for folder, error in zip(made, refusals(engine, made), strict=True):
        assert error is not None, folder.name
        assert error.startswith("golden.json: ")
