"""The adapters that can be named: content by digest, names and aliases over it, and the folder people drop them into.

A folder in `--adapters-dir` is taken into the store when it is first named or listed; from then on its name means that
content, whatever becomes of the folder, until it is published again. Works without torch.
"""

import json
import logging
import threading
import time
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from adapters.adapter import NAME_PATTERN, AdapterManifest, AdapterRef, AdapterVersion, BaseShape
from adapters.aliases import check_alias, check_leads, check_targets, choose
from adapters.errors import (
    AdapterConflict,
    AdapterError,
    AdapterExists,
    AdapterNotFound,
    AdapterRefused,
    AdapterUnavailable,
)
from adapters.folders import Folders, removed
from adapters.objects import ADAPTER_FILES, Objects
from adapters.references import DIGEST_PREFIX, Reference, nearest, parse_reference
from adapters.registry import Entry, Kind, Registry, targets_in
from adapters.validation import inspect_adapter
from adapters.values import check_values

logger = logging.getLogger(__name__)
_MANY = 1000
GRACE_SECONDS = 3600.0
"""How long content that nothing names stays: a request may still be on its way to it."""


@dataclass(frozen=True)
class Found:
    """What a reference means now."""

    ref: AdapterRef
    version: AdapterVersion
    folder: str = field(default="", compare=False)  # of what was staged: the signature that its folder had before


class AdapterStore:
    """The store in `directory` for a base of `shape`. Safe to use from several threads and processes."""

    def __init__(
        self, directory: Path, shape: BaseShape, folder: Path | None = None, reserved: frozenset[str] = frozenset()
    ) -> None:
        """`folder`: where adapters are dropped into; `reserved`: names that no adapter may have, as the base's own.

        Raises NotADirectoryError for `folder`, AdapterUnavailable where the store can't be used.
        """
        self._folders = None if folder is None else Folders(folder, shape, reserved)
        self._shape, self._reserved = shape, reserved
        self.objects = Objects(directory)
        self.registry = Registry(directory / "registry.sqlite")
        self._unfit: dict[str, str] = {}  # digest -> why it does not fit this base; empty if it does
        self._lock = threading.RLock()  # held while folders are read: nothing is read twice

    def known(self, reference: str, key: str | None = None) -> Found | None:
        """What `reference` means, if that takes no more than a look at the registry in memory; else None.

        `key`: whom a weighted alias sends to the same target each time. Raises AdapterRefused, AdapterUnavailable.
        """
        meant = self.look_up(reference, key)
        if meant is None:
            return None
        found = self._found(*meant)
        return self._fitting(found) if found.version.shape == self._shape or meant[1] in self._unfit else None

    def get(self, reference: str, key: str | None = None) -> Found:
        """What `reference` means; takes in a folder of that name.

        Raises AdapterNotFound with the nearest names, AdapterRefused with the reason, AdapterUnavailable on I/O.
        """
        if (meant := self.look_up(reference, key)) is not None:
            return self._fitting(self._found(*meant))
        with self._lock:
            if (meant := self.look_up(reference, key)) is not None:
                return self._fitting(self._found(*meant))
            if self._folders is not None and self._folders.find(reference) is not None:
                try:
                    return self._take_in(self._folders, reference)
                except AdapterExists:
                    return self.get(reference, key)
        raise AdapterNotFound(reference, self._nearest(reference))

    def look_up(self, reference: str, key: str | None = None) -> tuple[str, str] | None:
        """The adapter's name and the digest that `reference` means, whether it can be served or not; no I/O."""
        self.registry.refresh()
        try:
            asked = parse_reference(reference)
        except ValueError:
            return None
        entry = self.registry.entries.get(reference)
        if entry is None or entry.kind is not Kind.ALIAS or entry.value is None or asked.name in self._reserved:
            return self._version_of(asked)
        return self._target(parse_reference(choose(reference, targets_in(entry.value), key)))

    def all(self) -> list[Found]:
        """Every adapter that can be served, by name, new folders included. Those that can't be are logged once."""
        adapters = (entry for entry in self.entries() if entry.kind is Kind.ADAPTER)
        return [found for entry in adapters for found in self._served(entry)]

    def servable(self, refused: Collection[str] = ()) -> list[Entry]:
        """The same and the aliases that lead to one of them, by name; digests that the engine `refused` don't count."""
        return [e for e in self.entries() if any(found.ref.digest not in refused for found in self._served(e))]

    def entries(self) -> list[Entry]:
        """Every adapter and alias, by name, new folders included."""
        self.registry.refresh()
        with self._lock:
            for folder in self._folders.scan() if self._folders is not None else ():
                if folder.name not in self.registry.entries:
                    try:
                        self._take_in(self._folders, folder.name)  # pyright: ignore[reportArgumentType]
                    except AdapterError as error:
                        logger.debug("%s: %s", folder.name, error)  # `_take_in` has told
        self.registry.refresh()
        entries = list(self.registry.entries.values())
        present = [e for e in entries if e.value is not None and parse_reference(e.name).name not in self._reserved]
        return sorted(present, key=lambda entry: entry.name)

    def refusals(self) -> dict[str, str]:
        """Folders that are not served: name and reason."""
        return {} if self._folders is None else self._folders.refusals(list(self.registry.entries.values()))

    def changed(self, entry: Entry) -> str | None:
        """What lies in an adapter's folder if that is not what its name means: a digest, or "refused"."""
        return None if self._folders is None else self._folders.changed(entry)

    def stage(self, name: str, source: Path) -> Found:
        """Take an adapter folder's content in, under no name yet. Raises AdapterRefused, AdapterUnavailable."""
        self.check_name(name)
        # Before: what changes meanwhile has changed.
        folder = "" if self._folders is None else self._folders.own_signature(name, source)
        manifest = self.objects.put(source, name, self._shape)
        self.registry.add_version(AdapterVersion.of(manifest, self._shape, time.time()))
        return replace(self._found(name, manifest.ref.digest), folder=folder)

    def publish(self, found: Found, origin: str, *, new: bool = False) -> Entry:
        """Let a name mean what was staged.

        Raises AdapterConflict if it is an alias, AdapterExists if it should be `new` and stands for something.
        """
        return self._publish(found, origin, lambda entry: not new or entry is None or entry.value is None)

    def set_alias(self, name: str, wanted: Sequence[tuple[str, float]], origin: str) -> Entry:
        """Let `name`, or `adapter@tag`, stand for adapters, by weight.

        Raises ValueError, AdapterRefused, AdapterNotFound, AdapterConflict.
        """
        alias = check_alias(name)
        self.check_name(alias.name)
        if self._is_folder(name) and name not in self.registry.entries:
            raise AdapterConflict(f"{name!r} is an adapter's folder that lies in --adapters-dir: choose another name")
        targets = check_targets(alias, wanted)
        value = json.dumps([(self._fixed(target), weight) for target, weight in targets])
        self._spare(name)
        entry = self.registry.push(name, Kind.ALIAS, value, self._leads, action="alias", origin=origin)
        logger.info("alias %s: %s", name, entry.value)
        return entry

    def has(self, name: str) -> bool:
        """Whether a name stands for something, whether it can be served or not."""
        self.registry.refresh()
        entry = self.registry.entries.get(name)
        return entry is not None and entry.value is not None

    def inspect(self, folder: Path) -> AdapterManifest:
        """Check an adapter folder as `stage` does, and leave it. Raises AdapterRefused, AdapterUnavailable."""
        manifest = inspect_adapter(folder, folder.name, self._shape)
        check_values(folder, manifest)
        return manifest

    def before(self, name: str) -> Found | None:
        """The version that a rollback of an adapter leads to; None where there is none, or for an alias."""
        self.registry.refresh()
        entry = self.registry.entries.get(name)
        if entry is None or entry.kind is not Kind.ADAPTER or len(entry.stack) < 2:
            return None
        return self._fitting(self._found(name, entry.stack[-2]))

    def rollback(self, name: str, origin: str, kind: Kind | None = None) -> Entry:
        """Give an adapter or alias (`kind` None: either) its value before. Raises AdapterNotFound, AdapterConflict."""
        self._spare(name)
        with self._naming(name):
            entry = self.registry.rollback(name, origin, self._leads, kind)
        logger.info("%s rolled back to %s", name, entry.value)
        return entry

    def remove(self, name: str, origin: str, kind: Kind | None = None) -> Entry:
        """Take an adapter's or alias's name away; its content goes with `sweep`.

        Raises AdapterNotFound, AdapterConflict if an alias needs it.
        """
        self._spare(name)
        folder = "" if self._folders is None else self._signature(name)
        with self._naming(name):
            entry = self.registry.remove(name, origin, folder, kind)
        logger.info("%s removed", name)
        return entry

    def sweep(self, grace_seconds: float = GRACE_SECONDS) -> list[str]:
        """Delete the content that no name has meant nor could be rolled back to for so long; the digests."""
        gone = self.registry.drop_versions(lambda: self.objects.unused(grace_seconds), self.objects.delete)
        self.objects.clear_staging(grace_seconds)
        return gone

    def check(self) -> None:
        """Raises AdapterUnavailable when the store is gone."""
        self.registry.check()
        self.objects.check()

    def check_name(self, name: str) -> None:
        """Raises AdapterRefused for a name that no adapter may have."""
        if not NAME_PATTERN.fullmatch(name):
            raise AdapterRefused(f"{name!r} is no adapter name (expected {NAME_PATTERN.pattern})")
        if name in self._reserved:
            raise AdapterRefused(f"the name {name!r} is reserved: choose another")

    def close(self) -> None:
        """Close the registry's connection; a fork's child opens its own."""
        self.registry.close()

    def _publish(self, found: Found, origin: str, free: Callable[[Entry | None], bool]) -> Entry:
        """`free`: whether the name, as it stands then, may mean it."""
        name, digest = found.ref.name, found.ref.digest

        def check(_: str) -> None:
            if not free(self.registry.entries.get(name)):
                raise AdapterExists(f"{name!r} exists already")
            if not self.objects.path(digest).is_dir():
                raise AdapterUnavailable(f"version {digest[:12]} was deleted before {name!r} could mean it: try again")

        self._spare(name)
        entry = self.registry.push(
            name, Kind.ADAPTER, digest, check, action="publish", origin=origin, folder=found.folder
        )  # fmt: skip
        logger.info("adapter %s: sha256 %s, rank %d, from %s", name, digest[:12], found.version.rank, origin)
        return entry

    def _take_in(self, folders: Folders, name: str) -> Found:
        """Raises AdapterExists when another process has named something so meanwhile, or taken the name away."""
        if name in self.registry.entries:
            raise AdapterNotFound(name, hint=removed(name))
        if (refusal := folders.known_refusal(name)) is not None:
            raise refusal
        signature = folders.signature(name, ADAPTER_FILES)
        try:
            found = self.stage(name, folders.root / name)
        except AdapterRefused as error:
            folders.refuse(name, signature, error)
            raise
        except AdapterUnavailable as error:
            folders.tell(f"adapter folder skipped: {name}: {error}")
            raise
        folders.refused.pop(name, None)
        self._publish(found, "its folder", lambda entry: entry is None)
        return found

    def _version_of(self, asked: Reference) -> tuple[str, str] | None:
        entry = self.registry.entries.get(asked.name)
        if entry is None or entry.value is None or entry.kind is not Kind.ADAPTER or asked.name in self._reserved:
            return None
        if asked.at is None:
            return asked.name, entry.value
        if not DIGEST_PREFIX.fullmatch(asked.at):
            return None
        matching = {digest for digest in entry.stack if digest.startswith(asked.at)}
        return (asked.name, matching.pop()) if len(matching) == 1 else None

    def _served(self, entry: Entry) -> Iterator[Found]:
        """What an adapter's or alias's name may mean and can be served."""
        for meant in self._meanings(entry):
            try:
                if meant is not None:
                    yield self._fitting(self._found(*meant))
            except (AdapterRefused, AdapterUnavailable) as error:
                logger.debug("%s: %s", entry.name, error)

    def _meanings(self, entry: Entry) -> list[tuple[str, str] | None]:
        if entry.kind is Kind.ADAPTER or entry.value is None:
            return [None if entry.value is None else (entry.name, entry.value)]
        return [self._target(parse_reference(text)) for text, _ in targets_in(entry.value)]

    def _target(self, target: Reference) -> tuple[str, str] | None:
        """What an alias's target means; a digest is in full there, and kept for the alias."""
        return self._version_of(target) if target.at is None else (target.name, target.at)

    def _fitting(self, found: Found) -> Found:
        """Raises AdapterRefused where what was published does not fit the base that is served now."""
        digest = found.ref.digest
        if found.version.shape != self._shape:
            if digest not in self._unfit:
                try:
                    inspect_adapter(Path(found.ref.path), found.ref.name, self._shape)
                    self._unfit[digest] = ""
                except AdapterRefused as error:
                    self._unfit[digest] = str(error)
            if self._unfit[digest]:
                raise AdapterRefused(self._unfit[digest])
        return found

    def _found(self, name: str, digest: str) -> Found:
        version = self.registry.versions.get(digest)
        if version is None:
            raise AdapterUnavailable(f"version {digest[:12]} of {name!r} is not in the store any more: publish it")
        return Found(AdapterRef(digest, name, str(self.objects.path(digest))), version)

    def _is_folder(self, name: str) -> bool:
        return self._folders is not None and self._folders.find(name) is not None

    def _signature(self, name: str) -> str | None:
        return self._folders.signature(name) if self._folders is not None and self._folders.find(name) else None

    @contextmanager
    def _naming(self, name: str) -> Generator[None]:
        """Adds the nearest names to an AdapterNotFound that has no better hint."""
        try:
            yield
        except AdapterNotFound as error:
            raise error if error.hint else AdapterNotFound(name, self._nearest(name)) from None

    def _spare(self, name: str) -> None:
        """What a change of this name may leave without any is young again for `sweep`."""
        if (entry := self.registry.entries.get(name)) is not None:
            self.objects.touch(entry.digests)

    def _leads(self, value: str) -> None:
        check_leads(value, self.registry)

    def _fixed(self, target: Reference) -> str:
        """A target as it is kept: a digest written in full."""
        entry = self.registry.entries.get(str(target))
        if entry is not None and entry.kind is Kind.ALIAS and entry.value is not None:
            raise ValueError(f"{str(target)!r} is an alias; name its targets instead")
        found = self.get(str(target))
        return target.name if target.at is None else f"{target.name}@{found.ref.digest}"

    def _nearest(self, name: str) -> list[str]:
        known = list(self.registry.entries.values())
        if len(known) < _MANY:
            known = self.entries()  # new folders, too
        return nearest(name, [entry.name for entry in known if entry.value is not None])
