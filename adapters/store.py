"""Maps adapter names to content: a folder of PEFT adapter folders, each servable under its folder's name.

A name means the content it had when it was first seen; a folder that changes later is not served under the old
name's digest. New folders are found on a listing or at the first request that names them; those that are gone are
forgotten on a listing. Works without torch.
"""

import difflib
import logging
import threading
from collections.abc import Callable
from pathlib import Path

from adapters.adapter import NAME_PATTERN, AdapterManifest, BaseShape
from adapters.errors import AdapterNotFound, AdapterRefused, AdapterUnavailable
from adapters.lora_config import CONFIG_FILE
from adapters.validation import WEIGHTS_FILE, inspect_adapter

logger = logging.getLogger(__name__)
Signature = tuple[tuple[int, int, int] | None, ...]


class AdapterStore:
    """The adapters found under `root`, checked against a base of `shape`. Safe to use from several threads."""

    def __init__(self, root: Path, shape: BaseShape, reserved: frozenset[str] = frozenset()) -> None:
        """`reserved` are names that no adapter may have, as the base's own. Raises NotADirectoryError."""
        if not root.is_dir():
            raise NotADirectoryError(f"adapters directory {str(root)!r} does not exist or is not a directory")
        self._root, self._shape, self._reserved = root, shape, reserved
        self._found: dict[str, AdapterManifest] = {}
        self._refused: dict[str, tuple[Signature, AdapterRefused]] = {}
        self._ignored: set[str] = set()
        self._lock = threading.RLock()  # held while files are read: nothing is read twice

    def known(self, name: str) -> AdapterManifest | None:
        """The adapter of this name if it has been found already: no I/O, no waiting."""
        return self._found.get(name)

    def get(self, name: str) -> AdapterManifest:
        """The adapter of this name. Reads files if it is not known yet.

        Raises AdapterNotFound with the nearest names, AdapterRefused with the reason, AdapterUnavailable on I/O.
        """
        if (manifest := self._found.get(name)) is not None:
            return manifest
        folder = self._root / name
        with self._lock:
            if not NAME_PATTERN.fullmatch(name) or name in self._reserved or not _is_adapter(folder):
                raise AdapterNotFound(name, self._nearest(name))
            return self._inspect(name, folder)

    def all(self) -> list[AdapterManifest]:
        """Every adapter that can be served, by name; those whose folder is gone are forgotten.

        Folders that can't be served are logged once, with the reason.
        """
        with self._lock:
            self._scan()
            return sorted(self._found.values(), key=lambda manifest: manifest.ref.name)

    def _scan(self) -> None:
        try:
            folders = sorted(path for path in self._root.iterdir() if path.is_dir())
        except OSError as error:
            logger.warning("adapters directory %s can't be read: %s", self._root, error)
            return  # what was found stays known: the folder may come back
        for name in self._found.keys() - {folder.name for folder in folders}:
            del self._found[name]
            logger.info("adapter %s: its folder is gone", name)
        for folder in folders:
            if folder.name.startswith(".") or folder.name in self._found or not _is_adapter(folder):
                continue
            if folder.name in self._reserved:
                self._log_once(folder.name, "the name is reserved, rename the folder")
                continue
            if not NAME_PATTERN.fullmatch(folder.name):
                self._log_once(folder.name, f"not a usable adapter name (expected {NAME_PATTERN.pattern})")
                continue
            try:
                self._inspect(folder.name, folder)
            except (AdapterRefused, AdapterUnavailable) as error:
                self._log_once(folder.name, str(error))

    def _inspect(self, name: str, folder: Path) -> AdapterManifest:
        if (manifest := self._found.get(name)) is not None:
            return manifest  # found by another thread while this one waited
        signature = _signature(folder)
        if (refused := self._refused.get(name)) is not None and refused[0] == signature:
            raise AdapterRefused(*refused[1].args)
        try:
            manifest = inspect_adapter(folder, name, self._shape)
        except AdapterRefused as error:
            self._refused[name] = (signature, error)
            raise
        self._refused.pop(name, None)
        self._found[name] = manifest
        logger.info("adapter %s: sha256 %s, rank %d", name, manifest.ref.digest[:12], manifest.rank)
        return manifest

    def _nearest(self, name: str) -> list[str]:
        known = [manifest.ref.name for manifest in self.all()]
        folded: Callable[[str], str] = str.casefold
        close = difflib.get_close_matches(name.casefold(), map(folded, known), n=3, cutoff=0.4)
        return [k for c in close for k in known if k.casefold() == c][:3] or known[:3]

    def _log_once(self, name: str, reason: str) -> None:
        if (line := f"{name}: {reason}") not in self._ignored:
            self._ignored.add(line)
            logger.warning("adapter folder skipped: %s", line)


def _is_adapter(folder: Path) -> bool:
    return (folder / CONFIG_FILE).exists() or (folder / WEIGHTS_FILE).exists()


def _signature(folder: Path) -> Signature:
    """Changes when either file is replaced or rewritten."""

    def one(name: str) -> tuple[int, int, int] | None:
        try:
            stat = (folder / name).stat()
        except OSError:
            return None
        return stat.st_mtime_ns, stat.st_size, stat.st_ino

    return one(CONFIG_FILE), one(WEIGHTS_FILE)
