"""What one process changes between two steps of another; two stores over one directory stand for them."""

import os
from pathlib import Path

import pytest

from adapters.errors import AdapterConflict, AdapterExists, AdapterNotFound, AdapterUnavailable
from adapters.objects import Objects
from adapters.registry import Registry
from adapters.store import AdapterStore
from tests.adapters.support import SHAPE, tensors, write_adapter


def adapter(tmp_path: Path, seed: int) -> Path:
    return write_adapter(tmp_path / f"made{seed}", tensors(seed=seed))


def publish(store: AdapterStore, name: str, folder: Path) -> str:
    found = store.stage(name, folder)
    store.publish(found, "test")
    return found.ref.digest


@pytest.fixture
def stores(tmp_path: Path) -> tuple[AdapterStore, AdapterStore]:
    """One that sees a folder of adapters, and one like the command line, which does not."""
    (tmp_path / "drop").mkdir()
    return AdapterStore(tmp_path / "store", SHAPE, tmp_path / "drop"), AdapterStore(tmp_path / "store", SHAPE)


def test_content_published_while_a_sweep_is_under_way_stays(
    stores: tuple[AdapterStore, AdapterStore], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, other = stores
    digest = mine.stage("voice", adapter(tmp_path, 1)).ref.digest
    os.utime(mine.objects.path(digest), (1, 1))
    look = Objects.unused

    def meanwhile(self: Objects, grace_seconds: float) -> list[str]:
        found = look(self, grace_seconds)
        other.objects.put(adapter(tmp_path, 1), "voice", SHAPE)  # no name yet, but on its way to one
        return [digest for digest in found if digest in look(self, grace_seconds)]

    monkeypatch.setattr(Objects, "unused", meanwhile)
    assert mine.sweep() == []
    assert publish(other, "voice", adapter(tmp_path, 1)) == digest
    assert mine.objects.path(digest).is_dir()


def test_what_was_swept_before_it_was_named_is_not_named(
    stores: tuple[AdapterStore, AdapterStore], tmp_path: Path
) -> None:
    mine, other = stores
    found = mine.stage("voice", adapter(tmp_path, 1))
    assert other.sweep(-1) == [found.ref.digest]
    with pytest.raises(AdapterUnavailable, match="was deleted before 'voice' could mean it: try again"):
        mine.publish(found, "test")
    assert not mine.has("voice")


@pytest.mark.parametrize("change", ["remove", "rollback"])
def test_the_grace_counts_from_when_the_last_name_went(
    change: str, stores: tuple[AdapterStore, AdapterStore], tmp_path: Path
) -> None:
    mine, _ = stores
    publish(mine, "voice", adapter(tmp_path, 1))
    digest = publish(mine, "voice", adapter(tmp_path, 2))
    for version in mine.registry.versions:
        os.utime(mine.objects.path(version), (1, 1))
    mine.remove("voice", "test") if change == "remove" else mine.rollback("voice", "test")
    assert mine.sweep() == []
    assert digest in mine.sweep(-1)


def test_a_name_removed_where_its_folder_is_not_seen_stays_removed(
    stores: tuple[AdapterStore, AdapterStore], tmp_path: Path
) -> None:
    server, command = stores
    write_adapter(tmp_path / "drop" / "voice")
    assert server.get("voice").ref.name == "voice"
    command.remove("voice", "test")
    for store in (server, AdapterStore(tmp_path / "store", SHAPE, tmp_path / "drop")):
        assert [entry.name for entry in store.entries()] == []
        with pytest.raises(AdapterNotFound, match="it was removed; publish voice"):
            store.get("voice")


def test_a_folder_does_not_override_what_was_published_meanwhile(
    stores: tuple[AdapterStore, AdapterStore], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, command = stores
    write_adapter(tmp_path / "drop" / "voice")
    put = Objects.put

    def meanwhile(self: Objects, source: Path, name: str, shape: object):
        manifest = put(self, source, name, SHAPE)
        monkeypatch.setattr(Objects, "put", put)
        publish(command, "voice", adapter(tmp_path, 5))
        return manifest

    monkeypatch.setattr(Objects, "put", meanwhile)
    served = server.get("voice")
    assert served.ref.digest == command.get("voice").ref.digest
    assert server.registry.entries["voice"].stack == (served.ref.digest,)
    assert server.changed(server.registry.entries["voice"]), "and the folder is told to differ"


def test_one_of_several_takes_a_new_name(stores: tuple[AdapterStore, AdapterStore], tmp_path: Path) -> None:
    mine, other = stores
    found = mine.stage("voice", adapter(tmp_path, 1))
    other.publish(other.stage("voice", adapter(tmp_path, 2)), "test", new=True)
    with pytest.raises(AdapterExists, match="'voice' exists already"):
        mine.publish(found, "test", new=True)


def test_names_are_taken_in_with_their_versions(
    stores: tuple[AdapterStore, AdapterStore], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, other = stores
    original = Registry._take_in

    class Between:
        """The connection, with another process's publication between the first statement and the second."""

        def __init__(self, db) -> None:
            self._db, self._count = db, 0

        def execute(self, statement: str, *arguments: object):
            self._count += 1
            if self._count == 2:
                monkeypatch.setattr(Registry, "_take_in", original)
                publish(other, "voice", adapter(tmp_path, 1))
            return self._db.execute(statement, *arguments)

    publish(other, "first", adapter(tmp_path, 3))
    monkeypatch.setattr(Registry, "_take_in", lambda self, db: original(self, Between(db)))
    mine.registry.refresh()
    assert all(entry.value in mine.registry.versions for entry in mine.registry.entries.values())
    mine.registry.refresh()
    assert mine.get("voice").ref.digest == other.get("voice").ref.digest


def test_an_alias_is_not_set_or_rolled_back_to_what_is_no_adapter(
    stores: tuple[AdapterStore, AdapterStore], tmp_path: Path
) -> None:
    mine, other = stores
    publish(mine, "poe", adapter(tmp_path, 1))
    publish(mine, "twain", adapter(tmp_path, 2))
    mine.set_alias("voice", [("poe", 1)], "test")
    mine.set_alias("voice", [("twain", 1)], "test")
    other.remove("poe", "test")
    other.set_alias("poe", [("twain", 1)], "test")
    with pytest.raises(AdapterConflict, match="'poe' is an alias now, so 'poe' can't be a target"):
        mine.rollback("voice", "test")


def test_damaged_content_with_a_file_too_many_is_mended(
    stores: tuple[AdapterStore, AdapterStore], tmp_path: Path
) -> None:
    mine, _ = stores
    digest = publish(mine, "voice", adapter(tmp_path, 1))
    extra = mine.objects.path(digest) / "golden.json"
    extra.write_text("{}")
    assert publish(mine, "voice", adapter(tmp_path, 1)) == digest
    assert not extra.exists()


def test_a_rollback_to_another_version_than_the_folders_is_told(
    stores: tuple[AdapterStore, AdapterStore], tmp_path: Path
) -> None:
    server, _ = stores
    first = publish(server, "voice", adapter(tmp_path, 1))
    folder = write_adapter(tmp_path / "drop" / "voice", tensors(seed=2))
    second = publish(server, "voice", folder)
    assert server.changed(server.registry.entries["voice"]) is None
    server.rollback("voice", "test")
    assert server.get("voice").ref.digest == first
    assert server.changed(server.registry.entries["voice"]) == second


def test_an_upload_that_still_grows_is_not_swept(stores: tuple[AdapterStore, AdapterStore]) -> None:
    mine, other = stores
    with mine.objects.staging() as staging:
        (staging / "archive").write_bytes(b"more comes")
        os.utime(staging, (1, 1))
        other.sweep()
        assert (staging / "archive").exists()
        os.utime(staging / "archive", (1, 1))
        os.utime(staging, (1, 1))
        other.sweep()
        assert not staging.exists()


def test_one_source_is_downloaded_by_one_at_a_time(stores: tuple[AdapterStore, AdapterStore]) -> None:
    mine, other = (store.objects for store in stores)
    held = mine.try_downloading("https://example.org/a")
    assert held is not None
    assert other.try_downloading("https://example.org/a") is None
    os.close(held)
    again = other.try_downloading("https://example.org/a")
    assert again is not None
    os.close(again)
