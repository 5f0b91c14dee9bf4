"""guidellm benchmarks a voice: every request ends, with the numbers of tokens that were asked for."""

import json
import subprocess
from pathlib import Path

import pytest

from server.model.source import DEMO_MODEL
from tests.api.conftest import ServerProcess
from tests.clients.conftest import KEY
from tests.clients.environments import python_of

REQUESTS = 6


@pytest.mark.slow
def test_a_short_benchmark(served: ServerProcess, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    backend = f"kind=openai_http,target={served.url},model=wilde,request_format=/v1/completions,api_key={KEY}"
    subprocess.run(
        [
            str(python_of("guidellm")), "-m", "guidellm", "run", "--backend", backend,
            "--profile", "kind=concurrent,streams=2", "--constraint", f"kind=max_requests,count={REQUESTS}",
            "--data", "kind=synthetic_text,prompt_tokens=24,output_tokens=16",
            "--tokenizer", f"kind=huggingface_auto,model={DEMO_MODEL}",
            "--output", f"kind=json,path={report}", "--disable-console",
        ],
        check=True, timeout=300, cwd=tmp_path, env={"HF_HUB_OFFLINE": "1", "HOME": str(tmp_path)},
    )  # fmt: skip
    (benchmark,) = json.loads(report.read_text())["benchmarks"]
    requests = benchmark["requests"]
    assert (len(requests["successful"]), len(requests["errored"])) == (REQUESTS, 0)
    assert {each["prompt_tokens"] for each in requests["successful"]} == {24}
    assert {each["output_tokens"] for each in requests["successful"]} == {16}, "ignore_eos goes on to the end"
