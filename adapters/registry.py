"""What names mean: a small SQLite database beside the adapters' content. Works without torch.

Every change is one transaction: a process killed at any instant leaves the state before it or after it, and several
processes may change and read at once. A change has a number; readers fetch what is newer than the last they saw.
"""

import json
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any

from adapters.adapter import AdapterVersion, BaseShape
from adapters.errors import AdapterConflict, AdapterNotFound, AdapterUnavailable

SCHEMA_VERSION = 1
MAX_STACK = 32
"""Values of a name that a rollback can still reach, the current one included."""
BUSY_SECONDS = 10.0
_SCHEMA = """
create table if not exists versions(
    id integer primary key autoincrement, digest text unique not null, facts text not null);
create table if not exists names(
    name text primary key, kind text not null, stack text not null, folder text, created real not null,
    updated real not null, revision integer unique not null) without rowid;
create table if not exists history(
    id integer primary key autoincrement, name text not null, action text not null, value text not null,
    origin text not null, at real not null);
create index if not exists history_by_name on history(name);
"""


Check = Callable[[str], None]
"""Raises an AdapterError for a value that a name can't have; called when nobody else can change anything."""


class Kind(Enum):
    """What a name stands for."""

    ADAPTER = "adapter"  # its values are digests
    ALIAS = "alias"  # its values are targets: [[reference, weight], ...] as JSON


_PATHS = {Kind.ADAPTER: "adapters", Kind.ALIAS: "aliases"}


@dataclass(frozen=True, slots=True)
class Entry:
    """A name as it is now. A removed one has an empty stack; it is kept so that its old folder does not revive it."""

    name: str
    kind: Kind
    stack: tuple[str, ...]  # values, the current one last; a rollback drops it
    folder: str | None  # signature of the folder its value is from; "": from elsewhere; None: removed, and no folder
    created: float
    updated: float

    @property
    def value(self) -> str | None:
        """The current value; None: removed."""
        return self.stack[-1] if self.stack else None

    @property
    def digests(self) -> set[str]:
        """The versions that it means or could be rolled back to, or that it is or was fixed on."""
        if self.kind is Kind.ADAPTER:
            return set(self.stack)
        fixed = (reference.partition("@")[2] for value in self.stack for reference, _ in targets_in(value))
        return {digest for digest in fixed if digest}


@dataclass(frozen=True)
class Event:
    """One line of a name's history."""

    action: str  # publish, alias, rollback, remove
    value: str  # after it
    origin: str
    at: float


def targets_in(value: str) -> list[tuple[str, float]]:
    """References and weights of an alias's value."""
    return [(reference, weight) for reference, weight in json.loads(value)]


class Registry:
    """Names and versions in `path`, mirrored in memory. Safe to use from several threads, and after a fork."""

    def __init__(self, path: Path) -> None:
        """Creates the database if there is none. Raises AdapterUnavailable if it can't be used."""
        self.path = path
        self.entries: dict[str, Entry] = {}  # of removed ones those whose folder may still be there
        self.versions: dict[str, AdapterVersion] = {}
        self._shapes: dict[BaseShape, BaseShape] = {}  # one object for all that are equal
        self._lock = threading.RLock()
        self._open: tuple[int, sqlite3.Connection] | None = None
        self._seen_data = self._seen_revision = self._seen_version = -1
        self._inode: int | None = None
        self.refresh()

    def refresh(self) -> None:
        """Take in what any process has changed; microseconds when nothing has.

        Never waits: while a thread of this process changes something, what was seen last holds for a moment longer.
        """
        if not self._lock.acquire(blocking=False):
            return
        try:
            with self._connection() as db:
                data = db.execute("pragma data_version").fetchone()[0]
                if data != self._seen_data:
                    self._look(db)
                    self._seen_data = data
        finally:
            self._lock.release()

    def check(self) -> None:
        """Raises AdapterUnavailable when the database is gone, or another one lies in its place."""
        self.refresh()
        try:
            now = self.path.stat().st_ino
        except OSError as error:
            raise AdapterUnavailable(f"the adapter registry {self.path} can't be read: {error.strerror}") from error
        if self._inode not in (None, now):
            raise AdapterUnavailable(f"the adapter registry {self.path} was replaced while it was in use: start anew")

    def add_version(self, version: AdapterVersion) -> None:
        """Remember what is known of a digest; the same digest may be added again."""
        with self._change() as db:
            facts = json.dumps(version.facts())
            db.execute("insert or ignore into versions(digest, facts) values (?, ?)", (version.digest, facts))

    def drop_versions(self, unused: Callable[[], list[str]], delete: Callable[[list[str]], None]) -> list[str]:
        """Forget those of `unused()` that no name means or could be rolled back to, and no alias is fixed on; which.

        Their content goes by `delete` in the same transaction, so that nobody names it in between.
        """
        with self._change() as db:
            gone = sorted(set(unused()) - self.named())
            delete(gone)
            db.executemany("delete from versions where digest = ?", [(digest,) for digest in gone])
            for digest in gone:
                self.versions.pop(digest, None)
        return gone

    def named(self) -> set[str]:
        """Every version that a name means or could be rolled back to, or that an alias is or was fixed on."""
        return {digest for entry in list(self.entries.values()) for digest in entry.digests}

    def push(
        self, name: str, kind: Kind, value: str, check: Check | None = None, *, action: str, origin: str,
        folder: str = "",
    ) -> Entry:  # fmt: skip
        """Give a name a new value that passes `check`. One that it has already changes nothing but `folder`.

        Raises AdapterConflict when the name stands for something of another kind, AdapterUnavailable when a version
        was forgotten meanwhile.
        """
        with self._change() as db:
            if kind is Kind.ADAPTER and not db.execute("select 1 from versions where digest = ?", (value,)).fetchone():
                raise AdapterUnavailable(f"version {value[:12]} was deleted before {name!r} could mean it: try again")
            if check is not None:
                check(value)
            old = self.entries.get(name)
            if old is not None and old.value is not None and old.kind is not kind:
                raise AdapterConflict(f"{name!r} is an {old.kind.value}: remove it, or choose another name")
            stack = old.stack if old is not None and old.kind is kind else ()
            if stack[-1:] != (value,):
                stack = (*stack, value)[-MAX_STACK:]
                self._log(db, name, action, value, origin)
            return self._put(db, name, kind, stack, folder, None if old is None else old.created)

    def rollback(self, name: str, origin: str, check: Check, kind: Kind | None = None) -> Entry:
        """Give a name its value before the current one, if that passes `check` still.

        Raises AdapterNotFound, AdapterConflict where there is none.
        """
        with self._change() as db:
            old = self._known(name, kind)
            if len(old.stack) < 2:
                raise AdapterConflict(f"{name!r} has no earlier value to roll back to")
            if old.kind is Kind.ALIAS:
                check(old.stack[-2])
            self._log(db, name, "rollback", old.stack[-2], origin)
            return self._put(db, name, old.kind, old.stack[:-1], "", old.created)

    def remove(self, name: str, origin: str, folder: str | None, kind: Kind | None = None) -> Entry:
        """Take a name away; what it was. `folder`: the signature of what lies under it in the adapters' folder, ""
        where that isn't known: the name then stays taken until it is published again.

        Raises AdapterNotFound, AdapterConflict when an alias leads to it.
        """
        with self._change() as db:
            old = self._known(name, kind)
            if users := self.aliases_of(name):
                raise AdapterConflict(f"{name!r} is a target of {', '.join(users)}: change or remove the alias first")
            self._log(db, name, "remove", "", origin)
            self._put(db, name, old.kind, (), folder, old.created)
        return old

    def history(self, name: str, limit: int = 100) -> list[Event]:
        """The last changes of a name, newest first."""
        with self._lock, self._connection() as db:
            rows = db.execute(
                "select action, value, origin, at from history where name = ? order by id desc limit ?", (name, limit)
            )
            return [Event(*row) for row in rows]

    def close(self) -> None:
        """Close this process's connection; the next use opens another. Before a fork."""
        with self._lock:
            if self._open is not None and self._open[0] == os.getpid():
                self._open[1].close()
            self._open, self._seen_data = None, -1

    def aliases_of(self, name: str) -> list[str]:
        """The aliases that have an adapter among their targets."""
        found: list[str] = []
        for entry in list(self.entries.values()):
            targets = targets_in(entry.value or "[]") if entry.kind is Kind.ALIAS else []
            if any(reference.partition("@")[0] == name for reference, _ in targets):
                found.append(entry.name)
        return sorted(found)

    def _known(self, name: str, kind: Kind | None) -> Entry:
        """Of any kind if `kind` is None."""
        entry = self.entries.get(name)
        if entry is None or entry.value is None:
            raise AdapterNotFound(name)
        if kind not in (None, entry.kind):
            raise AdapterNotFound(name, hint=f"it is an {entry.kind.value}: see /v1/{_PATHS[entry.kind]}/{name}")
        return entry

    def _put(
        self, db: sqlite3.Connection, name: str, kind: Kind, stack: tuple[str, ...], folder: str | None,
        created: float | None,
    ) -> Entry:  # fmt: skip
        now = time.time()
        entry = Entry(name, kind, stack, folder, now if created is None else created, now)
        db.execute(
            "insert or replace into names select ?, ?, ?, ?, ?, ?, coalesce(max(revision), 0) + 1 from names",
            (name, kind.value, json.dumps(stack), folder, entry.created, now),
        )
        return entry

    def _log(self, db: sqlite3.Connection, name: str, action: str, value: str, origin: str) -> None:
        db.execute(
            "insert into history(name, action, value, origin, at) values (?, ?, ?, ?, ?)",
            (name, action, value, origin, time.time()),
        )

    def _look(self, db: sqlite3.Connection) -> None:
        """Take in one state of the database: names and versions between two changes, not across one."""
        db.execute("begin")
        try:
            self._take_in(db)
        finally:
            db.execute("commit")

    def _take_in(self, db: sqlite3.Connection) -> None:
        """Inside a transaction. Versions first: whoever sees a name without the lock finds what it means."""
        for number, digest, facts in db.execute(
            "select * from versions where id > ? order by id", (self._seen_version,)
        ):
            made = AdapterVersion.of_facts(digest, json.loads(facts))
            self.versions[digest] = replace(made, shape=self._shapes.setdefault(made.shape, made.shape))
            self._seen_version = number
        rows = db.execute("select * from names where revision > ? order by revision", (self._seen_revision,))
        for name, kind, stack, folder, created, updated, revision in rows:
            entry = Entry(name, Kind(kind), tuple(json.loads(stack)), folder, created, updated)
            if entry.value is None and folder is None:
                self.entries.pop(name, None)
            else:
                self.entries[name] = entry
            self._seen_revision = revision

    @contextmanager
    def _change(self) -> Generator[sqlite3.Connection]:
        """A transaction that sees every change before it."""
        with self._lock, self._connection() as db:
            db.execute("begin immediate")
            try:
                self._take_in(db)
                yield db
                db.execute("commit")
            except BaseException:
                if db.in_transaction:
                    db.execute("rollback")
                raise
            self._look(db)

    @contextmanager
    def _connection(self) -> Generator[sqlite3.Connection]:
        try:
            if self._open is None or self._open[0] != os.getpid():
                self._open = os.getpid(), self._connect()
            yield self._open[1]
        except sqlite3.Error as error:
            raise AdapterUnavailable(f"the adapter registry {self.path} can't be used: {error}") from error

    def _connect(self) -> sqlite3.Connection:
        db = sqlite3.connect(self.path, BUSY_SECONDS, isolation_level=None, check_same_thread=False)
        db.execute("pragma journal_mode = wal")
        db.execute("pragma synchronous = full")
        version: Any = db.execute("pragma user_version").fetchone()[0]
        if version > SCHEMA_VERSION:
            raise AdapterUnavailable(
                f"{self.path} was written by a newer Chorus (schema {version}, this one knows {SCHEMA_VERSION}): "
                "use that one, or another --store-dir"
            )
        if version < SCHEMA_VERSION:
            db.executescript(f"begin immediate; {_SCHEMA} pragma user_version = {SCHEMA_VERSION}; commit;")
        self._inode = self.path.stat().st_ino
        return db
