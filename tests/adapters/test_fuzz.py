"""Whatever a folder or an archive holds, the readers take it or refuse it: nothing else comes out of them.

What they take, the safetensors library reads too, and with the same values.
"""

import json
import shutil
import struct
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from adapters.archive import unpack
from adapters.errors import AdapterRefused, AdapterUnavailable
from adapters.lora_config import CONFIG_FILE
from adapters.tensorfile import open_tensors
from adapters.validation import WEIGHTS_FILE, inspect_adapter
from adapters.values import check_values
from tests.adapters.archives import files_of, tar_of, zip_of
from tests.adapters.support import CONFIG, SHAPE, write_adapter

SLOW_SECONDS = 60
ROOT = Path(tempfile.mkdtemp())
GOOD = files_of(write_adapter(ROOT / "good"))
ARCHIVES = [
    tar_of(ROOT / "a.tar", GOOD).read_bytes(),
    tar_of(ROOT / "a.tgz", GOOD, gzipped=True).read_bytes(),
    tar_of(ROOT / "long.tar", {f"{'x' * 120}/{name}": data for name, data in GOOD.items()}).read_bytes(),
    zip_of(ROOT / "a.zip", GOOD).read_bytes(),
    zip_of(ROOT / "stored.zip", GOOD, zipfile.ZIP_STORED).read_bytes(),
]
LENGTH = struct.unpack("<Q", GOOD[WEIGHTS_FILE][:8])[0]
HEADER = json.loads(GOOD[WEIGHTS_FILE][8 : 8 + LENGTH])

ints = st.sampled_from([-1, 0, 1, 2, 8, 24, 64, 255, 2**31, 2**32, 2**48, 2**63, 2**64, 10**400]) | st.integers(0, 300)
leaves = st.none() | st.booleans() | ints | st.floats() | st.text(max_size=6)
words = st.sampled_from(["F16", "F32", "BF16", "c_attn", "all-linear", ".*", "(", "h.0", "\ud800", "٠", "none", "-0"])
values = st.recursive(
    leaves | words,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4) | words, inner, max_size=3),
    max_leaves=6,
)
keys = st.sampled_from([*HEADER, "__metadata__", "x", "base_model.model.h.0.attn.c_attn.lora_A.weight"])
fields = st.sampled_from(["dtype", "shape", "data_offsets", "x"])
header_changes = st.lists(st.tuples(keys, st.none() | fields, values), min_size=1, max_size=3)
config_fields = st.sampled_from([
    *CONFIG, "use_rslora", "rank_pattern", "alpha_pattern", "exclude_modules", "layers_to_transform", "layers_pattern",
    "bias", "init_lora_weights", "use_dora", "modules_to_save", "base_model_name_or_path", "x",
])  # fmt: skip
config_changes = st.dictionaries(config_fields, values, min_size=1, max_size=3)
magic = st.sampled_from(
    [b"\0", b"\xff", b"\0" * 8, b"\xff" * 8, b"PK\1\2", b"../", b"/", b"7777777", b"\x80", b"1", b"x", b"g"]
)
places = st.floats(0, 1, exclude_max=True)
patches = st.lists(st.tuples(places, st.binary(min_size=1, max_size=4) | magic), min_size=1, max_size=6)
cuts = st.none() | places


def patched(data: bytes, changes: list[tuple[float, bytes]], cut: float | None, within: int | None = None) -> bytes:
    """Bytes written over, near the start (`within` bytes) or anywhere; then cut off."""
    made = bytearray(data)
    for place, new in changes:
        at = int(place * (within or len(made)))
        made[at : at + len(new)] = new
    return bytes(made if cut is None else made[: int(cut * len(made))])


@pytest.fixture(scope="module", autouse=True)
def tidy() -> Iterator[None]:
    yield
    shutil.rmtree(ROOT)


def check_message(text: str) -> None:
    text.encode()
    assert len(text) < 2000


def check_folder(config: bytes, weights: bytes) -> None:
    folder = ROOT / "folder"
    folder.mkdir(exist_ok=True)
    (folder / CONFIG_FILE).write_bytes(config)
    (folder / WEIGHTS_FILE).write_bytes(weights)
    try:
        manifest = inspect_adapter(folder, "a", SHAPE)
        check_values(folder, manifest)
    except (AdapterRefused, AdapterUnavailable) as error:
        check_message(str(error))
        return
    str(manifest.base_model).encode()
    with open_tensors(folder / WEIGHTS_FILE, "np") as file:
        for module in manifest.modules:
            for name in (module.a_name, module.b_name):
                assert np.isfinite(np.asarray(file.get_tensor(name), np.float32)).all()


def raw_weights(data: Any) -> None:
    changes, cut, within = data
    check_folder(GOOD[CONFIG_FILE], patched(GOOD[WEIGHTS_FILE], changes, cut, within))


def rewritten_header(changes: list[tuple[str, str | None, Any]]) -> None:
    header = json.loads(json.dumps(HEADER))
    for key, field, value in changes:
        if field is not None and isinstance(header.get(key), dict):
            header[key][field] = value
        else:
            header[key] = value
    text = json.dumps(header).encode()
    check_folder(GOOD[CONFIG_FILE], struct.pack("<Q", len(text)) + text + GOOD[WEIGHTS_FILE][8 + LENGTH :])


def rewritten_config(changes: dict[str, Any]) -> None:
    check_folder(json.dumps(CONFIG | changes).encode(), GOOD[WEIGHTS_FILE])


def raw_config(data: Any) -> None:
    check_folder(patched(GOOD[CONFIG_FILE], *data), GOOD[WEIGHTS_FILE])


def archive(data: Any) -> None:
    whole, changes, cut, within = data
    into = ROOT / "into"
    shutil.rmtree(into, ignore_errors=True)
    (ROOT / "upload").write_bytes(patched(whole, changes, cut, within))
    try:
        unpacked = unpack(ROOT / "upload", into, 1 << 20)
    except (AdapterRefused, AdapterUnavailable) as error:
        check_message(str(error))
        assert list(into.iterdir()) == []
        return
    assert unpacked.folder == into
    found = files_of(into)
    check_folder(found[CONFIG_FILE], found[WEIGHTS_FILE])


CASES: dict[str, tuple[Callable[[Any], None], st.SearchStrategy[Any]]] = {
    "bytes of the weights": (raw_weights, st.tuples(patches, cuts, st.sampled_from([8, LENGTH, None]))),
    "the header's JSON": (rewritten_header, header_changes),
    "the config's JSON": (rewritten_config, config_changes),
    "bytes of the config": (raw_config, st.tuples(patches, cuts)),
    "archives": (archive, st.tuples(st.sampled_from(ARCHIVES), patches, cuts, st.sampled_from([600, 1600, None]))),
}


def fuzz(case: str, examples: int, derandomize: bool, until: float | None = None) -> None:
    run, strategy = CASES[case]

    @settings(
        max_examples=examples, derandomize=derandomize, deadline=None, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(strategy)
    def once(data: Any) -> None:
        if until is None or time.monotonic() < until:
            run(data)

    once()


@pytest.mark.parametrize("case", CASES)
def test_what_is_mutated_is_taken_or_refused(case: str) -> None:
    fuzz(case, 100, derandomize=True)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_what_is_mutated_is_taken_or_refused_for_a_minute(case: str) -> None:
    until = time.monotonic() + SLOW_SECONDS
    while time.monotonic() < until:
        fuzz(case, 1000, derandomize=False, until=until)
