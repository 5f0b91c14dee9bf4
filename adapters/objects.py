"""Adapter folders by their content's digest: written aside, synced, renamed into place. Works without torch.

DIR/objects/ab/abcd.../   the files of one version; never changed but for what lies beside the weights
DIR/staging/              what is being written; a process that dies leaves it for `sweep`
DIR/locks/                whoever downloads holds one
"""

import errno
import fcntl
import hashlib
import os
import shutil
import time
import uuid
import zlib
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from adapters.adapter import AdapterManifest, BaseShape
from adapters.errors import AdapterError, AdapterRefused, AdapterUnavailable
from adapters.golden import GOLDEN_FILE
from adapters.lora_config import CONFIG_FILE
from adapters.tensorfile import open_regular
from adapters.validation import MAX_WEIGHTS_BYTES, WEIGHTS_FILE, inspect_adapter
from adapters.values import check_values

PROOF_FILES = (CONFIG_FILE, WEIGHTS_FILE, GOLDEN_FILE)
"""What decides the digest."""
SIDECARS = ("report.json", "report.html", "README.md", "recipe.yaml", "loss.png")
"""What may lie beside: replaced when the same content is published again."""
ADAPTER_FILES = (*PROOF_FILES, *SIDECARS)
MAX_SIDECAR_BYTES = 16 << 20
_LOCKS = 64


class Objects:
    """The folders under `root`. Safe to use from several processes."""

    def __init__(self, root: Path) -> None:
        """Raises AdapterUnavailable if it can't be written to."""
        self._objects, self._staging, self._locks = root / "objects", root / "staging", root / "locks"
        try:
            for folder in (self._objects, self._staging, self._locks):
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise AdapterUnavailable(f"{root} can't be written to ({error.strerror}): set --store-dir") from error

    def path(self, digest: str) -> Path:
        """Where the version of this digest lies, if it is there."""
        return self._objects / digest[:2] / digest

    @contextmanager
    def staging(self) -> Generator[Path]:
        """An empty folder on the same file system, deleted afterwards."""
        folder = self._staging / uuid.uuid4().hex
        try:
            folder.mkdir()
        except OSError as error:
            raise AdapterUnavailable(f"{self._staging} can't be written to: {error.strerror}") from error
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def downloads(self, source: str) -> Path:
        """Where downloads of `source` go on; `delete` clears what nobody finishes."""
        return self._staging / hashlib.sha256(source.encode(errors="replace")).hexdigest()

    def try_downloading(self, source: str) -> int | None:
        """A descriptor to close when the download is done; None while any process fetches the same source.

        Sources that share a lock wait for each other. Raises AdapterUnavailable.
        """
        path = self._locks / f"{zlib.crc32(source.encode(errors='replace')) % _LOCKS:02}"
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise AdapterUnavailable(f"{path} can't be opened: {error.strerror}") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            if isinstance(error, BlockingIOError):
                return None
            raise AdapterUnavailable(f"{path} can't be locked: {error.strerror}") from error
        return descriptor

    def put(self, source: Path, name: str, shape: BaseShape) -> AdapterManifest:
        """Copy the adapter folder `source` and check the copy; its manifest, with the path it has now.

        Raises AdapterRefused, AdapterUnavailable.
        """
        with _storing(source), self.staging() as staged:
            for file in ADAPTER_FILES:
                if (source / file).exists():
                    _copy(source / file, staged / file)
            try:
                manifest = inspect_adapter(staged, name, shape)
            except AdapterRefused:
                inspect_adapter(source, name, shape)  # tells of the folder by its own name
                raise AdapterUnavailable(f"{source.name} changed while it was read: try again") from None
            check_values(staged, manifest)
            self._place(staged, manifest.ref.digest, shape)
        return manifest

    def unused(self, grace_seconds: float) -> list[str]:
        """The digests whose content was neither put nor touched for so long; what names mean is not known here."""
        oldest = time.time() - grace_seconds
        found: list[str] = []
        for folder in self._objects.glob("??/*"):
            with suppress(FileNotFoundError):  # another process has just deleted it
                if folder.stat().st_mtime < oldest:
                    found.append(folder.name)
        return found

    def touch(self, digests: Iterable[str]) -> None:
        """They are young again for `unused`."""
        for digest in digests:
            with suppress(FileNotFoundError):
                os.utime(self.path(digest))

    def delete(self, digests: Sequence[str]) -> None:
        """Delete versions, each at once, whoever reads it."""
        for digest in digests:
            with self.staging() as bin_, suppress(FileNotFoundError):
                self.path(digest).rename(bin_ / digest)

    def clear_staging(self, grace_seconds: float) -> None:
        """Delete what was left in staging, if it is older."""
        oldest = time.time() - grace_seconds
        for folder in self._staging.iterdir():
            with suppress(FileNotFoundError):  # its owner has just finished
                if max(path.stat().st_mtime for path in (folder, *folder.rglob("*"))) < oldest:
                    shutil.rmtree(folder, ignore_errors=True)

    def check(self) -> None:
        """Raises AdapterUnavailable when the folders are gone."""
        if not self._objects.is_dir() or not self._staging.is_dir():
            raise AdapterUnavailable(f"{self._objects.parent} is gone or can't be read: is --store-dir mounted?")

    def _place(self, staged: Path, digest: str, shape: BaseShape) -> None:
        """Nobody ever sees the version without its files: whole folders come by one rename, single files by another."""
        _sync(staged)
        target = self.path(digest)
        if not target.parent.is_dir():
            target.parent.mkdir(exist_ok=True)
            _sync(self._objects)
        try:
            staged.rename(target)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
            mends = () if self._intact(target, digest, shape) else PROOF_FILES
            for file in (*SIDECARS, *mends):
                if (staged / file).is_file():
                    (staged / file).replace(target / file)
                elif file in mends:
                    (target / file).unlink(missing_ok=True)
            self.touch([digest])
        _sync(target.parent)

    def _intact(self, target: Path, digest: str, shape: BaseShape) -> bool:
        try:
            return inspect_adapter(target, digest[:12], shape).ref.digest == digest
        except AdapterError:
            return False


@contextmanager
def _storing(source: Path) -> Generator[None]:
    try:
        yield
    except OSError as error:
        raise AdapterUnavailable(f"{source.name} can't be stored: {error.strerror or error}") from error


def _copy(source: Path, target: Path) -> None:
    limit = MAX_SIDECAR_BYTES if source.name in SIDECARS else MAX_WEIGHTS_BYTES
    with open_regular(source, limit) as file, target.open("wb") as copy:
        while chunk := file.read(1 << 20):
            copy.write(chunk)
            if copy.tell() > limit:  # it grew, or its size is not what it announces
                raise AdapterRefused(f"{source.name} has more than {limit:,} bytes")
    _sync(target)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
