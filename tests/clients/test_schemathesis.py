"""The OpenAPI document is true: no answer that it doesn't know, whatever is sent."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.api.conftest import ServerProcess
from tests.clients.conftest import ADMIN_KEY
from tests.clients.environments import python_of

CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
EXAMPLES = "25"


@pytest.mark.slow
def test_no_answer_is_undocumented(served: ServerProcess, tmp_path: Path) -> None:
    command = [
        str(python_of("schemathesis").with_name("schemathesis")), "run", f"{served.url}/openapi.json",
        "--checks", CHECKS, "--phases", "examples,coverage,fuzzing", "--max-examples", EXAMPLES, "--seed", "1",
        "--generation-deterministic", "--header", f"Authorization: Bearer {ADMIN_KEY}", "--request-timeout", "120",
        "--no-color",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=1500, cwd=tmp_path, env=os.environ)
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-8000:]
    assert "Operations:" in done.stdout
