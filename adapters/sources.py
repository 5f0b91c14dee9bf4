"""Where adapters are fetched from over HTTP: folders inside the configured roots, and remote places that are allowed.

Nothing remote is allowed unless configured. Downloads are bounded in bytes and time, go on where they broke off, and
are checked against the size, and the hash where there is one, that the source tells. Works without torch.
"""

import hashlib
import json
import re
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

from adapters.errors import AdapterError, AdapterNotFound, AdapterRefused, AdapterUnavailable
from adapters.lora_config import CONFIG_FILE
from adapters.objects import ADAPTER_FILES, MAX_SIDECAR_BYTES, SIDECARS
from adapters.remotes import FsspecRemote, HttpRemote, HubRemote, Missing, RemoteFile
from adapters.validation import WEIGHTS_FILE

CHUNK = 1 << 20
_SCHEMES = ("hf", "s3", "gs", "https", "http")
_PLAIN = re.compile(r"[A-Za-z0-9._@:/+=~-]+")


@dataclass(frozen=True)
class Fetched:
    """An adapter folder, not checked yet."""

    folder: Path
    origin: str  # for the history; of a hub id with its commit


class Remote(Protocol):
    """One remote folder."""

    origin: str

    def close(self) -> None:
        """Give its connections back."""
        ...

    def find(self, name: str) -> RemoteFile | None:
        """The file of this name; None if there is none."""
        ...


class Sources:
    """What `lora_path` may name."""

    def __init__(
        self, roots: Sequence[Path], allowed: Sequence[str] = (), max_bytes: int = 1 << 30, seconds: float = 300.0
    ) -> None:
        """`allowed`: beginnings of addresses; `max_bytes` of one adapter; `seconds` of one fetch.

        Raises ValueError for an address that can't be one.
        """
        self._roots = [root.resolve() for root in roots]
        self._allowed = [_address(text) for text in allowed]
        self._max_bytes, self._seconds = max_bytes, seconds

    def fetch(self, source: str, into: Path) -> Fetched:
        """The adapter folder at `source`; a remote one is downloaded into `into`, where a broken download goes on.

        Raises AdapterNotFound, AdapterRefused, AdapterUnavailable.
        """
        if "://" not in source:
            return self._local(source)
        try:
            address = _address(source)
        except ValueError as error:
            raise AdapterRefused(str(error)) from None
        if not any(_within(address, allowed) for allowed in self._allowed):
            raise AdapterRefused(f"{source!r} is not allowed; --adapter-sources names the addresses that are")
        deadline = time.monotonic() + self._seconds
        try:
            with closing(_remote(address, self._seconds)) as remote:
                into.mkdir(parents=True, exist_ok=True)
                self._download(remote, into, deadline)
        except Missing as error:
            raise AdapterNotFound(source, hint=str(error)) from None
        except AdapterError:
            raise
        except Exception as error:
            raise AdapterUnavailable(f"{source} can't be fetched: {type(error).__name__}: {error}") from error
        return Fetched(into, remote.origin)

    def _local(self, source: str) -> Fetched:
        outside = AdapterNotFound(source, hint="a path has to be a folder inside --adapters-dir or --adapter-roots")
        if "\0" in source or len(source) > 4096:
            raise outside
        for root in self._roots:
            try:
                folder = (root / source).resolve()
                files = [folder / name for name in ADAPTER_FILES if (folder / name).exists()]
                inside = folder != root and all(path.resolve().is_relative_to(root) for path in (folder, *files))
                if inside and folder.is_dir():
                    return Fetched(folder, str(folder))
            except (OSError, RuntimeError):  # too long a name, a loop of links
                continue
        raise outside

    def _download(self, remote: Remote, into: Path, deadline: float) -> None:
        left, versions = self._max_bytes, dict[str, str | None]()
        for name in ADAPTER_FILES:
            file = remote.find(name)
            versions[name] = None if file is None else file.version
            if file is None and name in (CONFIG_FILE, WEIGHTS_FILE):
                raise Missing(f"there is no {name} at {remote.origin}")
            if file is None:
                (into / name).unlink(missing_ok=True)  # of an earlier version
                continue
            limit = min(left, MAX_SIDECAR_BYTES) if name in SIDECARS else left
            if file.size > limit:
                raise AdapterRefused(
                    f"{name} at {remote.origin} has {file.size:,} bytes, {limit:,} are left of what is taken: "
                    "see --max-adapter-bytes"
                )
            _resume(file, into / name, deadline)
            left -= file.size
        for name, version in versions.items():  # files of two states together would be an adapter that nobody made
            file = remote.find(name)
            if (None if file is None else file.version) != version:
                raise AdapterUnavailable(f"{name} at {remote.origin} changed while it was fetched: try again")


def _resume(file: RemoteFile, target: Path, deadline: float) -> None:
    """Bring `target` up to date; what an earlier try left in NAME.partial is used if the file is still the same."""
    partial, note = target.with_name(f"{target.name}.partial"), target.with_name(f"{target.name}.version")
    version = json.dumps([file.size, file.version])
    known = file.version is not None and note.is_file() and note.read_text() == version
    if known and target.is_file() and target.stat().st_size == file.size:
        return
    if not known:
        for stale in (target, partial):
            stale.unlink(missing_ok=True)
    offset = partial.stat().st_size if partial.is_file() else 0
    note.write_text(version)
    digest = hashlib.sha256()
    with partial.open("r+b" if 0 < offset <= file.size else "wb") as out:
        while chunk := out.read(CHUNK) if out.readable() else b"":
            digest.update(chunk)
        for chunk in file.read(out.tell()):
            if time.monotonic() > deadline:
                raise AdapterUnavailable(
                    f"fetching {target.name} took too long, {out.tell():,} of {file.size:,} bytes are there: "
                    "try again, or raise --download-seconds"
                )
            if out.tell() + len(chunk) > file.size:
                raise AdapterUnavailable(f"{target.name} is longer than the {file.size:,} bytes it was said to have")
            out.write(chunk)
            digest.update(chunk)
        got = out.tell()
    if got != file.size:
        raise AdapterUnavailable(f"{target.name} ended after {got:,} of {file.size:,} bytes: try again to go on there")
    if file.sha256 is not None and digest.hexdigest() != file.sha256:
        partial.unlink()
        raise AdapterUnavailable(f"{target.name} has sha256 {digest.hexdigest()}, not {file.sha256} as its source says")
    partial.replace(target)


def _remote(address: str, seconds: float) -> Remote:
    match address.partition(":")[0]:
        case "hf":
            return HubRemote(address)
        case "http" | "https":
            return HttpRemote(address, seconds)
        case _:
            return FsspecRemote(address)


def _address(text: str) -> str:
    """A plain address, without a slash at its end. Raises ValueError for one that could mean another than it seems."""
    scheme, _, rest = text.partition("://")
    segments = rest.rstrip("/").split("/")
    if scheme not in _SCHEMES:
        raise ValueError(f"{text[:200]!r}: unknown scheme; expected one of {', '.join(_SCHEMES)}")
    if not _PLAIN.fullmatch(text) or any(segment in ("", ".", "..") for segment in segments):
        raise ValueError(f"{text[:200]!r}: only plain addresses are taken, without .., //, escapes or a query")
    if scheme in ("http", "https") and urlsplit(text).username is not None:
        raise ValueError(f"{text[:200]!r}: an address with a user in it is not taken")
    return text.rstrip("/")


def _within(address: str, allowed: str) -> bool:
    return address == allowed or address.startswith(f"{allowed}/") or (
        allowed.startswith("hf://") and address.startswith(f"{allowed}@")
    )  # fmt: skip
