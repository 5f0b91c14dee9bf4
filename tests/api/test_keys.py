"""Keys of two kinds from flags and files, and web pages of other origins."""

import logging
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from server import __main__ as cli
from server.api import keys as keys_module
from server.api.keys import Keys
from server.settings import SettingsError, read_settings
from tests.api.gated import Gated


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("CHORUS_API_KEY", "CHORUS_ADMIN_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(keys_module, "REREAD_SECONDS", 0.0)


def keys(*flags: str) -> Keys:
    return Keys(read_settings(list(flags)))


def labels(known: Keys, *texts: str) -> list[str | None]:
    return [key and key.label for key in map(known.find, texts)]


def post(client: TestClient, path: str = "/generate", **headers: str) -> int:
    return client.post(path, headers={name.replace("_", "-"): value for name, value in headers.items()}).status_code


def test_several_keys_from_flags_the_environment_and_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "keys"
    file.write_text("# ours\n\nweb aaaa\n  batch.1   b#b:b,b\ncccc\n", "utf-8")
    known = keys("--api-key", "one,two", "--api-key", "three", "--api-key-file", str(file), "--admin-key", "root")
    assert labels(known, "one", "two", "three", "aaaa", "b#b:b,b", "cccc", "root") == [
        "api-1", "api-2", "api-3", "web", "batch.1", "api-6", "admin-1",
    ]  # fmt: skip
    assert labels(known, "", "on", "onee", "one,two", "web", "web aaaa", "# ours", "é") == [None] * 8
    monkeypatch.setenv("CHORUS_API_KEY", "four, five")
    assert labels(keys(), "four", "five", "four, five") == ["api-1", "api-2", None]


@pytest.mark.parametrize("flag", ["--api-key", "--admin-key"])
@pytest.mark.parametrize("value", ["", " ", "good1,,good2", "two words", "schlüssel"])
def test_a_key_that_is_blank_or_cannot_be_sent_ends_the_start_and_is_not_shown(flag: str, value: str) -> None:
    with pytest.raises(SettingsError, match=f"^{flag}: .*") as refused:
        keys(flag, value)
    assert not any(word in str(refused.value) for word in ("good", "words", "schlüssel"))


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("", "holds no key"),
        ("# nothing\n\n", "holds no key"),
        ("good\nweb secret more\n", "line 2"),
        ("w/eb secret\n", "line 1: a label"),
        ("geheimnüs\n", "line 1"),
        ("secret\nsecret\n", "api-1 and api-2 are the same key"),
        ("web secret\nweb other\n", "web and web are two keys of one label"),
        ("rootkey\n", "is the inference key api-1 too"),
    ],
)
def test_a_file_that_is_wrong_ends_the_start_and_names_the_line(tmp_path: Path, content: str, told: str) -> None:
    file = tmp_path / "keys"
    file.write_text(content, "utf-8")
    with pytest.raises(SettingsError, match=told) as refused:
        keys("--api-key-file", str(file), "--admin-key", "rootkey")
    assert not any(word in str(refused.value) for word in ("secret", "rootkey", "geheim"))


def test_a_file_that_is_not_there_ends_the_start(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"--admin-key-file .*nowhere can't be read"):
        keys("--admin-key-file", str(tmp_path / "nowhere"))


def test_an_empty_flag_exits_2_and_no_message_shows_a_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--admin-key", ""]) == 2
    assert capsys.readouterr().err == "--admin-key: is blank; leave it out to have no key\n"


def test_a_file_that_changes_is_read_anew_and_a_wrong_one_changes_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "keys"
    file.write_text("web old\n")
    caplog.set_level(logging.INFO)
    known = keys("--api-key-file", str(file), "--admin-key", "root")
    fresh = tmp_path / "fresh"
    fresh.write_text("web new\n")
    fresh.rename(file)
    assert labels(known, "old", "new", "root") == [None, "web", "admin-1"]
    assert "keys read anew: 1 for inference, 1 for admins" in caplog.text
    for wrong in ("a b c\n", "web root\n", ""):
        caplog.clear()
        file.write_text(wrong)
        assert labels(known, "new", "root", "a") == ["web", "admin-1", None]
        assert caplog.text.count("the keys read before stay in force") == 1
    file.unlink()
    assert labels(known, "new", "root") == ["web", "admin-1"]
    assert not known.inference_open, "a file that is gone does not open the server"
    file.write_text("newest\n")
    assert labels(known, "new", "newest") == [None, "api-1"]


def test_every_key_is_compared_by_its_digest_whatever_was_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    known, lengths = keys("--api-key", "a,bb,ccc", "--admin-key", "dddd"), list[tuple[int, int]]()
    real = keys_module.hmac.compare_digest

    def counted(a: bytes, b: bytes) -> bool:
        lengths.append((len(a), len(b)))
        return real(a, b)

    monkeypatch.setattr(keys_module.hmac, "compare_digest", counted)
    for sent in ("a", "dddd", "x" * 99):
        lengths.clear()
        known.find(sent)
        assert lengths == [(32, 32)] * 4


def test_a_key_may_come_in_either_header() -> None:
    client = Gated("--api-key", "one,two", "--admin-key", "root").client
    assert post(client) == post(client, authorization="Bearer no") == post(client, x_api_key="no") == 401
    assert post(client, authorization="Bearer two") == post(client, authorization="bearer  one") == 200
    assert post(client, x_api_key="two") == post(client, authorization="Basic eDp5", x_api_key="one") == 200
    assert post(client, authorization="Bearer", x_api_key="one") == 200, "no bearer in it"
    assert post(client, authorization="Bearer no", x_api_key="one") == 401, "the bearer is what was meant"
    assert post(client, authorization="Bearer root") == 200, "an admin key opens the rest too"
    assert client.get("/health").status_code == 200
    assert client.get("/docs").status_code == client.get("/nowhere").status_code == 401


def test_only_an_admin_key_changes_adapters() -> None:
    client = Gated("--api-key", "one", "--admin-key", "root,second").client

    def put(client: TestClient, **headers: str) -> int:
        return client.put("/v1/adapters/x", headers=headers).status_code

    assert put(client) == put(client, authorization="Bearer one") == 401
    assert put(client, authorization="Bearer root") == put(client, authorization="Bearer second") == 200
    closed = Gated("--api-key", "one").client
    assert put(closed, authorization="Bearer one") == 403
    only_admin = Gated("--admin-key", "root").client
    assert post(only_admin) == post(only_admin, authorization="Bearer stray") == 200, "inference is open"
    assert put(only_admin, authorization="Bearer stray") == 401


def test_cors_is_off_unless_origins_are_set() -> None:
    asked = {"origin": "https://app.example.org", "access-control-request-method": "POST"}
    answer = Gated().client.options("/v1/completions", headers=asked)
    assert answer.status_code == 405
    answer = Gated().client.post("/generate", headers={"origin": "https://app.example.org"})
    assert not [name for name in answer.headers if name.startswith("access-control")]


def test_cors_answers_a_preflight_before_the_key_is_asked_for_and_shows_our_headers() -> None:
    client = Gated("--api-key", "one", "--cors-origins", "https://app.example.org,http://localhost:3000").client
    asked = {
        "origin": "https://app.example.org",
        "access-control-request-method": "PUT",
        "access-control-request-headers": "authorization,content-type,x-request-id,traceparent",
    }
    answer = client.options("/v1/completions", headers=asked)
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == "https://app.example.org"
    assert "PUT" in answer.headers["access-control-allow-methods"]
    for name in asked["access-control-request-headers"].split(","):
        assert name in answer.headers["access-control-allow-headers"]
    assert "access-control-allow-credentials" not in answer.headers
    assert client.options("/v1/completions", headers=asked | {"origin": "https://evil.example"}).status_code == 400
    for path, status in (("/generate", 401), ("/broken", 401), ("/nowhere", 401)):
        answer = client.post(path, headers={"origin": "http://localhost:3000"})
        assert answer.status_code == status
        assert answer.headers["access-control-allow-origin"] == "http://localhost:3000", "a page may read the error"
        shown = answer.headers["access-control-expose-headers"]
        assert all(name in shown for name in ("x-request-id", "x-adapter-digest", "x-total-time", "retry-after"))
    keyed = {"origin": "http://localhost:3000", "authorization": "Bearer one"}
    for path, status in (("/generate", 200), ("/broken", 500), ("/nowhere", 404)):
        answer = client.post(path, headers=keyed)
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (status, "http://localhost:3000")
    assert (
        "access-control-allow-origin"
        not in client.post("/generate", headers={"origin": "https://evil.example"}).headers
    )


def test_any_origin(capsys: pytest.CaptureFixture[str]) -> None:
    answer = Gated("--cors-origins", "*").client.post("/generate", headers={"origin": "https://a.example"})
    assert answer.headers["access-control-allow-origin"] == "*"
    for wrong in ("https://a.example/", "a.example", "https://user@a.example", "https://a.example,ftp://b"):
        assert cli.main(["--cors-origins", wrong]) == 2
        assert capsys.readouterr().err.startswith("--cors-origins: ")
