"""The adapters that can be named: content by digest, names and aliases over it, and the folder people drop them into.

A folder in `--adapters-dir` is taken into the store when it is first named or listed; from then on its name means that
content, whatever becomes of the folder, until it is published again. Works without torch.
"""

import difflib
import hashlib
import json
import logging
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from adapters.adapter import NAME_PATTERN, AdapterManifest, AdapterRef, AdapterVersion, BaseShape
from adapters.errors import AdapterConflict, AdapterNotFound, AdapterRefused, AdapterUnavailable
from adapters.folders import Folders
from adapters.objects import Objects
from adapters.references import DIGEST_PREFIX, Reference, is_tag, parse_reference, parse_weight
from adapters.registry import Entry, Kind, Registry
from adapters.validation import inspect_adapter
from adapters.values import check_values

logger = logging.getLogger(__name__)
MAX_TARGETS = 16
GRACE_SECONDS = 3600.0
"""How long content that nothing names stays: a request may still be on its way to it."""


@dataclass(frozen=True)
class Found:
    """What a reference means now."""

    ref: AdapterRef
    version: AdapterVersion


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
        """What `reference` means if that takes no more than a look at the registry.

        `key`: whom a weighted alias sends to the same target each time. Raises AdapterRefused, AdapterUnavailable.
        """
        self.registry.refresh()
        try:
            asked = parse_reference(reference)
        except ValueError:
            return None
        entry = self.registry.entries.get(reference)
        if entry is not None and entry.kind is Kind.ALIAS and entry.value is not None:
            asked = parse_reference(_choose(reference, _targets(entry), key))
        return self._registered(asked)

    def get(self, reference: str, key: str | None = None) -> Found:
        """The same, and takes in a folder of that name.

        Raises AdapterNotFound with the nearest names, AdapterRefused with the reason, AdapterUnavailable on I/O.
        """
        if (found := self.known(reference, key)) is not None:
            return found
        with self._lock:
            if (found := self.known(reference, key)) is not None:
                return found
            if self._folders is not None and self._folders.find(reference) is not None:
                return self._take_in(self._folders, reference)
        raise AdapterNotFound(reference, self._nearest(reference))

    def all(self) -> list[Found]:
        """Every adapter that can be served, by name, new folders included. Those that can't be are logged once."""
        return [found for entry in self.entries() if (found := self._served(entry)) is not None]

    def entries(self) -> list[Entry]:
        """Every adapter and alias, by name, new folders included."""
        with self._lock:
            for folder in self._folders.scan() if self._folders is not None else ():
                if folder.name not in self.registry.entries:
                    try:
                        self._take_in(self._folders, folder.name)  # pyright: ignore[reportArgumentType]
                    except (AdapterRefused, AdapterUnavailable) as error:
                        logger.debug("%s: %s", folder.name, error)  # `_take_in` has told
        self.registry.refresh()
        present = [entry for entry in list(self.registry.entries.values()) if entry.value is not None]
        return sorted(present, key=lambda entry: entry.name)

    def refusals(self) -> dict[str, str]:
        """Folders that can't be taken in: name and reason."""
        if self._folders is None:
            return {}
        return {name: str(error) for name, (_, error) in sorted(self._folders.refused.items())}

    def changed(self, entry: Entry) -> str | None:
        """What lies in an adapter's folder if that is not what its name means: a digest, or "refused"."""
        folders = self._folders
        if folders is None or folders.find(entry.name) is None or folders.signature(entry.name) == entry.folder:
            return None
        digest = folders.digest(entry.name)
        return None if digest == entry.value else digest or "refused"

    def stage(self, name: str, source: Path) -> Found:
        """Take an adapter folder's content in, under no name yet. Raises AdapterRefused, AdapterUnavailable."""
        self.check_name(name)
        manifest = self.objects.put(source, name, self._shape)
        digest = manifest.ref.digest
        self.registry.add_version(AdapterVersion.of(manifest, self._shape, time.time()))
        return self._found(name, digest)

    def publish(self, found: Found, origin: str) -> Entry:
        """Let a name mean what was staged. Raises AdapterConflict if the name is an alias."""
        name, digest = found.ref.name, found.ref.digest
        folder = self._folders.signature(name) if self._folders is not None and self._folders.find(name) else None
        entry = self.registry.push(name, Kind.ADAPTER, digest, action="publish", origin=origin, folder=folder)
        logger.info("adapter %s: sha256 %s, rank %d, from %s", name, digest[:12], found.version.rank, origin)
        return entry

    def set_alias(self, name: str, targets: Sequence[tuple[str, float]], origin: str) -> Entry:
        """Let `name` (or `adapter@tag`) stand for adapters, by weight. Raises ValueError, AdapterNotFound, AdapterConflict."""
        alias = parse_reference(name)
        self.check_name(alias.name)
        if not 1 <= len(targets) <= MAX_TARGETS:
            raise ValueError(f"{len(targets)} targets; expected 1 to {MAX_TARGETS}")
        if alias.at is not None and not is_tag(alias.at):
            raise ValueError(f"{name!r}: a tag of hex digits alone could be a digest's beginning; choose another")
        fixed: list[tuple[str, float]] = []
        for reference, weight in targets:
            if parse_weight(weight, reference) < 0:
                raise ValueError(f"{reference!r}: the weight is {weight!r}; expected a positive number")
            fixed.append((self._fixed(alias, reference), float(weight)))
        entry = self.registry.push(name, Kind.ALIAS, json.dumps(fixed), action="alias", origin=origin)
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
        return self._fitting(name, entry.stack[-2])

    def digests(self) -> set[str]:
        """Every version that a name means or could be rolled back to, or that an alias is fixed on."""
        self.registry.refresh()
        kept: set[str] = set()
        for entry in list(self.registry.entries.values()):
            kept.update(entry.stack if entry.kind is Kind.ADAPTER else (t.partition("@")[2] for t in _past(entry)))
        return kept

    def rollback(self, name: str, origin: str) -> Entry:
        """Give an adapter or alias its value before. Raises AdapterNotFound, AdapterConflict."""
        entry = self.registry.rollback(name, origin)
        logger.info("%s rolled back to %s", name, entry.value)
        return entry

    def remove(self, name: str, origin: str) -> Entry:
        """Take a name away; its content goes with `sweep`. Raises AdapterNotFound, AdapterConflict if an alias needs it."""
        if users := self.aliases_of(name):
            raise AdapterConflict(f"{name!r} is a target of {', '.join(users)}: change or remove the alias first")
        folder = self._folders.signature(name) if self._folders is not None and self._folders.find(name) else None
        try:
            entry = self.registry.remove(name, origin, folder)
        except AdapterNotFound:
            raise AdapterNotFound(name, self._nearest(name)) from None
        logger.info("%s removed", name)
        return entry

    def aliases_of(self, name: str) -> list[str]:
        """The aliases that have an adapter among their targets."""
        self.registry.refresh()
        aliases = [e for e in list(self.registry.entries.values()) if e.kind is Kind.ALIAS and e.value is not None]
        return sorted(e.name for e in aliases if any(parse_reference(t).name == name for t, _ in _targets(e)))

    def sweep(self, grace_seconds: float = GRACE_SECONDS) -> list[str]:
        """Delete the content that no name means nor could be rolled back to; the digests."""
        gone = self.objects.sweep(self.digests(), grace_seconds)
        self.registry.drop_versions(gone)
        return gone

    def check_name(self, name: str) -> None:
        """Raises AdapterRefused for a name that no adapter may have."""
        if not NAME_PATTERN.fullmatch(name):
            raise AdapterRefused(f"{name!r} is no adapter name (expected {NAME_PATTERN.pattern})")
        if name in self._reserved:
            raise AdapterRefused(f"the name {name!r} is reserved: choose another")

    def close(self) -> None:
        """Close the registry's connection; a fork's child opens its own."""
        self.registry.close()

    def _take_in(self, folders: Folders, name: str) -> Found:
        if name in self.registry.entries:
            raise AdapterNotFound(name, hint=f"it was removed; publish {name} from its folder to serve it again")
        if (refusal := folders.known_refusal(name)) is not None:
            raise refusal
        signature = folders.signature(name)
        try:
            found = self.stage(name, folders.root / name)
        except AdapterRefused as error:
            folders.refuse(name, signature, error)
            raise
        except AdapterUnavailable as error:
            folders.tell(f"adapter folder skipped: {name}: {error}")
            raise
        folders.refused.pop(name, None)
        self.publish(found, "its folder")
        return found

    def _registered(self, asked: Reference) -> Found | None:
        entry = self.registry.entries.get(asked.name)
        if entry is None or entry.value is None or entry.kind is not Kind.ADAPTER:
            return None
        if asked.at is None:
            return self._fitting(asked.name, entry.value)
        known = [asked.at] if asked.at in self.registry.versions else entry.stack
        matching = {digest for digest in known if digest.startswith(asked.at) and DIGEST_PREFIX.fullmatch(asked.at)}
        return self._fitting(asked.name, matching.pop()) if len(matching) == 1 else None

    def _served(self, entry: Entry) -> Found | None:
        if entry.kind is not Kind.ADAPTER or entry.value is None:
            return None
        try:
            return self._fitting(entry.name, entry.value)
        except (AdapterRefused, AdapterUnavailable) as error:
            logger.debug("%s: %s", entry.name, error)
            return None

    def _fitting(self, name: str, digest: str) -> Found:
        """Raises AdapterRefused where what was published does not fit the base that is served now."""
        found = self._found(name, digest)
        if found.version.shape != self._shape:
            if digest not in self._unfit:
                try:
                    inspect_adapter(Path(found.ref.path), name, self._shape)
                    self._unfit[digest] = ""
                except AdapterRefused as error:
                    self._unfit[digest] = str(error)
            if self._unfit[digest]:
                raise AdapterRefused(self._unfit[digest])
        return found

    def _found(self, name: str, digest: str) -> Found:
        return Found(AdapterRef(digest, name, str(self.objects.path(digest))), self.registry.versions[digest])

    def _fixed(self, alias: Reference, reference: str) -> str:
        """A target as it is kept: a digest written in full."""
        target = parse_reference(reference)
        if alias.at is not None and target.name != alias.name:
            raise ValueError(f"{reference!r}: {str(alias)!r} can only stand for versions of {alias.name!r}")
        entry = self.registry.entries.get(reference)
        if entry is not None and entry.kind is Kind.ALIAS and entry.value is not None:
            raise ValueError(f"{reference!r} is an alias; name its targets instead")
        if target.name == alias.name and alias.at is None:
            raise ValueError(f"{reference!r}: an alias can't have its own name as target")
        found = self.get(reference)
        return target.name if target.at is None else f"{target.name}@{found.ref.digest}"

    def _nearest(self, name: str) -> list[str]:
        known = [entry.name for entry in self.entries()]
        folded: Callable[[str], str] = str.casefold
        close = difflib.get_close_matches(name.casefold(), map(folded, known), n=3, cutoff=0.4)
        return [k for c in close for k in known if k.casefold() == c][:3] or known[:3]


def _targets(entry: Entry) -> list[tuple[str, float]]:
    return [] if entry.value is None else [(reference, weight) for reference, weight in json.loads(entry.value)]


def _past(alias: Entry) -> list[str]:
    """The references that an alias leads to, or could be rolled back to."""
    return [reference for value in alias.stack for reference, _ in json.loads(value)]


def _choose(alias: str, targets: Sequence[tuple[str, float]], key: str | None) -> str:
    """One target, as often as its weight says; always the same for the same alias, targets and key."""
    if key is None:
        point = random.random()
    else:
        point = int.from_bytes(hashlib.sha256(f"{alias}\0{key}".encode(errors="replace")).digest()[:8]) / 2**64
    point *= sum(weight for _, weight in targets)
    for reference, weight in targets:
        point -= weight
        if point < 0:
            return reference
    return targets[-1][0]
