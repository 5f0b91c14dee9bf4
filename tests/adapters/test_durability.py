"""The store when processes die at any instant, or write at once."""

import multiprocessing
import os
import signal
import sqlite3
import sys
import threading
import traceback
from pathlib import Path

import pytest

from adapters.errors import AdapterUnavailable
from adapters.registry import Kind, Registry
from adapters.store import AdapterStore
from tests.adapters.support import SHAPE, ref_of, tensors, write_adapter

WATCHED = ("adapters/store.py", "adapters/registry.py", "adapters/objects.py", "shutil.py")


def dies_at(point: int, store: Path, folder: Path) -> bool:
    """Publish `folder` as poe in a process that kills itself at the given line or system event; whether it died."""
    child = os.fork()
    if child:
        status = os.waitpid(child, 0)[1]
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "publishing failed by itself"
        return os.WIFSIGNALED(status)
    left = point

    def step() -> None:
        nonlocal left
        left -= 1
        if left == -1:  # once: `os.kill` is an event itself
            os.kill(os.getpid(), signal.SIGKILL)

    def trace(frame, event, argument):
        if not frame.f_code.co_filename.endswith(WATCHED):
            return None
        step()
        return trace

    try:
        sys.addaudithook(lambda event, _: step() if event.startswith(("os.", "open", "sqlite3", "shutil")) else None)
        sys.settrace(trace)
        opened = AdapterStore(store, SHAPE)
        opened.publish(opened.stage("poe", folder), "test")
        os._exit(0)
    except BaseException:  # noqa: BLE001 (this process may not go on as a second pytest)
        traceback.print_exc()
        os._exit(1)


@pytest.mark.parametrize("case", ["a new store", "a new version", "the same version"])
def test_a_publisher_killed_at_any_instant_leaves_the_old_version_or_the_new(case: str, tmp_path: Path) -> None:
    first, same = case == "a new store", case == "the same version"
    old = write_adapter(tmp_path / "old", tensors(seed=0))
    new = write_adapter(tmp_path / "new", tensors(seed=0 if same else 1))
    (new / "report.json").write_text("{}")
    old_digest, new_digest = ref_of(old).digest, ref_of(new).digest
    stride = 4  # of 342 lines and system events in a new store
    points, seen = 0, set[str | None]()
    died = True
    while died:
        store = tmp_path / f"store{points}"
        if not first:
            made = AdapterStore(store, SHAPE)
            made.publish(made.stage("poe", old), "test")
            made.close()
        died = dies_at(points * stride, store, new)
        after = AdapterStore(store, SHAPE)
        found = after.known("poe")
        digest = None if found is None else found.ref.digest
        assert digest in ({None, new_digest} if first else {old_digest, new_digest}), f"at point {points * stride}"
        if found is not None:
            assert ref_of(Path(found.ref.path)).digest == digest, "a name means content that is whole"
        seen.add(digest)
        after.publish(after.stage("poe", new), "test")
        assert after.get("poe").ref.digest == new_digest, "and the next publisher is not in anyone's way"
        after.sweep(0)
        assert not list((store / "staging").iterdir())
        after.close()
        points += 1
    assert points > 50
    assert len(seen) == (1 if same else 2), "deaths before and after the change were both tried"


def publish_some(store: Path, folders: list[Path], names: list[str]) -> None:
    opened = AdapterStore(store, SHAPE)
    for name in names:
        for folder in folders:
            opened.publish(opened.stage(name, folder), f"process {os.getpid()}")


def test_several_processes_publish_at_once(tmp_path: Path) -> None:
    folders = [write_adapter(tmp_path / f"v{seed}", tensors(seed=seed)) for seed in range(6)]
    context = multiprocessing.get_context("fork")
    work = [(folders[i : i + 3], ["shared", f"own{i}"]) for i in range(4)]
    processes = [context.Process(target=publish_some, args=(tmp_path / "store", *each)) for each in work]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    store = AdapterStore(tmp_path / "store", SHAPE)
    assert [found.ref.name for found in store.all()] == ["own0", "own1", "own2", "own3", "shared"]
    for found in store.all():
        assert ref_of(Path(found.ref.path)).digest == found.ref.digest
    for i in range(4):
        assert store.registry.entries[f"own{i}"].stack == tuple(ref_of(f).digest for f in folders[i : i + 3])
    events = store.registry.history("shared")
    assert tuple(event.value for event in reversed(events)) == store.registry.entries["shared"].stack, "none is lost"


def value(number: int) -> str:
    """An alias's targets."""
    return f'[["poe", {number}.0]]'


def test_a_running_process_sees_what_another_changes(tmp_path: Path) -> None:
    mine, other = (Registry(tmp_path / "registry.sqlite") for _ in range(2))
    other.push("a", Kind.ALIAS, value(1), action="alias", origin="test")
    assert "a" not in mine.entries
    mine.refresh()
    assert mine.entries["a"] == other.entries["a"]
    mine.push("a", Kind.ALIAS, value(2), action="alias", origin="test")
    assert mine.entries["a"].stack == (value(1), value(2)), "a change is made to what is there, not to what was seen"
    other.push("b", Kind.ALIAS, value(1), action="alias", origin="test")
    assert other.entries["a"].stack == (value(1), value(2))
    other.remove("a", "test", None)
    mine.refresh()
    assert list(mine.entries) == ["b"]


def test_a_failed_change_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = Registry(tmp_path / "registry.sqlite")
    registry.push("a", Kind.ALIAS, value(1), action="alias", origin="test")
    with monkeypatch.context() as patch:
        patch.setattr(registry, "_put", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            registry.push("a", Kind.ALIAS, value(2), action="alias", origin="test")
    assert registry.entries["a"].stack == (value(1),)
    assert [event.value for event in registry.history("a")] == [value(1)]
    assert registry.push("a", Kind.ALIAS, value(3), action="alias", origin="test").stack == (value(1), value(3))


def test_only_so_many_versions_can_be_rolled_back_to(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "registry.sqlite")
    for i in range(40):
        registry.push("a", Kind.ALIAS, value(i), action="alias", origin="test")
    assert registry.entries["a"].stack == tuple(map(value, range(8, 40)))
    assert len(registry.history("a")) == 40


def test_a_file_that_is_no_registry_is_told(tmp_path: Path) -> None:
    (tmp_path / "registry.sqlite").write_text("something else entirely, and long enough to be no empty file")
    with pytest.raises(AdapterUnavailable, match=r"registry\.sqlite can't be used: file is not a database"):
        Registry(tmp_path / "registry.sqlite")


def test_a_newer_registry_is_left_alone(tmp_path: Path) -> None:
    Registry(tmp_path / "registry.sqlite").close()
    db = sqlite3.connect(tmp_path / "registry.sqlite")
    db.execute("pragma user_version = 99")
    db.close()
    with pytest.raises(AdapterUnavailable, match=r"written by a newer Chorus \(schema 99, this one knows 1\)"):
        Registry(tmp_path / "registry.sqlite")


def test_a_store_that_cannot_be_written_names_the_setting(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(AdapterUnavailable, match="set --store-dir"):
        AdapterStore(tmp_path / "file", SHAPE)


def test_a_reader_does_not_wait_for_a_change_under_way(tmp_path: Path) -> None:
    """Requests are answered on an event loop: a slow disk must not hold it up."""
    registry = Registry(tmp_path / "registry.sqlite")
    registry.push("a", Kind.ALIAS, value(1), action="alias", origin="test")
    began, go_on = threading.Event(), threading.Event()

    def change() -> None:
        with registry._change():
            began.set()
            assert go_on.wait(10)

    thread = threading.Thread(target=change)
    thread.start()
    assert began.wait(10)
    registry.refresh()
    assert registry.entries["a"].value == value(1)
    assert not go_on.is_set()
    go_on.set()
    thread.join()


def test_a_version_whose_content_was_swept_cannot_be_named(tmp_path: Path) -> None:
    store = AdapterStore(tmp_path / "store", SHAPE)
    found = store.stage("poe", write_adapter(tmp_path / "poe"))
    assert store.sweep(0) == [found.ref.digest], "no name means it yet"
    with pytest.raises(AdapterUnavailable, match="was deleted before 'poe' could mean it: try again"):
        store.publish(found, "test")
    assert store.known("poe") is None


def test_a_store_that_is_gone_is_noticed(tmp_path: Path) -> None:
    store = AdapterStore(tmp_path / "store", SHAPE)
    store.check()
    (tmp_path / "store").rename(tmp_path / "elsewhere")
    with pytest.raises(AdapterUnavailable, match="can't be read"):
        store.check()
    with pytest.raises(AdapterUnavailable, match="can't be written to"):
        store.stage("poe", write_adapter(tmp_path / "poe"))
    AdapterStore(tmp_path / "store", SHAPE)
    with pytest.raises(AdapterUnavailable, match="was replaced while it was in use"):
        store.check()
