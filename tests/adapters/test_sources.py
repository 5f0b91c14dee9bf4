"""Fetching adapters: only from where it is allowed, bounded, and going on where it broke off."""

import hashlib
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import fsspec
import huggingface_hub
import pytest

from adapters import remotes
from adapters.errors import AdapterNotFound, AdapterRefused, AdapterUnavailable
from adapters.objects import ADAPTER_FILES
from adapters.sources import Sources
from tests.adapters.support import ref_of, write_adapter

WEIGHTS = "adapter_model.safetensors"


class Web:
    """A web server on loopback; its attributes make it misbehave."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.asked: list[tuple[str, str, str | None]] = []  # method, file, range
        self.break_after: int | None = None  # bytes of the next answer with weights
        self.ranges, self.etag, self.extra, self.stall = True, "v1", 0, 0.0
        self.redirect: str | None = None
        self.changes_to: str | None = None  # the version, once a file's head was asked for
        web = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self.answer(body=False)

            def do_GET(self) -> None:
                self.answer(body=True)

            def answer(self, body: bool) -> None:
                asked_range = self.headers.get("range")
                web.asked.append((self.command, self.path.rsplit("/", 1)[1], asked_range))
                file = web.root / self.path.lstrip("/")
                if web.redirect is not None:
                    self.send_response(302)
                    self.send_header("Location", web.redirect)
                    self.end_headers()
                    return
                if not file.is_file():
                    self.send_error(404)
                    return
                data = file.read_bytes()
                start = int(asked_range[6:-1]) if asked_range and web.ranges else 0
                self.send_response(206 if start else 200)
                self.send_header("Content-Length", str(len(data) - start + (web.extra if body else 0)))
                self.send_header("ETag", web.etag)
                self.end_headers()
                if not body:
                    web.etag = web.changes_to or web.etag
                    return
                data = data[start:] + b"x" * web.extra
                if web.break_after is not None and file.name == WEIGHTS:
                    data, web.break_after = data[: web.break_after], None
                self.wfile.write(data)
                if web.stall:
                    self.wfile.flush()
                    time.sleep(web.stall)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def weights_ranges(self) -> list[str | None]:
        return [asked for method, file, asked in self.asked if method == "GET" and file == WEIGHTS]


@pytest.fixture
def web(tmp_path: Path) -> Iterator[Web]:
    write_adapter(tmp_path / "web" / "wilde")
    made = Web(tmp_path / "web")
    yield made
    made.close()


def test_a_folder_on_a_web_server_is_fetched_whole_and_once(web: Web, tmp_path: Path) -> None:
    (web.root / "wilde" / "report.json").write_text("{}")
    (web.root / "wilde" / "evil.bin").write_bytes(b"never asked for")
    sources = Sources([], [web.url])
    fetched = sources.fetch(f"{web.url}/wilde", tmp_path / "into")
    assert fetched.origin == f"{web.url}/wilde"
    assert ref_of(fetched.folder).digest == ref_of(web.root / "wilde").digest
    assert {file for _, file, _ in web.asked} == set(ADAPTER_FILES)
    sources.fetch(f"{web.url}/wilde", tmp_path / "into")
    assert web.weights_ranges() == [None], "what is there and has not changed is not fetched again"
    web.etag = "v2"
    sources.fetch(f"{web.url}/wilde", tmp_path / "into")
    assert web.weights_ranges() == [None, None]


@pytest.mark.parametrize("ranges", [True, False], ids=["ranges", "no ranges"])
def test_a_broken_download_goes_on_where_it_ended(web: Web, tmp_path: Path, ranges: bool) -> None:
    sources, web.break_after, web.ranges = Sources([], [web.url]), 500, ranges
    with pytest.raises(AdapterUnavailable, match=r"broke off: .*try again to go on|ended after 500 of"):
        sources.fetch(f"{web.url}/wilde", tmp_path / "into")
    assert not (tmp_path / "into" / WEIGHTS).exists(), "half a file has another name"
    fetched = sources.fetch(f"{web.url}/wilde", tmp_path / "into")
    assert web.weights_ranges() == [None, "bytes=500-"]
    assert ref_of(fetched.folder).digest == ref_of(web.root / "wilde").digest


def test_a_download_begins_anew_when_the_file_has_changed(web: Web, tmp_path: Path) -> None:
    sources, web.break_after = Sources([], [web.url]), 500
    with pytest.raises(AdapterUnavailable):
        sources.fetch(f"{web.url}/wilde", tmp_path / "into")
    web.etag = "v2"
    fetched = sources.fetch(f"{web.url}/wilde", tmp_path / "into")
    assert web.weights_ranges() == [None, None]
    assert ref_of(fetched.folder).digest == ref_of(web.root / "wilde").digest


def test_more_than_was_announced_is_not_taken(web: Web, tmp_path: Path) -> None:
    web.extra = 100
    with pytest.raises(AdapterUnavailable, match=r"is longer than the .* bytes it was said to have"):
        Sources([], [web.url]).fetch(f"{web.url}/wilde", tmp_path / "into")


def test_an_adapter_that_is_too_large_is_not_begun(web: Web, tmp_path: Path) -> None:
    with pytest.raises(AdapterRefused, match=f"{WEIGHTS} at .* bytes, .* are left of what is taken: see --max-adapter"):
        Sources([], [web.url], max_bytes=1000).fetch(f"{web.url}/wilde", tmp_path / "into")
    assert web.weights_ranges() == []


def test_a_redirect_is_not_followed(web: Web, tmp_path: Path) -> None:
    web.redirect = f"{web.url}/secret"
    with pytest.raises(AdapterUnavailable, match="answers 302; expected 200, redirects are not followed"):
        Sources([], [f"{web.url}/wilde"]).fetch(f"{web.url}/wilde", tmp_path / "into")
    assert len(web.asked) == 1


def test_a_server_that_stalls_is_given_up(web: Web, tmp_path: Path) -> None:
    web.stall, web.break_after = 2.0, 100
    with pytest.raises(AdapterUnavailable, match=r"broke off: ReadTimeout|took too long"):
        Sources([], [web.url], seconds=0.3).fetch(f"{web.url}/wilde", tmp_path / "into")


def test_a_fetch_has_a_deadline(web: Web, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 1000, 20))
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    with pytest.raises(AdapterUnavailable, match=r"took too long, 0 of .* bytes are there"):
        Sources([], [web.url], seconds=10).fetch(f"{web.url}/wilde", tmp_path / "into")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("https://host/adapters-evil", "is not allowed; --adapter-sources names"),
        ("https://host/other", "is not allowed"),
        ("https://host/adapters/../other", r"only plain addresses are taken, without \.\."),
        ("https://host/adapters//x", "only plain addresses"),
        ("https://host/adapters/%2e%2e/x", "only plain addresses"),
        ("https://host/adapters/x?y", "only plain addresses"),
        ("https://host/adapters\\x", "only plain addresses"),
        ("https://host@evil/adapters/x", "an address with a user in it"),
        ("https://host:444/adapters/x", "is not allowed"),
        ("http://host/adapters/x", "is not allowed"),
        ("file:///etc", "unknown scheme; expected one of hf, s3, gs, https, http"),
        ("memory://x", "unknown scheme"),
        ("s3://bucket/x", "is not allowed"),
        ("hf://org/repo", "is not allowed"),
        ("https://", "only plain addresses"),
    ],
)
def test_only_what_is_allowed_is_asked(source: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(AdapterRefused, match=message):
        Sources([], ["https://host/adapters/"]).fetch(source, tmp_path / "into")
    with pytest.raises(AdapterRefused):
        Sources([]).fetch(source, tmp_path / "into")


def test_a_wrong_setting_is_told_at_the_start() -> None:
    with pytest.raises(ValueError, match="'ftp://x': unknown scheme"):
        Sources([], ["ftp://x"])


def test_a_path_lies_inside_a_root(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    write_adapter(one / "wilde")
    write_adapter(two / "poe")
    write_adapter(tmp_path / "outside")
    (one / "link").symlink_to(tmp_path / "outside")
    (one / "across").mkdir()
    (one / "across" / WEIGHTS).symlink_to(tmp_path / "outside" / WEIGHTS)
    (one / "snapshot").symlink_to(one / "wilde")
    sources = Sources([one, two])
    for source, folder in [
        ("wilde", one / "wilde"), ("poe", two / "poe"), (str(two / "poe"), two / "poe"), ("snapshot", one / "wilde"),
    ]:  # fmt: skip
        assert sources.fetch(source, tmp_path / "unused").folder == folder
    for wrong in (
        "..", ".", "", "../outside", "wilde/../../outside", str(tmp_path / "outside"), "link", "across", "/etc",
        f"wilde/{WEIGHTS}", "wilde\0", "x" * 5000, "y" * 300, "nothing",
    ):  # fmt: skip
        with pytest.raises(AdapterNotFound, match="has to be a folder inside --adapters-dir or --adapter-roots"):
            sources.fetch(wrong, tmp_path / "unused")


def test_a_bucket_is_read_through_fsspec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_adapter(tmp_path / "wilde")
    memory = fsspec.filesystem("memory")
    for file in folder.iterdir():
        memory.pipe(f"/bucket/wilde/{file.name}", file.read_bytes())
    monkeypatch.setitem(remotes._EXTRAS, "s3", "fsspec")
    monkeypatch.setattr("fsspec.core.url_to_fs", lambda address: (memory, address.removeprefix("s3:/")))
    fetched = Sources([], ["s3://bucket"]).fetch("s3://bucket/wilde", tmp_path / "into")
    assert ref_of(fetched.folder).digest == ref_of(folder).digest
    memory.rm("/bucket", recursive=True)


def test_a_bucket_without_its_extra_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(remotes._EXTRAS, "gs", "no_such_module")
    with pytest.raises(AdapterUnavailable, match=r"gs:// needs no_such_module: pip install 'chorus-serve\[sources\]'"):
        Sources([], ["gs://bucket"]).fetch("gs://bucket/wilde", tmp_path / "into")


class Hub:
    """Stands in for the hub's client: one model of two revisions."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.wrong_hash = folder, False
        self.opened: list[str] = []

    def model_info(self, repository: str, revision: str | None, files_metadata: bool, timeout: float) -> object:
        assert files_metadata
        assert timeout > 0
        if repository != "org/wilde":
            raise huggingface_hub.errors.HFValidationError("no such model")
        siblings = []
        for file in self.folder.iterdir():
            sha256 = "0" * 64 if self.wrong_hash else hashlib.sha256(file.read_bytes()).hexdigest()
            lfs = SimpleNamespace(sha256=sha256) if file.name == WEIGHTS else None
            siblings.append(SimpleNamespace(rfilename=file.name, size=file.stat().st_size, blob_id="b", lfs=lfs))
        return SimpleNamespace(sha=f"commit-of-{revision}", siblings=siblings)

    def open(self, path: str, mode: str):
        self.opened.append(path)
        return (self.folder / path.rsplit("/", 1)[1]).open(mode)


def test_a_hub_id_is_fetched_at_one_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(write_adapter(tmp_path / "wilde"))
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    monkeypatch.setattr(huggingface_hub, "HfFileSystem", lambda: hub)
    sources = Sources([], ["hf://org"])
    fetched = sources.fetch("hf://org/wilde@v2", tmp_path / "into")
    assert fetched.origin == "hf://org/wilde@commit-of-v2"
    assert all(path.startswith("org/wilde@commit-of-v2/") for path in hub.opened)
    assert ref_of(fetched.folder).digest == ref_of(hub.folder).digest
    with pytest.raises(AdapterNotFound, match="the hub knows no model 'org/poe' at 'main'"):
        sources.fetch("hf://org/poe", tmp_path / "into2")
    hub.wrong_hash = True
    with pytest.raises(AdapterUnavailable, match=f"{WEIGHTS} has sha256 .*, not 0000"):
        sources.fetch("hf://org/wilde@v2", tmp_path / "into3")
    assert not list((tmp_path / "into3").glob("*.partial")), "nothing wrong is gone on with"


def test_a_file_that_changes_between_two_tries_is_fetched_anew(web: Web, tmp_path: Path) -> None:
    folder, sources = web.root / "wilde", Sources([], [web.url])
    (folder / "report.json").write_text("{}")
    whole = (folder / WEIGHTS).read_bytes()
    sources.fetch(f"{web.url}/wilde", tmp_path / "into")
    web.etag, web.break_after = "v2", len(whole) // 2
    (folder / WEIGHTS).write_bytes(new := bytes(reversed(whole)))
    with pytest.raises(AdapterUnavailable):
        sources.fetch(f"{web.url}/wilde", tmp_path / "into")
    fetched = sources.fetch(f"{web.url}/wilde", tmp_path / "into")
    assert (fetched.folder / WEIGHTS).read_bytes() == new


def test_what_changes_while_it_is_fetched_is_not_taken(web: Web, tmp_path: Path) -> None:
    web.changes_to = "v2"
    with pytest.raises(AdapterUnavailable, match="changed while it was fetched: try again"):
        Sources([], [web.url]).fetch(f"{web.url}/wilde", tmp_path / "into")


def test_a_place_without_an_adapter_is_told_by_its_address(web: Web, tmp_path: Path) -> None:
    with pytest.raises(AdapterNotFound, match=rf"there is no adapter_\w+\.\w+ at {web.url}/nobody"):
        Sources([], [web.url]).fetch(f"{web.url}/nobody", tmp_path / "into")
