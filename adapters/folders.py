"""The folder of adapter folders that people drop adapters into (`--adapters-dir`). Works without torch."""

import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from adapters.adapter import NAME_PATTERN, BaseShape
from adapters.errors import AdapterRefused, AdapterUnavailable
from adapters.lora_config import CONFIG_FILE
from adapters.objects import ADAPTER_FILES, PROOF_FILES
from adapters.registry import Entry, Kind
from adapters.validation import WEIGHTS_FILE, inspect_adapter

logger = logging.getLogger(__name__)


class Folders:
    """Looks into `root`; remembers what was refused, and the digests of folders that changed, while they stay as is."""

    def __init__(self, root: Path, shape: BaseShape, reserved: frozenset[str]) -> None:
        """Raises NotADirectoryError."""
        if not root.is_dir():
            raise NotADirectoryError(f"adapters directory {str(root)!r} does not exist or is not a directory")
        self.root, self._shape, self._reserved = root, shape, reserved
        self.refused: dict[str, tuple[str, AdapterRefused]] = {}  # name -> (signature, why)
        self._digests: dict[str, tuple[str, str | None]] = {}  # name -> (signature, digest; None if refused)
        self._told: set[str] = set()

    def find(self, name: str) -> Path | None:
        """The adapter folder of this name, if there is one that may have it."""
        usable = NAME_PATTERN.fullmatch(name) and name not in self._reserved
        return self.root / name if usable and _is_adapter(self.root / name) else None

    def scan(self) -> Iterator[Path]:
        """Every adapter folder with a usable name, by name; others are logged, once."""
        try:
            folders = sorted(path for path in self.root.iterdir() if os.path.isdir(path))
        except OSError as error:
            self.tell(f"adapters directory {self.root} can't be read: {error}")
            return
        for folder in folders:
            if folder.name.startswith("."):
                continue
            if not os.access(folder, os.X_OK):
                self.tell(f"adapter folder skipped: {folder.name}: it can't be read")
                continue
            if not _is_adapter(folder):
                continue
            if folder.name in self._reserved:
                self.tell(f"adapter folder skipped: {folder.name}: the name is reserved, rename the folder")
            elif not NAME_PATTERN.fullmatch(folder.name):
                self.tell(
                    f"adapter folder skipped: {folder.name}: not a usable adapter name "
                    f"(expected {NAME_PATTERN.pattern})"
                )
            else:
                yield folder

    def known_refusal(self, name: str) -> AdapterRefused | None:
        """Why the folder was refused, if it is as it was then. A new exception each time: they gather tracebacks."""
        signature, error = self.refused.get(name, (None, None))
        if error is None or signature != self.signature(name, ADAPTER_FILES):
            self.refused.pop(name, None)
            return None
        return AdapterRefused(*error.args)

    def refuse(self, name: str, signature: str, error: AdapterRefused) -> None:
        """Remember a refusal of all that lay there; `signature` is of ADAPTER_FILES, taken before."""
        self.refused[name] = signature, error
        self.tell(f"adapter folder skipped: {name}: {error}")

    def signature(self, name: str, files: Sequence[str] = PROOF_FILES) -> str:
        """Changes when one of these files is replaced or rewritten; empty when none is there."""
        found: list[str] = []
        for file in files:
            try:
                stat = (self.root / name / file).stat()
            except OSError:
                continue
            found.append(f"{stat.st_mtime_ns}.{stat.st_size}.{stat.st_ino}")
        return " ".join(found)

    def own_signature(self, name: str, source: Path) -> str:
        """The signature, if `source` is what lies under the name here; else empty."""
        own = self.find(name)
        return self.signature(name) if own is not None and own.resolve() == source.resolve() else ""

    def digest(self, name: str) -> str | None:
        """The digest of what lies in the folder now; None if it can't be served. Reads the weights once a change."""
        signature = self.signature(name)
        if (known := self._digests.get(name)) is not None and known[0] == signature:
            return known[1]
        try:
            digest = inspect_adapter(self.root / name, name, self._shape).ref.digest
        except AdapterUnavailable:
            return None  # perhaps readable the next time
        except AdapterRefused:
            digest = None
        self._digests[name] = signature, digest
        return digest

    def changed(self, entry: Entry) -> str | None:
        """What lies in an adapter's folder if that is not what its name means: a digest, or "refused"."""
        if self.find(entry.name) is None or self.signature(entry.name) == entry.folder:
            return None
        digest = self.digest(entry.name)
        return None if digest == entry.value else digest or "refused"

    def refusals(self, entries: Iterable[Entry]) -> dict[str, str]:
        """The folders that are not served: name and reason."""
        told = {name: str(error) for name, (_, error) in self.refused.items()}
        for entry in entries:
            if entry.value is None and self.find(entry.name) is not None:
                told[entry.name] = removed(entry.name)
            elif entry.kind is Kind.ALIAS and self.find(entry.name) is not None:
                told[entry.name] = "its name is an alias's: rename the folder, or remove the alias"
        return dict(sorted(told.items()))

    def tell(self, line: str) -> None:
        """Log a warning the first time."""
        if line not in self._told:
            self._told.add(line)
            logger.warning("%s", line)


def removed(name: str) -> str:
    """Why a folder whose name was taken away is not taken in again."""
    return f"it was removed; publish {name} from its folder to serve it again"


def _is_adapter(folder: Path) -> bool:
    return any(os.path.exists(folder / file) for file in (CONFIG_FILE, WEIGHTS_FILE))  # unreadable: no error
