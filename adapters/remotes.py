"""The remote places that adapters come from: the hub, web servers, and what fsspec reaches. Works without torch."""

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx

from adapters.errors import AdapterUnavailable

CHUNK = 1 << 20
STALL_SECONDS = 30.0
_VERSIONS = ("ETag", "etag", "generation", "mtime", "created")  # what file systems tell, the surest first
_EXTRAS = {"s3": "s3fs", "gs": "gcsfs"}


class Missing(Exception):
    """There is no such folder; the text says what was looked for."""


@dataclass(frozen=True)
class RemoteFile:
    """One file, as its source describes it."""

    size: int
    version: str | None  # changes with the content; None: unknown, so nothing is resumed
    read: Callable[[int], Iterator[bytes]]  # from an offset on
    sha256: str | None = None


class HttpRemote:
    """A folder on a web server. Redirects are not followed: they could lead where nobody allowed it."""

    def __init__(self, address: str, seconds: float) -> None:
        self.origin = address
        self._client = httpx.Client(follow_redirects=False, timeout=min(STALL_SECONDS, seconds), trust_env=False)

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def find(self, name: str) -> RemoteFile | None:
        """Asks for the head of it."""
        url = f"{self.origin}/{name}"
        try:
            answer = self._client.head(url, headers={"Accept-Encoding": "identity"})
        except httpx.HTTPError as error:
            raise AdapterUnavailable(f"{url} can't be reached: {type(error).__name__}: {error}") from error
        if answer.status_code in (404, 410):
            return None
        if answer.status_code != 200:
            raise AdapterUnavailable(f"{url} answers {answer.status_code}; expected 200, redirects are not followed")
        if not answer.headers.get("content-length", "").isdecimal():
            raise AdapterUnavailable(f"{url} does not tell its Content-Length")
        told = _versions(answer)
        version = next(iter(told.values()), None)
        size = int(answer.headers["content-length"])
        return RemoteFile(size, version, lambda offset: self._read(url, offset, told))

    def _read(self, url: str, offset: int, told: dict[str, str]) -> Iterator[bytes]:
        headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={offset}-"} if offset else {})
        try:
            with self._client.stream("GET", url, headers=headers) as answer:
                if answer.status_code == 416:
                    return  # nothing is left
                if any(told.get(header, now) != now for header, now in _versions(answer).items()):
                    raise AdapterUnavailable(f"{url} changed while it was fetched: try again")
                if answer.status_code != (206 if offset else 200):
                    if not (offset and answer.status_code == 200):
                        raise AdapterUnavailable(f"{url} answers {answer.status_code}")
                    skip = offset  # it does not know ranges
                else:
                    skip = 0
                for chunk in answer.iter_raw():
                    kept, skip = chunk[skip:], max(0, skip - len(chunk))
                    if kept:
                        yield kept
        except httpx.HTTPError as error:
            raise AdapterUnavailable(f"{url} broke off: {type(error).__name__}: {error}; try again to go on") from error


def _versions(answer: httpx.Response) -> dict[str, str]:
    """What a server tells of a file's version, the surest first."""
    return {header: answer.headers[header] for header in ("etag", "last-modified") if header in answer.headers}


class FsspecRemote:
    """A folder on s3:// or gs://, with the credentials of the environment."""

    def __init__(self, address: str) -> None:
        self.origin = address
        scheme = address.partition(":")[0]
        try:
            importlib.import_module(_EXTRAS[scheme])
        except ImportError as error:
            raise AdapterUnavailable(
                f"{address}: {scheme}:// needs {_EXTRAS[scheme]}: pip install 'chorus-serve[sources]'"
            ) from error
        url_to_fs: Callable[[str], tuple[Any, str]] = importlib.import_module(
            "fsspec.core"
        ).url_to_fs  # it has no types
        self._files, self._path = url_to_fs(address)

    def close(self) -> None:
        """Nothing to close: the library keeps its connections."""

    def find(self, name: str) -> RemoteFile | None:
        """Asks for its size and version."""
        path = f"{self._path}/{name}"
        try:
            info: dict[str, Any] = self._files.info(path)
        except FileNotFoundError:
            return None
        version = next((str(info[key]) for key in _VERSIONS if info.get(key)), None)
        return RemoteFile(int(info["size"]), version, lambda offset: self._read(path, offset))

    def _read(self, path: str, offset: int) -> Iterator[bytes]:
        with self._files.open(path, "rb") as file:
            file.seek(offset)
            while chunk := file.read(CHUNK):
                yield chunk


class HubRemote:
    """`hf://org/repo` or `hf://org/repo@revision`, with the token of the environment. Resolved to one commit."""

    def __init__(self, address: str) -> None:
        from huggingface_hub import HfApi, HfFileSystem
        from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

        repository, _, revision = address.removeprefix("hf://").partition("@")
        try:
            info = HfApi().model_info(repository, revision=revision or None, files_metadata=True, timeout=STALL_SECONDS)
        except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
            raise Missing(f"the hub knows no model {repository!r} at {revision or 'main'!r}: {error}") from None
        self.origin = f"hf://{repository}@{info.sha}"
        self._siblings = {file.rfilename: file for file in info.siblings or ()}
        self._files: Any = HfFileSystem()

    def close(self) -> None:
        """Nothing to close: the library keeps its connections."""

    def find(self, name: str) -> RemoteFile | None:
        """From what the hub told of the commit."""
        found = self._siblings.get(name)
        if found is None:
            return None
        if found.size is None:
            raise AdapterUnavailable(f"the hub does not tell the size of {name} of {self.origin}")
        sha256 = found.lfs.sha256 if found.lfs is not None else None
        path = f"{self.origin.removeprefix('hf://')}/{name}"
        return RemoteFile(found.size, found.blob_id, lambda offset: self._read(path, offset), sha256)

    def _read(self, path: str, offset: int) -> Iterator[bytes]:
        with self._files.open(path, "rb") as file:
            file.seek(offset)
            while chunk := file.read(CHUNK):
                yield chunk
