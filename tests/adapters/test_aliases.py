"""References, aliases and rollbacks: which version a request gets."""

import json
from collections import Counter
from pathlib import Path

import pytest

from adapters.errors import AdapterConflict, AdapterNotFound, AdapterRefused
from adapters.references import parse_composition, parse_reference
from adapters.registry import Kind
from adapters.store import AdapterStore
from tests.adapters.support import SHAPE, tensors, write_adapter


@pytest.fixture
def store(tmp_path: Path) -> AdapterStore:
    """poe in three versions, twain in one."""
    made = AdapterStore(tmp_path / "store", SHAPE)
    for seed, name in enumerate(["poe", "poe", "poe", "twain"]):
        publish(made, name, seed, tmp_path)
    return made


def publish(store: AdapterStore, name: str, seed: int, tmp_path: Path) -> str:
    found = store.stage(name, write_adapter(tmp_path / f"{name}{seed}", tensors(seed=seed)))
    store.publish(found, "test")
    return found.ref.digest


def versions(store: AdapterStore, name: str) -> tuple[str, ...]:
    return store.registry.entries[name].stack


def test_a_reference_may_name_a_version_by_its_digests_beginning(store: AdapterStore) -> None:
    first, second, third = versions(store, "poe")
    assert store.get("poe").ref.digest == third
    assert store.get(f"poe@{first[:6]}").ref.digest == first
    assert store.get(f"poe@{second}").ref.digest == second
    for wrong in (f"poe@{first[:5]}", f"twain@{first[:8]}", "poe@000000", "poe@", "poe@a@b", f"nobody@{first}"):
        with pytest.raises(AdapterNotFound):
            store.get(wrong)


def test_a_rollback_goes_one_version_back_at_a_time(store: AdapterStore) -> None:
    first, second, third = versions(store, "poe")
    assert store.rollback("poe", "test").value == second
    assert store.get("poe").ref.digest == second
    assert store.rollback("poe", "test").value == first
    with pytest.raises(AdapterConflict, match="'poe' has no earlier value to roll back to"):
        store.rollback("poe", "test")
    with pytest.raises(AdapterNotFound):
        store.rollback("nobody", "test")
    actions = [(event.action, event.value) for event in store.registry.history("poe")]
    assert actions == [
        ("rollback", first), ("rollback", second), ("publish", third), ("publish", second), ("publish", first),
    ]  # fmt: skip


def test_publishing_what_is_there_already_changes_nothing(store: AdapterStore, tmp_path: Path) -> None:
    before = versions(store, "poe")
    publish(store, "poe", 2, tmp_path)
    assert versions(store, "poe") == before
    assert len(store.registry.history("poe")) == 3


def test_a_tag_stays_on_its_version(store: AdapterStore, tmp_path: Path) -> None:
    first = versions(store, "poe")[0]
    store.set_alias("poe@stable", [(f"poe@{first[:8]}", 1)], "test")
    publish(store, "poe", 7, tmp_path)
    assert store.get("poe@stable").ref == store.get(f"poe@{first}").ref
    assert store.get("poe@stable").ref.name == "poe"
    store.set_alias("poe@stable", [(f"poe@{versions(store, 'poe')[-1]}", 1)], "test")
    assert store.rollback("poe@stable", "test").value == f'[["poe@{first}", 1.0]]'
    assert store.get("poe@stable").ref.digest == first


def test_an_aliased_version_outlives_its_names_rollback(store: AdapterStore) -> None:
    third = versions(store, "poe")[-1]
    store.set_alias("edgar", [(f"poe@{third}", 1)], "test")
    store.rollback("poe", "test")
    assert store.sweep(0) == []
    assert store.get("edgar").ref.digest == third


def test_a_weighted_alias_divides_requests_and_keeps_each_key_where_it_was(store: AdapterStore) -> None:
    first = versions(store, "poe")[0]
    store.set_alias("canary", [("poe", 90), (f"poe@{first}", 10)], "test")
    keys = [f"user-{i}" for i in range(2000)]
    chosen = {key: store.get("canary", key).ref.digest for key in keys}
    assert 140 <= Counter(chosen.values())[first] <= 260, "a tenth of 2,000; five standard deviations are 67"
    assert {key: store.get("canary", key).ref.digest for key in keys} == chosen
    assert len({store.get("canary").ref.digest for _ in range(300)}) == 2, "without a key each request draws"
    store.set_alias("canary", [("poe", 50), (f"poe@{first}", 50)], "test")
    moved = [key for key in keys if store.get("canary", key).ref.digest != chosen[key]]
    assert all(store.get("canary", key).ref.digest == first for key in moved), "more weight only draws keys in"


@pytest.mark.parametrize(
    ("name", "targets", "message"),
    [
        ("a", [], "0 targets; expected 1 to 16"),
        ("a", [("poe", 0)], "'poe': the weight is 0; expected a number from 1e-06 to 1e[+]06 or the negative of one"),
        ("a", [("poe", -1.0)], "'poe': the weight is -1.0; expected a number above 0, at most 100"),
        ("a", [("poe", 100.5)], "'poe': the weight is 100.5; expected a number above 0, at most 100"),
        ("a", [("poe", float("nan"))], "the weight is nan"),
        ("a", [("a", 1)], "'a': an alias can't have its own name as target"),
        ("a", [("tagged", 1)], "'tagged' is an alias; name its targets instead"),
        ("a", [("po/e", 1)], "'po/e' is no adapter name"),
        ("poe@stable", [("twain", 1)], "'twain': 'poe@stable' can only stand for versions of 'poe'"),
        ("poe@abcdef", [("poe", 1)], "a tag of hex digits alone could be a digest's beginning"),
        ("poe@", [("poe", 1)], "'' after the @ is neither a tag nor"),
    ],
)
def test_a_wrong_alias_is_refused(
    store: AdapterStore, name: str, targets: list[tuple[str, float]], message: str
) -> None:
    store.set_alias("tagged", [("twain", 1)], "test")
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        store.set_alias(name, targets, "test")


def test_names_of_two_kinds_do_not_mix(store: AdapterStore, tmp_path: Path) -> None:
    with pytest.raises(AdapterConflict, match="'twain' is an adapter: remove it, or choose another name"):
        store.set_alias("twain", [("poe", 1)], "test")
    store.set_alias("edgar", [("poe", 1)], "test")
    with pytest.raises(AdapterConflict, match="'edgar' is an alias"):
        publish(store, "edgar", 9, tmp_path)
    with pytest.raises(AdapterConflict, match="'poe' is a target of edgar: change or remove the alias first"):
        store.remove("poe", "test")
    with pytest.raises(AdapterNotFound, match="'nobody'"):
        store.set_alias("b", [("nobody", 1)], "test")
    store.remove("edgar", "test")
    store.remove("poe", "test")
    assert [entry.name for entry in store.entries()] == ["twain"]


def test_reserved_names_are_nobodys(tmp_path: Path) -> None:
    store = AdapterStore(tmp_path / "store", SHAPE, reserved=frozenset({"base"}))
    with pytest.raises(AdapterRefused, match="the name 'base' is reserved"):
        publish(store, "base", 0, tmp_path)
    with pytest.raises(AdapterRefused, match="'a b' is no adapter name"):
        store.stage("a b", write_adapter(tmp_path / "x"))


def test_content_that_no_name_means_is_swept_after_a_while(store: AdapterStore, tmp_path: Path) -> None:
    twain = store.get("twain")
    (store.objects.path(twain.ref.digest) / "left").write_text("x")
    store.remove("twain", "test")
    assert store.sweep() == [], "a request may be on its way to it"
    assert store.sweep(0) == [twain.ref.digest]
    assert not Path(twain.ref.path).exists()
    assert store.get("poe").ref.digest == versions(store, "poe")[-1]
    publish(store, "twain", 3, tmp_path)
    assert store.get("twain").ref == twain.ref, "and may be published again"


def test_damaged_content_is_mended_by_publishing_it_again(store: AdapterStore, tmp_path: Path) -> None:
    found = store.get("twain")
    weights = Path(found.ref.path) / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-4] + b"oops")
    publish(store, "twain", 3, tmp_path)
    assert weights.read_bytes() == whole


def test_what_lies_beside_the_weights_is_brought_up_to_date(store: AdapterStore, tmp_path: Path) -> None:
    folder = write_adapter(tmp_path / "again", tensors(seed=3))
    (folder / "report.json").write_text('{"loss": 1}')
    (folder / "notes.txt").write_text("not an adapter's file")
    found = store.stage("twain", folder)
    assert found.ref == store.get("twain").ref, "the same content"
    files = sorted(file.name for file in Path(found.ref.path).iterdir())
    assert files == ["adapter_config.json", "adapter_model.safetensors", "report.json"]


def test_compositions() -> None:
    assert parse_composition("wilde:0.7,devil:-0.3") == [("wilde", 0.7), ("devil", -0.3)]
    assert parse_composition("wilde@stable, devil") == [("wilde@stable", 1.0), ("devil", 1.0)]
    for wrong, message in [
        ("wilde:", "'wilde:': the weight is ''"),
        ("wilde:0,devil:1", "the weight is '0'"),
        ("wilde:nan", "the weight is 'nan'"),
        ("wilde:1e9", "the weight is '1e9'"),
        ("wilde,,devil", "'' is no adapter name"),
    ]:
        with pytest.raises(ValueError, match=message):
            parse_composition(wrong)


def test_a_reference_is_written_as_it_was_read() -> None:
    for text in ("poe", "poe@stable", "poe@0123ab"):
        assert str(parse_reference(text)) == text
    for wrong in ("", "@x", "poe@a b", "p,e", "poe@ünder", "pоe"):
        with pytest.raises(ValueError, match=r"expected|neither"):
            parse_reference(wrong)


def test_a_name_never_means_another_ones_version(store: AdapterStore) -> None:
    twain = versions(store, "twain")[0]
    with pytest.raises(AdapterNotFound):
        store.get(f"poe@{twain}")


def test_an_alias_is_not_rolled_back_to_what_was_removed(store: AdapterStore) -> None:
    store.set_alias("edgar", [("twain", 1)], "test")
    store.set_alias("edgar", [("poe", 1)], "test")
    store.remove("twain", "test")
    with pytest.raises(AdapterConflict, match="'twain' was removed, so 'twain' can't be a target: set the alias anew"):
        store.rollback("edgar", "test")


def test_what_is_asked_of_a_name_of_another_kind_is_not_done(store: AdapterStore) -> None:
    store.set_alias("edgar", [("poe", 1)], "test")
    for change in (store.remove, store.rollback):
        with pytest.raises(AdapterNotFound, match="'edgar' does not exist; it is an alias"):
            change("edgar", "test", Kind.ADAPTER)
        with pytest.raises(AdapterNotFound, match="'poe' does not exist; it is an adapter: see /v1/adapters/poe"):
            change("poe", "test", Kind.ALIAS)


def test_a_reserved_name_in_the_store_is_not_served(store: AdapterStore, tmp_path: Path) -> None:
    """Another server may have called its base otherwise."""
    other = AdapterStore(tmp_path / "store", SHAPE, reserved=frozenset({"poe"}))
    assert [entry.name for entry in other.entries()] == ["twain"]
    assert other.has("poe"), "the start tells of it"
    with pytest.raises(AdapterNotFound):
        other.get("poe")


def test_golden_prompts_are_part_of_a_version(store: AdapterStore, tmp_path: Path) -> None:
    """So a wrong golden.json is another version, and the one that was proved goes on."""
    folder = write_adapter(tmp_path / "again", tensors(seed=3))
    prompt = {"prompt": "a", "prompt_token_ids": [1], "token_ids": [2], "logprobs": [-0.5]}
    golden = {"format_version": 1, "base_model": "b", "dtype": "float32", "prompts": [prompt]}
    (folder / "golden.json").write_text(json.dumps(golden))
    with_golden = store.stage("twain", folder)
    assert with_golden.ref.digest != store.get("twain").ref.digest
    assert not (Path(store.get("twain").ref.path) / "golden.json").exists()
    (folder / "golden.json").write_text(json.dumps(golden, indent=3))
    assert store.stage("twain", folder).ref == with_golden.ref, "what it says counts, not how it is written"
    (folder / "golden.json").write_text('{"bogus": 1}')
    with pytest.raises(AdapterRefused, match=r"golden\.json"):
        store.stage("twain", folder)


def test_an_alias_whose_targets_the_engine_refused_is_not_servable(store: AdapterStore) -> None:
    store.set_alias("voice", [("poe", 1)], "test")
    digest = store.get("poe").ref.digest
    assert {"poe", "voice"} <= {entry.name for entry in store.servable()}
    assert not {"poe", "voice"} & {entry.name for entry in store.servable({digest})}
