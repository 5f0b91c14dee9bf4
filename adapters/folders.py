"""The folder of adapter folders that people drop adapters into (`--adapters-dir`). Works without torch."""

import logging
from collections.abc import Iterator
from pathlib import Path

from adapters.adapter import NAME_PATTERN, BaseShape
from adapters.errors import AdapterRefused, AdapterUnavailable
from adapters.lora_config import CONFIG_FILE
from adapters.objects import PROOF_FILES
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
            folders = sorted(path for path in self.root.iterdir() if path.is_dir())
        except OSError as error:
            self.tell(f"adapters directory {self.root} can't be read: {error}")
            return
        for folder in folders:
            if folder.name.startswith(".") or not _is_adapter(folder):
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
        if error is None or signature != self.signature(name):
            self.refused.pop(name, None)
            return None
        return AdapterRefused(*error.args)

    def refuse(self, name: str, signature: str, error: AdapterRefused) -> None:
        """Remember a refusal."""
        self.refused[name] = signature, error
        self.tell(f"adapter folder skipped: {name}: {error}")

    def signature(self, name: str) -> str:
        """Changes when a file that decides the digest is replaced or rewritten; empty when none is there."""
        found: list[str] = []
        for file in PROOF_FILES:
            try:
                stat = (self.root / name / file).stat()
            except OSError:
                continue
            found.append(f"{stat.st_mtime_ns}.{stat.st_size}.{stat.st_ino}")
        return " ".join(found)

    def digest(self, name: str) -> str | None:
        """The digest of what lies in the folder now; None if it can't be served. Reads the weights once a change."""
        signature = self.signature(name)
        if (known := self._digests.get(name)) is not None and known[0] == signature:
            return known[1]
        try:
            digest = inspect_adapter(self.root / name, name, self._shape).ref.digest
        except (AdapterRefused, AdapterUnavailable):
            digest = None
        self._digests[name] = signature, digest
        return digest

    def tell(self, line: str) -> None:
        """Log a warning the first time."""
        if line not in self._told:
            self._told.add(line)
            logger.warning("%s", line)


def _is_adapter(folder: Path) -> bool:
    return (folder / CONFIG_FILE).exists() or (folder / WEIGHTS_FILE).exists()
