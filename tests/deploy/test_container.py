"""Facts of the Dockerfile and of deploy/ that break quietly: no container engine is needed to check them."""

import http.server
import json
import re
import shlex
import shutil
import subprocess
import sys
import threading
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from server.settings import PREFIX, Settings

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
HEALTHCHECK = ["python", "/app/deploy/healthcheck.py"]


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions with their arguments, continued lines joined."""
    text = "\n".join(line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.startswith("#"))
    lines = text.replace("\\\n", " ").splitlines()
    return [(name, rest.strip()) for name, _, rest in (line.partition(" ") for line in lines if line.strip())]


def values(name: str) -> list[str]:
    return [rest for instruction, rest in instructions() if instruction == name]


def variables() -> dict[str, str]:
    return dict(pair.split("=", 1) for rest in values("ENV") for pair in shlex.split(rest))


def compose() -> dict[str, Any]:
    return yaml.safe_load((DEPLOY / "compose.yaml").read_text())


def copied() -> list[str]:
    """What COPY takes from the repository, build arguments at their defaults."""
    defaults = dict(rest.split("=", 1) for rest in values("ARG"))
    sources: list[str] = []
    for rest in values("COPY"):
        *paths, _ = rest.split()
        sources += [re.sub(r"\$\{(\w+)\}", lambda match: defaults[match[1]], path) for path in paths]
    return sources


def test_the_container_serves_gpt2_medium_to_its_network() -> None:
    env = variables()
    assert env["CHORUS_MODEL"] == "openai-community/gpt2-medium"
    assert env["CHORUS_HOST"] == "0.0.0.0"
    assert env["CHORUS_ADAPTERS_DIR"] == "/adapters"
    assert env["HF_HOME"].startswith("/cache/")
    ours = {name for name in [*env, *compose()["services"]["server"]["environment"]] if name.startswith(PREFIX)}
    assert ours <= {PREFIX + field.upper() for field in Settings.model_fields}


def test_it_runs_as_a_user_and_signals_reach_the_server() -> None:
    (user,) = values("USER")
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user), "numeric, so that runAsNonRoot can be checked"
    assert json.loads(values("ENTRYPOINT")[0]) == ["tini", "--"]  # the exec form: no shell swallows SIGTERM
    assert json.loads(values("CMD")[0]) == ["python", "-m", "server"]
    assert values("STOPSIGNAL") == ["SIGTERM"]
    assert json.loads(values("VOLUME")[0]) == ["/adapters", "/cache", "/store"]


def test_every_copied_path_exists_and_is_in_the_build_context() -> None:
    kept = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    for path in copied():
        assert (ROOT / path).exists(), path
        assert any(Path(path).match(pattern) for pattern in kept), f"{path} is not in the build context"
    assert "requirements/gpu.lock" in copied()


def test_every_package_is_copied() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = {name.rstrip("*") for name in project["tool"]["setuptools"]["packages"]["find"]["include"]}
    assert packages | {"models"} <= set(copied())


def test_the_gpu_lock_pins_what_the_project_needs() -> None:
    def read(name: str) -> dict[str, str]:
        lines = (ROOT / "requirements" / name).read_text().splitlines()
        pinned = [line.split(";")[0].split("==") for line in lines if line and not line.startswith("#")]
        return {re.sub(r"[-_.]+", "-", package).lower(): version for package, version in pinned}

    gpu, cpu = read("gpu.lock"), read("cpu.lock")
    assert {"torch", "triton", "litserve", "transformers", "peft", "datasets", "accelerate"} <= set(gpu)
    assert {name: gpu[name] for name in gpu.keys() & cpu.keys()} == {
        name: cpu[name] for name in gpu.keys() & cpu.keys()
    }
    assert not {"pytest", "locust", "pyright"} & set(gpu)


def test_compose_confines_the_server_and_lets_it_write_where_it_must() -> None:
    server = compose()["services"]["server"]
    assert server["read_only"] is True
    assert server["cap_drop"] == ["ALL"]
    assert server["security_opt"] == ["no-new-privileges:true"]
    assert [mount.split(":")[0] for mount in server["tmpfs"]] == ["/tmp"]
    mounts = [re.sub(r"\$\{\w+:-(\w+)\}", r"\1", volume) for volume in server["volumes"]]
    assert mounts == ["adapters:/adapters", "store:/store", "cache:/cache"]  # not :ro, training writes adapters
    assert {"adapters", "cache"} <= set(compose()["volumes"])
    (device,) = server["deploy"]["resources"]["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"]
    assert all(port.startswith("127.0.0.1:") for service in compose()["services"].values() for port in service["ports"])


def test_compose_waits_longer_than_the_server_drains() -> None:
    server = compose()["services"]["server"]
    grace = int(server["stop_grace_period"].removesuffix("s"))
    assert grace > int(server["environment"]["CHORUS_DRAIN_SECONDS"]) + 10
    assert grace > Settings.model_fields["drain_seconds"].default + 10


def test_images_are_pinned_and_configuration_is_mounted() -> None:
    prometheus = compose()["services"]["prometheus"]
    assert re.fullmatch(r"prom/prometheus:v\d+\.\d+\.\d+", prometheus["image"])
    for volume in prometheus["volumes"]:
        source = volume.split(":")[0]
        assert source in compose()["volumes"] or (DEPLOY / source).is_file(), source
    config = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())
    assert all((DEPLOY / name).is_file() for name in config["rule_files"])
    (job,) = config["scrape_configs"]
    service, port = job["static_configs"][0]["targets"][0].split(":")
    assert service in compose()["services"]
    assert int(port) == Settings.model_fields["port"].default


def test_alerts_use_metrics_and_labels_that_exist() -> None:
    listed: dict[str, tuple[str, set[str]]] = {}
    for line in (ROOT / "docs" / "metrics.md").read_text().splitlines():
        if row := re.match(r"\| `(\S+)` \| (\w+) \| ([\w, ]+) \|", line):
            listed[row[1]] = (row[2], set(row[3].split(", ")))
    series = {"up": {"job"}}
    for name, (kind, labels) in listed.items():
        if kind == "histogram":
            series |= {f"{name}_bucket": labels | {"le"}, f"{name}_sum": labels, f"{name}_count": labels}
        else:
            series[name] = labels
    groups = yaml.safe_load((DEPLOY / "alerts.yml").read_text())["groups"]
    expressions = [rule["expr"] for group in groups for rule in group["rules"]]
    assert expressions
    for expression in expressions:
        used = re.findall(r"\b((?:vllm:|chorus_)\w+|up)(?:\{([^}]*)\})?", expression)
        assert used, expression
        for name, selectors in used:
            assert name in series, f"{name} is not in docs/metrics.md"
            assert set(re.findall(r"(\w+)=", selectors)) <= series[name], expression


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_promtool_accepts_the_configuration_and_the_alerts() -> None:
    subprocess.run(["promtool", "check", "config", str(DEPLOY / "prometheus.yml")], check=True)
    subprocess.run(["promtool", "check", "rules", str(DEPLOY / "alerts.yml")], check=True)


def test_the_health_check_tells_healthy_from_not(monkeypatch: pytest.MonkeyPatch) -> None:
    assert json.loads(values("HEALTHCHECK")[0].partition("CMD ")[2]) == HEALTHCHECK
    assert compose()["services"]["server"]["healthcheck"]["test"] == ["CMD", *HEALTHCHECK]
    statuses = [200, 503]

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(statuses.pop(0) if self.path == "/health" else 404)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            """Quiet."""

    def check() -> int:
        return subprocess.run([sys.executable, str(DEPLOY / "healthcheck.py")], capture_output=True).returncode

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        monkeypatch.setenv("CHORUS_PORT", str(server.server_address[1]))
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        codes = [check(), check()]
        server.shutdown()
        thread.join()
    assert codes == [0, 1]
    assert check() == 1  # nothing listens there any more
