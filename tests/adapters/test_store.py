"""Names to content: listing, near misses, folders dropped in later, and names that reach outside the folder."""

import logging
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from adapters.errors import AdapterConflict, AdapterNotFound, AdapterRefused
from adapters.store import AdapterStore, Found
from adapters.validation import WEIGHTS_FILE
from tests.adapters.support import SHAPE, ref_of, tensors, write_adapter


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "adapters"
    for i, name in enumerate(["poe", "wilde", "twain"]):
        write_adapter(folder / name, tensors(seed=i))
    return folder


def names(store: AdapterStore) -> list[str]:
    return [found.ref.name for found in store.all()]


def opened(root: Path, reserved: frozenset[str] = frozenset()) -> AdapterStore:
    """The store beside `root`, as a restart finds it."""
    return AdapterStore(root.parent / "store", SHAPE, root, reserved)


def test_every_folder_is_listed_under_its_name(root: Path) -> None:
    store = opened(root)
    assert names(store) == ["poe", "twain", "wilde"]
    assert {m.ref.digest for m in store.all()} == {ref_of(root / name).digest for name in ("poe", "twain", "wilde")}
    found = store.get("poe")
    assert found.ref.digest == ref_of(root / "poe").digest
    assert (found.version.rank, found.version.targets) == (2, ("attn.c_attn", "mlp.c_proj"))
    assert found.version.nbytes == (root / "poe" / WEIGHTS_FILE).stat().st_size


def test_what_is_no_adapter_is_not_listed(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    (root / "empty").mkdir()
    (root / "notes.txt").write_text("hello")
    write_adapter(root / ".hidden")
    assert names(opened(root)) == ["poe", "twain", "wilde"]
    assert not caplog.records, "these are not worth a warning"


def test_a_folder_that_cannot_be_served_is_told_once_and_the_others_are(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_adapter(root / "dora", use_dora=True)
    write_adapter(root / "a name, with a comma")
    store = opened(root, frozenset({"twain"}))
    with caplog.at_level(logging.WARNING, "adapters"):
        assert names(store) == ["poe", "wilde"]
        assert names(store) == ["poe", "wilde"]
    lines = sorted(record.getMessage() for record in caplog.records)
    assert len(lines) == 3, lines
    assert "a name, with a comma: not a usable adapter name" in lines[0]
    assert "dora: use_dora is true" in lines[1]
    assert "twain: the name is reserved" in lines[2]
    with pytest.raises(AdapterRefused, match="use_dora is true"):
        store.get("dora")


@pytest.mark.parametrize(
    ("asked", "nearest"), [("pow", "poe"), ("Wild", "wilde"), ("TWAIN", "twain"), ("twains", "twain"), ("pOE", "poe")]
)
def test_an_unknown_name_is_answered_with_the_nearest_first(root: Path, asked: str, nearest: str) -> None:
    with pytest.raises(AdapterNotFound, match=f"{asked!r} does not exist; the nearest are '{nearest}'") as caught:
        opened(root).get(asked)
    assert caught.value.nearest[0] == nearest
    assert caught.value.name == asked


def test_a_name_like_none_is_answered_with_some_that_exist(root: Path) -> None:
    with pytest.raises(AdapterNotFound) as caught:
        opened(root).get("zzzzzzzz")
    assert caught.value.nearest == ("poe", "twain", "wilde")


def test_an_empty_folder_has_no_near_names(tmp_path: Path) -> None:
    (tmp_path / "adapters").mkdir()
    with pytest.raises(AdapterNotFound, match=r"'poe' does not exist\. GET /v1/models lists"):
        opened(tmp_path / "adapters").get("poe")


@pytest.mark.parametrize(
    "name",
    [
        "../outside",
        "..",
        ".",
        "",
        "./poe",
        "poe/",
        "wilde/../poe",
        "/etc",
        "poe\0",
        "poe\n",
        "-poe",
        ".hidden",
        "x" * 65,
    ],
)
def test_a_name_never_reaches_outside_the_folder(root: Path, name: str) -> None:
    write_adapter(root.parent / "outside")
    write_adapter(root / ".hidden")
    with pytest.raises(AdapterNotFound):
        opened(root).get(name)


def test_an_absolute_path_is_no_name(root: Path) -> None:
    with pytest.raises(AdapterNotFound):
        opened(root).get(str(root / "poe"))


def test_the_bases_names_are_never_adapters(root: Path) -> None:
    write_adapter(root / "base")
    store = opened(root, frozenset({"base"}))
    with pytest.raises(AdapterNotFound):
        store.get("base")
    assert "base" not in names(store)


def test_a_link_to_a_folder_is_served_under_the_links_name(root: Path) -> None:
    write_adapter(root.parent / "elsewhere", tensors(seed=9))
    (root / "linked").symlink_to(root.parent / "elsewhere")
    (root / "dangling").symlink_to(root.parent / "nowhere")
    store = opened(root)
    assert names(store) == ["linked", "poe", "twain", "wilde"]
    assert store.get("linked").ref.digest == ref_of(root.parent / "elsewhere").digest


def test_a_folder_dropped_in_later_is_found_by_name_and_by_a_listing(root: Path) -> None:
    store = opened(root)
    assert len(store.all()) == 3
    with pytest.raises(AdapterNotFound):
        store.get("new")
    write_adapter(root / "new", tensors(seed=7))
    assert store.get("new").ref.digest == ref_of(root / "new").digest
    write_adapter(root / "newer", tensors(seed=8))
    assert "newer" in names(store)


def test_a_folder_half_copied_is_served_once_it_is_whole(root: Path) -> None:
    store = opened(root)
    write_adapter(root / "new")
    weights = (root / "new" / WEIGHTS_FILE).read_bytes()
    (root / "new" / WEIGHTS_FILE).write_bytes(weights[:-100])
    for _ in range(2):
        with pytest.raises(AdapterRefused, match="not a valid safetensors file"):
            store.get("new")
    (root / "new" / WEIGHTS_FILE).write_bytes(weights)
    assert store.get("new").ref.digest == ref_of(root / "new").digest


def test_a_refusal_is_remembered_while_the_files_stay(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_adapter(root / "dora", use_dora=True)
    store = opened(root)
    with pytest.raises(AdapterRefused) as first:
        store.get("dora")
    monkeypatch.setattr(AdapterStore, "stage", lambda *_: pytest.fail("read again"))
    with pytest.raises(AdapterRefused) as second:
        store.get("dora")
    assert str(second.value) == str(first.value)
    assert second.value is not first.value, "one exception raised in two requests would gather tracebacks"


def test_a_name_keeps_its_content_until_it_is_published_again(root: Path) -> None:
    store = opened(root)
    first = store.get("poe")
    write_adapter(root / "poe", tensors(seed=99))
    now = ref_of(root / "poe").digest
    for again in (store, opened(root)):
        assert again.get("poe") == first, "neither a listing nor a restart serves what changed"
        assert next(m for m in again.all() if m.ref.name == "poe") == first
        assert again.changed(again.registry.entries["poe"]) == now
    assert ref_of(Path(first.ref.path)).digest == first.ref.digest, "its files are kept"
    store.publish(store.stage("poe", root / "poe"), "test")
    assert again.get("poe").ref.digest == now
    assert again.changed(again.registry.entries["poe"]) is None


def test_a_folder_rewritten_with_the_same_content_has_not_changed(root: Path) -> None:
    store = opened(root)
    store.all()
    shutil.copytree(root / "poe", root.parent / "copy")
    shutil.rmtree(root / "poe")
    shutil.copytree(root.parent / "copy", root / "poe")
    assert store.changed(store.registry.entries["poe"]) is None
    (root / "poe" / WEIGHTS_FILE).write_bytes(b"")
    assert store.changed(store.registry.entries["poe"]) == "refused"


def test_equal_content_under_two_names_is_one_content(root: Path) -> None:
    shutil.copytree(root / "poe", root / "edgar")
    store = opened(root)
    assert store.get("edgar").ref.digest == store.get("poe").ref.digest
    assert names(store) == ["edgar", "poe", "twain", "wilde"]


def test_a_golden_json_that_was_mended_is_looked_at_again(root: Path) -> None:
    """It decides the digest as the weights do: a folder isn't the same without it."""
    store = opened(root)
    store.all()
    (root / "poe" / "golden.json").write_text('{"bogus": 1}')
    assert store.changed(store.registry.entries["poe"]) == "refused"
    write_adapter(root / "new", tensors(seed=7))
    (root / "new" / "golden.json").write_text('{"bogus": 1}')
    with pytest.raises(AdapterRefused, match=r"golden\.json"):
        store.get("new")
    (root / "new" / "golden.json").unlink()
    assert store.get("new").ref.digest == ref_of(root / "new").digest


def test_a_folder_that_is_gone_is_still_served(root: Path) -> None:
    store = opened(root)
    first = store.get("poe")
    shutil.rmtree(root / "poe")
    assert names(opened(root)) == ["poe", "twain", "wilde"]
    assert opened(root).get("poe") == first


def test_a_removed_name_is_not_revived_by_its_old_folder(root: Path) -> None:
    store = opened(root)
    store.all()
    assert store.remove("poe", "test").stack
    for again in (store, opened(root)):
        assert names(again) == ["twain", "wilde"]
        assert again.known("poe") is None
        with pytest.raises(AdapterNotFound, match="it was removed; publish poe from its folder to serve it again"):
            again.get("poe")
        assert again.refusals() == {"poe": "it was removed; publish poe from its folder to serve it again"}
    with pytest.raises(AdapterNotFound, match="'pow' does not exist; the nearest are"):
        store.remove("pow", "test")
    store.publish(store.stage("poe", root / "poe"), "test")
    assert names(store) == ["poe", "twain", "wilde"]
    assert store.refusals() == {}


def test_a_removed_name_without_a_folder_is_free_for_a_new_one(root: Path) -> None:
    store = opened(root)
    store.all()
    shutil.rmtree(root / "poe")
    store.remove("poe", "test")
    write_adapter(root / "poe", tensors(seed=50))
    assert store.get("poe").ref.digest == ref_of(root / "poe").digest


def test_another_base_refuses_what_does_not_fit_it(root: Path) -> None:
    opened(root).all()
    smaller = AdapterStore(root.parent / "store", replace(SHAPE, n_layer=1))
    assert names(smaller) == []
    with pytest.raises(AdapterRefused, match="layer 1; the base has 1 layers"):
        smaller.get("poe")
    deeper = AdapterStore(root.parent / "store", replace(SHAPE, n_layer=3))
    with pytest.raises(AdapterRefused, match=r"h\.2\.attn\.c_attn is targeted"):
        deeper.get("poe")


def test_many_threads_take_each_folder_in_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    stage = AdapterStore.stage

    def slowly(self: AdapterStore, name: str, source: Path) -> Found:
        read.append(name)
        time.sleep(0.05)
        return stage(self, name, source)

    monkeypatch.setattr(AdapterStore, "stage", slowly)
    store = opened(root)
    with ThreadPoolExecutor(12) as pool:
        asked = [pool.submit(store.get, name) for name in ("poe", "wilde", "poe", "nobody", "poe", "wilde")]
        listed = [pool.submit(store.all) for _ in range(6)]
        assert [len(future.result()) for future in listed] == [3] * 6
        assert asked[0].result() == asked[2].result()
        with pytest.raises(AdapterNotFound):
            asked[3].result()
    assert sorted(read) == ["poe", "twain", "wilde"]


def test_the_folder_must_exist_at_the_start_and_may_vanish_later(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(NotADirectoryError, match="nowhere"):
        opened(root / "nowhere")
    with pytest.raises(NotADirectoryError):
        opened(root / "poe" / WEIGHTS_FILE)
    store = opened(root)
    assert len(store.all()) == 3
    shutil.rmtree(root)
    assert len(store.all()) == 3, "what was found is still known"
    assert "can't be read" in caplog.text


def test_a_folder_that_cannot_be_read_hides_no_other(
    root: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    allowed = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "poe" and allowed(path, mode))
    with caplog.at_level(logging.WARNING, "adapters"):
        assert names(opened(root)) == ["twain", "wilde"]
    assert "poe: it can't be read" in caplog.text


def test_a_refusal_for_what_lies_beside_the_weights_ends_with_it(root: Path) -> None:
    store, picture = opened(root), root / "poe" / "loss.png"
    picture.touch()
    os.truncate(picture, 17 << 20)  # sparse: takes no space
    with pytest.raises(AdapterRefused, match=r"loss\.png"):
        store.get("poe")
    picture.unlink()
    assert store.get("poe").ref.digest == ref_of(root / "poe").digest


def test_a_folder_and_an_alias_of_one_name(root: Path) -> None:
    store = opened(root)
    with pytest.raises(AdapterConflict, match="'wilde' is an adapter's folder"):
        store.set_alias("wilde", [("poe", 1)], "test")
    store.set_alias("edgar", [("poe", 1)], "test")
    write_adapter(root / "edgar", tensors(seed=9))
    assert "edgar" in [entry.name for entry in store.entries()]
    assert store.refusals() == {"edgar": "its name is an alias's: rename the folder, or remove the alias"}
