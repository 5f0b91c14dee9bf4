"""Adapters changed over HTTP while a real server runs."""

import io
import json
import shutil
import tarfile
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from server.model.source import DEMO_MODEL
from tests.api.conftest import ServerProcess
from tests.oracle import make_adapter

ADMIN = {"Authorization": "Bearer admin"}
PROMPT = "Quote by Oscar Wilde:"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """one, two, three: versions of an adapter; zero has no effect, misfit is for another base."""
    root = tmp_path_factory.mktemp("versions")
    for seed, name in enumerate(["one", "two", "three"], 1):
        make_adapter(DEMO_MODEL, root / name, seed, ["c_attn"], rank=4, size=0.2)
    make_adapter(DEMO_MODEL, root / "zero", 1, ["c_attn"], rank=4, size=0.0)
    return root


@pytest.fixture(scope="module")
def lifecycle(adapters_dir: Path, folders: Path, tmp_path_factory: pytest.TempPathFactory):
    log = tmp_path_factory.mktemp("lifecycle") / "log"
    process = ServerProcess(
        log, "--adapters-dir", str(adapters_dir), "--admin-key", "admin", "--adapter-roots", str(folders)
    ).wait_ready()
    yield process
    assert process.stop() == 0, process.text()


def archive(folder: Path, kind: str = "tar") -> bytes:
    out = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(out, "w") as packed:
            for file in folder.iterdir():
                packed.write(file, f"{folder.name}/{file.name}")
    else:
        with tarfile.open(fileobj=out, mode=f"w:{'gz' if kind == 'tar.gz' else ''}") as packed:
            packed.add(folder, folder.name)
    return out.getvalue()


def put(server: ServerProcess, name: str, body: bytes, **headers: str) -> httpx.Response:
    return httpx.put(f"{server.url}/v1/adapters/{name}", content=body, headers=ADMIN | headers, timeout=60)


def post(server: ServerProcess, route: str, /, **body: object) -> httpx.Response:
    return httpx.post(f"{server.url}{route}", json=body, headers=ADMIN, timeout=60)


def delete(server: ServerProcess, path: str, **query: object) -> httpx.Response:
    return httpx.delete(f"{server.url}{path}", params=query, headers=ADMIN, timeout=60)


def generate(server: ServerProcess, adapter: object, tokens: int = 8, **more: str) -> httpx.Response:
    parameters = {"adapter_id": adapter, "max_new_tokens": tokens, "ignore_eos_token": True}
    return httpx.post(
        f"{server.url}/generate", json={"inputs": PROMPT, "parameters": parameters}, headers=more, timeout=60
    )


def show(server: ServerProcess, name: str) -> dict:
    answer = httpx.get(f"{server.url}/v1/adapters/{name}")
    assert answer.status_code == 200, answer.text
    return answer.json()


@pytest.mark.parametrize("kind", ["tar", "tar.gz", "zip"])
def test_an_uploaded_version_is_served_at_once(lifecycle: ServerProcess, folders: Path, kind: str) -> None:
    name = f"up-{kind.replace('.', '-')}"
    answer = put(lifecycle, name, archive(folders / "one", kind))
    assert answer.status_code == 200, answer.text
    record = answer.json()
    assert (record["name"], record["rank"], record["targets"]) == (name, 4, ["attn.c_attn"])
    assert (record["state"], record["in_flight"], record["ignored"]) == ("ready", 0, [])
    said = generate(lifecycle, name)
    assert said.headers["x-adapter-digest"] == record["digest"]
    assert said.json() != generate(lifecycle, None).json()
    assert name in [card["id"] for card in httpx.get(f"{lifecycle.url}/v1/models").json()["data"]]


def test_a_new_version_takes_over_and_a_rollback_brings_the_old_one_back(
    lifecycle: ServerProcess, folders: Path
) -> None:
    texts, digests = [], []
    for version in ("one", "two"):
        digests.append(put(lifecycle, "poe", archive(folders / version)).json()["digest"])
        texts.append(generate(lifecycle, "poe").json()["generated_text"])
    assert texts[0] != texts[1]
    assert generate(lifecycle, f"poe@{digests[0][:8]}").json()["generated_text"] == texts[0]
    back = post(lifecycle, "/v1/adapters/poe/rollback")
    assert back.status_code == 200, back.text
    assert (back.json()["digest"], back.json()["versions"]) == (digests[0], digests[:1])
    assert generate(lifecycle, "poe").json()["generated_text"] == texts[0]
    again = post(lifecycle, "/v1/adapters/poe/rollback")
    assert again.status_code == 409
    assert again.json()["error"]["message"] == "'poe' has no earlier value to roll back to"
    actions = [event["action"] for event in show(lifecycle, "poe")["history"]]
    assert actions == ["rollback", "publish", "publish"]


def test_what_is_refused_changes_nothing(lifecycle: ServerProcess, folders: Path, tmp_path: Path) -> None:
    good = put(lifecycle, "steady", archive(folders / "one")).json()["digest"]
    broken = tmp_path / "broken"
    make_adapter(DEMO_MODEL, broken, 5, ["c_attn"], rank=4, size=0.2)
    config = json.loads((broken / "adapter_config.json").read_text())
    (broken / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    for body, status, message in [
        (b"nothing of the kind", 422, "archive"),
        (archive(folders / "zero"), 422, "has no effect"),
        (archive(broken), 422, "use_dora is true"),
    ]:
        answer = put(lifecycle, "steady", body)
        assert answer.status_code == status, answer.text
        assert message in answer.json()["error"]["message"]
        assert answer.json()["error"]["type"] == "adapter_refused"
    assert show(lifecycle, "steady")["digest"] == good
    assert generate(lifecycle, "steady").headers["x-adapter-digest"] == good


@pytest.mark.parametrize(("name", "told"), [("demo", "reserved"), ("a b", "'a b' is no"), ("p\u043ee", "is no")])
def test_a_name_that_nothing_may_have(lifecycle: ServerProcess, folders: Path, name: str, told: str) -> None:
    aliases, to = f"{lifecycle.url}/v1/aliases", {"json": {"targets": [{"ref": "one"}]}, "headers": ADMIN}
    for answer, field in (
        (put(lifecycle, name, archive(folders / "one")), "name"),
        (post(lifecycle, "/v1/load_lora_adapter", lora_name=name, lora_path="one"), "lora_name"),
        (httpx.put(f"{aliases}/{name}", **to), "name"),
        (httpx.put(f"{aliases}/{name}@stable", **to), "name"),
    ):
        error = answer.json()["error"]
        assert (answer.status_code, error["type"], error["param"]) == (422, "validation", field)
        assert told in error["message"]


def test_validating_publishes_nothing(lifecycle: ServerProcess, folders: Path) -> None:
    url, names = f"{lifecycle.url}/v1/adapters:validate", httpx.get(f"{lifecycle.url}/v1/models").json()
    answer = httpx.post(url, content=archive(folders / "three"), headers=ADMIN)
    assert answer.status_code == 200, answer.text
    by_path = post(lifecycle, "/v1/adapters:validate", path="three")
    assert by_path.json() == answer.json()
    assert (answer.json()["valid"], answer.json()["rank"]) == (True, 4)
    refused = post(lifecycle, "/v1/adapters:validate", path="zero")
    assert refused.status_code == 422
    assert "has no effect" in refused.json()["error"]["message"]
    missing = post(lifecycle, "/v1/adapters:validate", pathh="three")
    assert missing.status_code == 422
    assert httpx.get(f"{lifecycle.url}/v1/models").json() == names


def test_vllms_routes(lifecycle: ServerProcess, folders: Path) -> None:
    answer = post(lifecycle, "/v1/load_lora_adapter", lora_name="vl", lora_path="one")
    assert (answer.status_code, answer.text) == (200, "Success: LoRA adapter 'vl' added successfully.")
    first = generate(lifecycle, "vl").headers["x-adapter-digest"]
    again = post(lifecycle, "/v1/load_lora_adapter", lora_name="vl", lora_path=str(folders / "two"))
    assert again.status_code == 400
    assert "is loaded already; set `load_inplace` true" in again.json()["error"]["message"]
    in_place = post(lifecycle, "/v1/load_lora_adapter", lora_name="vl", lora_path="two", load_inplace=True)
    assert in_place.status_code == 200
    assert generate(lifecycle, "vl").headers["x-adapter-digest"] != first
    assert post(lifecycle, "/v1/load_lora_adapter", lora_path="two").status_code == 400
    assert post(lifecycle, "/v1/load_lora_adapter", lora_name="x", lora_path="/etc").status_code == 404
    assert post(lifecycle, "/v1/load_lora_adapter", lora_name="x", lora_path="hf://a/b").status_code == 422
    gone = post(lifecycle, "/v1/unload_lora_adapter", lora_name="vl")
    assert (gone.status_code, gone.text) == (200, "Success: LoRA adapter 'vl' removed successfully.")
    assert generate(lifecycle, "vl").status_code == 404
    assert post(lifecycle, "/v1/unload_lora_adapter", lora_name="vl").status_code == 404


def test_an_alias_sends_requests_by_weight_and_keys_stay(lifecycle: ServerProcess, folders: Path) -> None:
    one, two = (put(lifecycle, "canary-voice", archive(folders / v)).json()["digest"] for v in ("one", "two"))
    body = {"targets": [{"ref": "canary-voice", "weight": 50}, {"ref": f"canary-voice@{one[:10]}", "weight": 50}]}
    answer = httpx.put(f"{lifecycle.url}/v1/aliases/canary", json=body, headers=ADMIN)
    assert answer.status_code == 200, answer.text
    assert [t["ref"] for t in answer.json()["targets"]] == ["canary-voice", f"canary-voice@{one}"]
    seen = {}
    for i in range(24):
        key = {"x-adapter-key": f"user-{i % 12}"}
        digest = generate(lifecycle, "canary", tokens=1, **key).headers["x-adapter-digest"]
        assert seen.setdefault(i % 12, digest) == digest
    assert set(seen.values()) == {one, two}
    tag = {"targets": [{"ref": f"canary-voice@{one}"}]}
    assert httpx.put(f"{lifecycle.url}/v1/aliases/canary-voice@stable", json=tag, headers=ADMIN).status_code == 200
    assert generate(lifecycle, "canary-voice@stable").headers["x-adapter-digest"] == one
    blocked = delete(lifecycle, "/v1/adapters/canary-voice")
    assert blocked.status_code == 409
    assert "is a target of canary, canary-voice@stable" in blocked.json()["error"]["message"]
    wrong = httpx.put(f"{lifecycle.url}/v1/aliases/poet", json={"targets": [{"ref": "nobody"}]}, headers=ADMIN)
    assert wrong.status_code == 404
    for name in ("canary", "canary-voice@stable"):
        assert delete(lifecycle, f"/v1/aliases/{name}").status_code == 200
    assert delete(lifecycle, "/v1/adapters/canary-voice").status_code == 200


def test_a_removal_waits_for_what_runs_or_refuses(lifecycle: ServerProcess, folders: Path) -> None:
    put(lifecycle, "busy", archive(folders / "one"))
    answers: list[httpx.Response] = []
    running = threading.Thread(target=lambda: answers.append(generate(lifecycle, "busy", tokens=200)))
    running.start()
    lifecycle.wait_until(lambda: show(lifecycle, "busy")["in_flight"] == 1)
    refused = delete(lifecycle, "/v1/adapters/busy", when_busy="refuse")
    assert refused.status_code == 409
    assert refused.headers["x-should-retry"] == "false"
    assert "1 requests in flight use 'busy'" in refused.json()["error"]["message"]
    waited = delete(lifecycle, "/v1/adapters/busy")
    assert waited.json() == {"name": "busy", "removed": True, "in_flight": 0}
    running.join()
    assert answers[0].status_code == 200, "it finished on the version it began with"
    assert generate(lifecycle, "busy").status_code == 404


def test_a_composition_is_named_in_a_request(lifecycle: ServerProcess) -> None:
    mixed = generate(lifecycle, "alpha:0.7,beta:0.3")
    assert mixed.status_code == 200, mixed.text
    assert mixed.headers["x-adapter-id"] == "alpha,beta"
    listed = generate(lifecycle, [{"ref": "alpha", "weight": 0.7}, {"ref": "beta", "weight": 0.3}])
    assert listed.json() == mixed.json()
    for wrong, status, message in [
        ("alpha:0.7,nobody:0.3", 404, "'nobody' does not exist"),
        ("alpha:x", 422, "the weight is 'x'"),
        ("alpha,alpha", 422, "are the same adapter"),
        ([{"ref": "alpha", "wait": 1}], 422, "wait"),
    ]:
        answer = generate(lifecycle, wrong)
        assert answer.status_code == status, answer.text
        assert message in answer.json()["error"]


def test_the_listing_is_paged_and_tells_what_was_refused(lifecycle: ServerProcess) -> None:
    first = httpx.get(f"{lifecycle.url}/v1/adapters", params={"limit": 1}).json()
    assert [record["name"] for record in first["data"]] == ["alpha"]
    assert (first["has_more"], first["next"]) == (True, "alpha")
    assert first["refused"][0]["name"] == "misfit"
    assert "peft_type is 'IA3'" in first["refused"][0]["reason"]
    second = httpx.get(f"{lifecycle.url}/v1/adapters", params={"limit": 1000, "after": "alpha"}).json()
    assert second["data"][0]["name"] == "beta"
    assert (second["has_more"], second["next"], second["refused"]) == (False, None, [])
    assert httpx.get(f"{lifecycle.url}/v1/adapters", params={"limit": 0}).status_code == 422
    assert httpx.get(f"{lifecycle.url}/v1/adapters/nobody").status_code == 404


def test_changing_needs_the_admin_key_and_reading_does_not(
    lifecycle: ServerProcess, server: ServerProcess, folders: Path
) -> None:
    body = archive(folders / "one")
    for url, status in ((lifecycle.url, 401), (server.url, 403)):
        for method, path in [
            ("PUT", "/v1/adapters/x"), ("DELETE", "/v1/adapters/alpha"), ("POST", "/v1/adapters/alpha/rollback"),
            ("PUT", "/v1/aliases/x"), ("DELETE", "/v1/aliases/x"), ("POST", "/v1/aliases/x/rollback"),
            ("POST", "/v1/adapters:validate"), ("POST", "/v1/load_lora_adapter"), ("POST", "/v1/unload_lora_adapter"),
        ]:  # fmt: skip
            answer = httpx.request(method, f"{url}{path}", content=body)
            assert answer.status_code == status, (method, path, answer.text)
        assert httpx.get(f"{url}/v1/adapters").status_code == 200
    assert "--admin-key" in httpx.put(f"{server.url}/v1/adapters/x", content=body).json()["error"]["message"]


def test_names_outlive_a_restart_and_changed_folders_are_told(start, folders: Path, tmp_path: Path) -> None:
    dropped = tmp_path / "dropped"
    make_adapter(DEMO_MODEL, dropped / "voice", 1, ["c_attn"], rank=4, size=0.2)
    flags = ("--adapters-dir", str(dropped), "--store-dir", str(tmp_path / "store"), "--admin-key", "admin")
    first = start(*flags).wait_ready()
    put(first, "sent", archive(folders / "two"))
    digests = {name: show(first, name)["digest"] for name in ("sent", "voice")}
    make_adapter(DEMO_MODEL, dropped / "voice", 9, ["c_attn"], rank=4, size=0.2)
    make_adapter(DEMO_MODEL, dropped / "late", 10, ["c_attn"], rank=4, size=0.2)
    assert generate(first, "late").status_code == 200, "picked up by its name"
    assert first.stop() == 0
    second = start(*flags).wait_ready()
    for name, digest in digests.items():
        assert generate(second, name).headers["x-adapter-digest"] == digest
    assert show(second, "sent")["folder_changed"] is None
    changed = show(second, "voice")["folder_changed"]
    assert changed not in (None, digests["voice"])
    assert post(second, "/v1/load_lora_adapter", lora_name="voice", lora_path="voice", load_inplace=True).is_success
    assert generate(second, "voice").headers["x-adapter-digest"] == changed
    assert show(second, "voice")["folder_changed"] is None


def test_an_upload_larger_than_allowed_is_413(start, adapters_dir: Path, folders: Path, tmp_path: Path) -> None:
    process = start(
        "--adapters-dir", str(adapters_dir), "--admin-key", "admin", "--max-adapter-bytes", "20000",
        "--store-dir", str(tmp_path / "store"),
    ).wait_ready()  # fmt: skip
    answer = put(process, "big", archive(folders / "one"))
    assert answer.status_code == 413, answer.text
    assert "--max-adapter-bytes" in answer.json()["error"]["message"]
    deadline = time.monotonic() + 10
    while list((tmp_path / "store" / "staging").iterdir()):
        assert time.monotonic() < deadline, "what was received is deleted"


@pytest.mark.parametrize("report", ['{"a": "\\ud800"}', "[" * 300 + "]" * 300, "{not json"])
def test_a_report_that_is_no_plain_json_is_left_out(
    report: str, lifecycle: ServerProcess, folders: Path, tmp_path: Path
) -> None:
    shutil.copytree(folders / "one", tmp_path / "one")
    (tmp_path / "one" / "report.json").write_text(report)
    assert put(lifecycle, "odd", archive(tmp_path / "one")).status_code == 200
    assert show(lifecycle, "odd")["report"] is None


def test_json_for_validation_is_as_small_as_any(lifecycle: ServerProcess) -> None:
    answer = post(lifecycle, "/v1/adapters:validate", path="x" * (2 << 20))
    assert answer.status_code == 413
    assert "the JSON body is larger than 1,048,576 bytes" in answer.json()["error"]["message"]


def test_one_of_several_loads_of_a_new_name_succeeds(lifecycle: ServerProcess) -> None:
    with ThreadPoolExecutor(3) as pool:
        load = {"lora_name": "raced", "is_3d_lora_weight": False}
        route, paths = "/v1/load_lora_adapter", ["one", "two", "three"]
        answers = list(pool.map(lambda path: post(lifecycle, route, lora_path=path, **load), paths))
    assert sorted(answer.status_code for answer in answers) == [200, 400, 400]
    assert all("load_inplace" in answer.text for answer in answers if answer.status_code == 400)
    assert len(show(lifecycle, "raced")["versions"]) == 1


def test_naming_no_adapter_is_not_the_base(lifecycle: ServerProcess) -> None:
    assert generate(lifecycle, "").status_code == 404
    answer = generate(lifecycle, [])
    told = "`adapter_id` is an empty list; name an adapter, or leave it out for the base"
    assert (answer.status_code, answer.json()["error"]) == (422, told)


def test_models_leave_out_what_the_engine_refused(lifecycle: ServerProcess, adapters_dir: Path, folders: Path) -> None:
    shutil.copytree(folders / "two", adapters_dir / "liar")
    wrong = {"prompt": "a", "prompt_token_ids": [64], "token_ids": [1], "logprobs": [-0.25]}
    golden = {"format_version": 1, "base_model": "demo", "dtype": "float32", "prompts": [wrong]}
    (adapters_dir / "liar" / "golden.json").write_text(json.dumps(golden))
    try:
        assert generate(lifecycle, "liar").status_code == 422
        models = httpx.get(f"{lifecycle.url}/v1/models", timeout=60).json()["data"]
        assert "liar" not in {model["id"] for model in models}
        assert show(lifecycle, "liar")["state"] == "refused"
        assert delete(lifecycle, "/v1/adapters/liar").status_code == 200
    finally:
        shutil.rmtree(adapters_dir / "liar")
