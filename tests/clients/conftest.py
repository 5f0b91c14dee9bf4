"""The server that clients are pointed at: the demo base, the bundled adapters, keys, an alias."""

from collections.abc import Iterator

import httpx
import pytest

from tests.api.conftest import ServerProcess

KEY, ADMIN_KEY, ALIAS = "inference-key", "admin-key", "poet"


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """One server for all clients."""
    log = tmp_path_factory.mktemp("clients") / "log"
    keys = {"CHORUS_API_KEY": KEY, "CHORUS_ADMIN_KEY": ADMIN_KEY}
    process = ServerProcess(log, env=keys).wait_ready()
    targets = {"targets": [{"ref": "wilde", "weight": 1}]}
    answer = httpx.put(f"{process.url}/v1/aliases/{ALIAS}", json=targets, headers={"x-api-key": ADMIN_KEY}, timeout=60)
    assert answer.status_code == 200, answer.text
    yield process
    assert process.stop() == 0, process.text()
