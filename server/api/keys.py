"""Who may do what: inference keys use and read, admin keys change adapters too. Knows nothing of HTTP.

Keys come from flags and from files of `KEY` or `LABEL KEY` a line; a file that changes is read anew.
"""

import hashlib
import hmac
import logging
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import SecretStr

from server.settings import Settings, SettingsError

logger = logging.getLogger(__name__)
REREAD_SECONDS = 1.0  # a changed file is noticed by the first request after so long
MAX_KEYS = 1000  # of each kind; every request is compared with all
_KEY = re.compile(r"[\x21-\x7e]+")
_LABEL = re.compile(r"[A-Za-z0-9._-]{1,64}")


@dataclass(frozen=True)
class Key:
    """One key; the text itself is forgotten."""

    label: str  # what logs call it
    digest: bytes  # SHA-256 of the key
    admin: bool


class Keys:
    """All keys of a server, as they are just now."""

    def __init__(self, settings: Settings) -> None:
        """Raises SettingsError, which never shows a key."""
        self._given = (("api", settings.api_key), ("admin", settings.admin_key))
        self._files = {"api": settings.api_key_file, "admin": settings.admin_key_file}
        self._read_at, self._seen = time.monotonic(), self._stat()
        self._keys = self._read()

    @property
    def inference_open(self) -> bool:
        """Whether inference needs no key."""
        return all(key.admin for key in self._keys)

    @property
    def changing_closed(self) -> bool:
        """Whether nobody may change adapters."""
        return not any(key.admin for key in self._keys)

    def find(self, sent: str) -> Key | None:
        """The key that was sent, if it is one. Its time tells nothing of how near it is."""
        self._follow_files()
        digest, found = hashlib.sha256(sent.encode()).digest(), None
        for key in self._keys:
            if hmac.compare_digest(digest, key.digest):
                found = key
        return found

    def _follow_files(self) -> None:
        """Read changed files anew; when that fails the keys before stay in force."""
        now = time.monotonic()
        if now - self._read_at < REREAD_SECONDS:
            return
        self._read_at, seen = now, self._stat()
        if seen == self._seen:
            return
        self._seen = seen
        try:
            self._keys = self._read()
        except SettingsError as error:
            logger.error("%s; the keys read before stay in force", error)
        else:
            admins = sum(key.admin for key in self._keys)
            logger.info("keys read anew: %d for inference, %d for admins", len(self._keys) - admins, admins)

    def _stat(self) -> list[tuple[int, int, int] | None]:
        """What changes when a file does; None for one that isn't there."""
        found: list[tuple[int, int, int] | None] = []
        for path in self._files.values():
            try:
                stat = path.stat() if path else None
            except OSError:
                stat = None
            found.append(stat and (stat.st_ino, stat.st_mtime_ns, stat.st_size))
        return found

    def _read(self) -> list[Key]:
        found: list[Key] = []
        for kind, given in self._given:
            texts = _from_flags(kind, given)
            if (path := self._files[kind]) is not None:
                texts += _from_file(f"--{kind}-key-file {path}", path)
            if len(texts) > MAX_KEYS:
                raise SettingsError(f"--{kind}-key and its file hold {len(texts)} keys; at most {MAX_KEYS} are taken")
            for number, (label, text) in enumerate(texts, 1):
                key = Key(label or f"{kind}-{number}", hashlib.sha256(text.encode()).digest(), kind == "admin")
                _check_is_another(key, found)
                found.append(key)
        return found


def _from_flags(kind: str, given: Sequence[SecretStr]) -> list[tuple[str, str]]:
    texts = [secret.get_secret_value() for secret in given]
    for number, text in enumerate(texts, 1):
        if not text:
            raise SettingsError(f"--{kind}-key: number {number} is blank; leave it out to have no key")
        if not _KEY.fullmatch(text):
            raise SettingsError(
                f"--{kind}-key: number {number} holds a blank or a character that is no ASCII: HTTP can't carry it; "
                f"choose another (labels are for --{kind}-key-file)"
            )
    return [("", text) for text in texts]


def _from_file(where: str, path: Path) -> list[tuple[str, str]]:
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{where} can't be read: {error}") from None
    found: list[tuple[str, str]] = []
    for number, line in enumerate(lines, 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        label, text = ("", words[0]) if len(words) == 1 else (words[0], words[1])
        if len(words) > 2 or not _KEY.fullmatch(text):
            raise SettingsError(f"{where}, line {number}: write KEY or LABEL KEY, a key in ASCII without blanks")
        if label and not _LABEL.fullmatch(label):
            raise SettingsError(f"{where}, line {number}: a label has letters, digits, `.`, `_`, `-`, at most 64")
        found.append((label, text))
    if not found:
        raise SettingsError(f"{where} holds no key; leave the setting out to have none")
    return found


def _check_is_another(key: Key, others: Sequence[Key]) -> None:
    for other in others:
        if other.digest == key.digest and other.admin != key.admin:
            raise SettingsError(
                f"--admin-key: {key.label} is the inference key {other.label} too: whoever may generate could change "
                "adapters; choose another"
            )
        if other.digest == key.digest or other.label == key.label:
            same = "the same key" if other.digest == key.digest else "two keys of one label"
            raise SettingsError(f"{other.label} and {key.label} are {same}; leave one out or choose another")
