"""Facts of the Kubernetes Job that break quietly: no cluster is needed to check them."""

import re
from pathlib import Path
from typing import Any

import yaml

from tests.deploy.test_container import compose, values, variables
from training.cli import parse_args

FILE = Path(__file__).resolve().parents[2] / "deploy" / "kubernetes" / "training-job.yaml"
JOB: dict[str, Any] = yaml.safe_load(FILE.read_text())
POD: dict[str, Any] = JOB["spec"]["template"]["spec"]
(CONTAINER,) = POD["containers"]


def test_its_flags_are_ours_and_may_be_given_again() -> None:
    launcher, _, flags = "\n".join(CONTAINER["args"]).partition("--module\ntraining\n")
    config = parse_args(flags.splitlines())
    assert config.ensure, "a restarted pod goes on"
    assert config.authors == ("Oscar Wilde",)
    assert config.output == variables()["CHORUS_ADAPTERS_DIR"], "where the server looks"
    assert "--standalone" in launcher
    assert (JOB["apiVersion"], JOB["kind"]) == ("batch/v1", "Job")
    assert POD["restartPolicy"] == "Never"
    assert JOB["spec"]["backoffLimit"] >= 1


def test_a_process_for_each_gpu() -> None:
    (processes,) = re.findall(r"--nproc-per-node=(\d+)", " ".join(CONTAINER["args"]))
    resources = CONTAINER["resources"]
    assert resources["requests"]["nvidia.com/gpu"] == resources["limits"]["nvidia.com/gpu"] == int(processes)
    assert resources["requests"]["memory"] == resources["limits"]["memory"]


def test_it_runs_the_image_as_its_user_and_can_write_where_it_must() -> None:
    assert CONTAINER["image"] == compose()["services"]["server"]["image"]
    user, group = map(int, values("USER")[0].split(":"))
    context = POD["securityContext"]
    assert (context["runAsUser"], context["runAsGroup"], context["fsGroup"]) == (user, group, group)
    assert CONTAINER["securityContext"]["readOnlyRootFilesystem"] is True
    mounts = {mount["mountPath"]: mount for mount in CONTAINER["volumeMounts"]}
    assert {"/adapters", "/cache", "/tmp", "/dev/shm"} <= {p for p, mount in mounts.items() if "readOnly" not in mount}
    assert [mount["name"] for mount in mounts.values()] == [volume["name"] for volume in POD["volumes"]]
    assert CONTAINER["command"][:2] == ["tini", "--"], "signals reach the launcher"
