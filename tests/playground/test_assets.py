"""The page's files over HTTP: types, caching, policy, and that no key is needed for them."""

import re

import httpx
import pytest

from server.api import playground
from tests.api.conftest import ROOT, ServerProcess

TYPES = {"index.html": "text/html", "style.css": "text/css", "main.js": "text/javascript", "icon.svg": "image/svg+xml"}


@pytest.mark.parametrize("name", sorted(path.name for path in playground.FOLDER.iterdir()))
def test_every_file_is_small_and_names_no_other_host(name: str) -> None:
    text = (playground.FOLDER / name).read_text()
    assert len(text.splitlines()) <= 300
    assert set(re.findall(r"(?:https?:)?//[\w.-]+\.[a-z]+", text)) <= {"http://www.w3.org"}
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|\bstyle=", text)


def test_it_is_served_with_types_and_a_policy(server: ServerProcess) -> None:
    with httpx.Client(base_url=server.url) as client:
        assert client.get("/playground").content == (playground.FOLDER / "index.html").read_bytes()
        for name, media_type in TYPES.items():
            answer = client.get(f"/playground/{name}")
            assert answer.status_code == 200
            assert answer.headers["content-type"].partition(";")[0] == media_type
            assert answer.headers["x-content-type-options"] == "nosniff"
            assert answer.headers["cache-control"] == "no-cache"
            policy = answer.headers["content-security-policy"]
            assert "default-src 'none'" in policy
            assert "unsafe" not in policy
            again = client.get(f"/playground/{name}", headers={"If-None-Match": answer.headers["etag"]})
            assert (again.status_code, again.content) == (304, b"")
        moved = client.get("/playground/")
        assert (moved.status_code, moved.headers["location"]) == (307, "../playground"), "a proxy's prefix stays"
        for path in ("/playground/nothing.js", "/playground/..%2F..%2Fsettings.py", "/playground/%2e%2e/app.py"):
            assert client.get(path).status_code == 404
        assert not [path for path in client.get("/openapi.json").json()["paths"] if "playground" in path]


def test_no_key_is_needed_for_the_page_alone(locked: ServerProcess) -> None:
    for path in playground.PATHS:
        assert httpx.get(locked.url + path).status_code in (200, 307)
    for path in ("/playground/nothing.js", "/v1/adapters", "/info"):
        assert httpx.get(locked.url + path).status_code == 401


def test_it_is_part_of_the_package() -> None:
    assert 'server = ["playground/*"]' in (ROOT / "pyproject.toml").read_text()
