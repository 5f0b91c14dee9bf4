"""What `adapter_config.json` means: the same modules, ranks and scalings as PEFT's, everything else refused by name."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from transformers import GPT2Config, GPT2LMHeadModel

from adapters.adapter import TARGETS, BaseShape, ModuleKey
from adapters.errors import AdapterRefused
from adapters.lora_config import CONFIG_FILE, MAX_CONFIG_BYTES, MAX_RANK, read_lora_spec
from tests.adapters.support import SHAPE, write_config

THREE = BaseShape(n_layer=3, n_embd=8, n_inner=32)
EVERY = ["c_attn", "c_proj", "c_fc"]
AGREEMENT: dict[str, dict[str, Any]] = {
    "list": {"target_modules": ["c_attn"]},
    "bare name of two modules": {"target_modules": ["c_proj"]},
    "dotted suffix": {"target_modules": ["attn.c_proj", "mlp.c_fc"]},
    "full names": {"target_modules": ["transformer.h.1.attn.c_attn", "transformer.h.2.mlp.c_fc"]},
    "suffix through the layer": {"target_modules": ["h.0.attn.c_attn", "1.mlp.c_proj"]},
    "a name that is nowhere": {"target_modules": ["c_attn", "q_proj", "tn.c_proj"]},
    "regex": {"target_modules": r"transformer\.h\.(0|2)\.attn\.c_attn"},
    "regex with stars": {"target_modules": r".*\.h\.[01]\.mlp\.c_.*"},
    "regex matches whole names only": {"target_modules": r".*h\.1\.attn\.c_attn|h\.0.*"},
    "all-linear": {"target_modules": "all-linear"},
    "excluded list": {"target_modules": EVERY, "exclude_modules": ["mlp.c_proj", "transformer.h.0.attn.c_attn"]},
    "excluded regex": {"target_modules": EVERY, "exclude_modules": r".*\.1\..*"},
    "excluded from all-linear": {"target_modules": "all-linear", "exclude_modules": ["c_fc"]},
    "one layer": {"target_modules": EVERY, "layers_to_transform": 1},
    "layer zero": {"target_modules": EVERY, "layers_to_transform": 0},
    "layers": {"target_modules": EVERY, "layers_to_transform": [0, 2]},
    "layers with pattern": {"target_modules": EVERY, "layers_to_transform": [1], "layers_pattern": "h"},
    "layers with patterns": {"target_modules": EVERY, "layers_to_transform": [1], "layers_pattern": ["blocks", "h"]},
    "layers pattern is a regex": {"target_modules": EVERY, "layers_to_transform": [1], "layers_pattern": "[gh]"},
    "a full name skips the layers": {
        "target_modules": ["c_fc", "transformer.h.0.attn.c_attn"], "layers_to_transform": [1],
    },
    "rank by suffix": {"target_modules": EVERY, "rank_pattern": {"c_attn": 6, "mlp.c_proj": 3}},
    "rank by anchored name": {"target_modules": EVERY, "rank_pattern": {"^transformer.h.0.attn.c_attn": 5}},
    "rank by regex": {"target_modules": EVERY, "rank_pattern": {r"h\.[02]\.attn\..*": 7}},
    "rank by part of a name": {"target_modules": EVERY, "rank_pattern": {"attn": 7, "c_att": 9, "proj": 3}},
    "the first pattern wins": {"target_modules": EVERY, "rank_pattern": {"h.0.mlp.c_fc": 2, "c_fc": 5}},
    "alpha by suffix": {"target_modules": EVERY, "alpha_pattern": {"c_fc": 32, "attn.c_proj": 3}},
    "rank and alpha": {"target_modules": EVERY, "rank_pattern": {"c_fc": 2}, "alpha_pattern": {"c_fc": 5}},
    "rslora": {"target_modules": EVERY, "use_rslora": True, "rank_pattern": {"c_fc": 9}},
    "alpha is no integer": {"target_modules": EVERY, "lora_alpha": 1.5},
}  # fmt: skip


def adapted_by_peft(config: LoraConfig) -> tuple[PeftModel, dict[str, tuple[int, float]]]:
    """The PEFT model of this configuration, and every module it adapts: rank and scaling."""
    with torch.device("meta"):
        base = GPT2LMHeadModel(GPT2Config(vocab_size=9, n_positions=8, n_embd=8, n_layer=3, n_head=2))
    model = get_peft_model(base, config)
    return model, {
        name.removeprefix("base_model.model.transformer."): (module.r["default"], module.scaling["default"])
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }


def adapted_by_us(folder: Path) -> dict[str, tuple[int, float]]:
    return {str(key): value for key, value in read_lora_spec(folder, THREE).modules.items()}


@pytest.mark.filterwarnings("ignore:.*did not match any targeted module:RuntimeWarning")
@pytest.mark.parametrize("case", AGREEMENT)
def test_the_same_modules_ranks_and_scalings_as_peft(case: str, tmp_path: Path) -> None:
    fields = {"r": 4, "lora_alpha": 6, "fan_in_fan_out": True} | AGREEMENT[case]
    model, expected = adapted_by_peft(LoraConfig(**fields))
    assert adapted_by_us(write_config(tmp_path, **fields)) == expected
    model.peft_config["default"].save_pretrained(tmp_path / "saved")
    # What PEFT reads back, not what it wrote: saving sorts a pattern's keys, and the first match wins.
    _, expected = adapted_by_peft(LoraConfig.from_pretrained(tmp_path / "saved"))
    assert adapted_by_us(tmp_path / "saved") == expected


NAMES = [f"transformer.h.{layer}.{target}" for layer in range(3) for target in TARGETS]
NAME_PARTS = st.sampled_from([*EVERY, *TARGETS, "h.1.mlp.c_fc", "0.attn.c_attn", "attn", "proj", *NAMES[:6]])
PATTERNS = st.sampled_from(["c_attn", "c_proj", r".*\.c_fc", "^transformer.h.1.attn.c_proj", r"h\.[01]\.mlp.*", "fc"])


@settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    target_modules=st.one_of(
        st.lists(NAME_PARTS, min_size=1, max_size=4, unique=True),
        st.sampled_from([r".*c_(attn|proj)", r"transformer\.h\.\d\.mlp\.c_fc", r".*\.h\..*"]),
    ),
    exclude_modules=st.one_of(st.none(), st.lists(NAME_PARTS, max_size=2), st.just(r".*\.2\..*")),
    layers_to_transform=st.one_of(st.none(), st.integers(0, 2), st.lists(st.integers(0, 2), max_size=3)),
    layers_pattern=st.sampled_from([None, "", [], "h", ["h"], ["x", "h"], "x", "x|h", "h|x"]),
    rank_pattern=st.dictionaries(PATTERNS, st.integers(1, 9), max_size=3),
    alpha_pattern=st.dictionaries(PATTERNS, st.integers(1, 9), max_size=3),
)
def test_any_mix_of_fields_means_what_it_means_to_peft(tmp_path: Path, **fields: Any) -> None:
    config = SimpleNamespace(**fields)
    expected = {}
    for name in NAMES:
        if check_target_module_exists(config, name) not in (None, False) and not _excluded(config, name):
            rank = fields["rank_pattern"].get(get_pattern_key(fields["rank_pattern"], name), 2)
            alpha = fields["alpha_pattern"].get(get_pattern_key(fields["alpha_pattern"], name), 4)
            expected[name.removeprefix("transformer.")] = (rank, alpha / rank)
    write_config(tmp_path, **fields)
    if not expected:
        with pytest.raises(AdapterRefused, match="name no projection of this GPT-2"):
            read_lora_spec(tmp_path, THREE)
        return
    assert adapted_by_us(tmp_path) == expected


def _excluded(config: SimpleNamespace, name: str) -> bool:
    """PEFT marks an excluded module with an object that is no boolean."""
    return type(check_target_module_exists(config, name)).__name__ == "_ExcludedModule"


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another kind": ({"peft_type": "IA3"}, "peft_type is 'IA3'; only LORA"),
    "no kind": ({"peft_type": None}, "peft_type is None"),
    "dora": ({"use_dora": True}, "use_dora is true"),
    "modules_to_save": ({"modules_to_save": ["lm_head"]}, r"modules_to_save is \['lm_head'\]"),
    "trained tokens": ({"trainable_token_indices": [3]}, "trainable_token_indices is set"),
    "trained tokens by module": ({"trainable_token_indices": {"wte": [3]}}, "trainable_token_indices is set"),
    "bias": ({"bias": "lora_only"}, "bias is 'lora_only'"),
    "bias of B": ({"lora_bias": True}, "lora_bias is True"),
    "replicated layers": ({"layer_replication": [[0, 1]]}, r"layer_replication is \[\[0, 1\]\]"),
    "parameters": ({"target_parameters": ["wte.weight"]}, "target_parameters is"),
    "activated lora": ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens is"),
    "a field of tomorrow": ({"use_magic": True}, "use_magic is True: this field is not supported"),
    "rank is text": ({"r": "8"}, "r is '8': expected an integer"),
    "rank is a float": ({"r": 2.0}, "r is 2.0: expected an integer"),
    "rank is true": ({"r": True}, "r is True: expected an integer"),
    "rank zero": ({"r": 0}, "rank 0 of .*integer from 1 to"),
    "rank too large": ({"r": MAX_RANK + 1}, f"rank {MAX_RANK + 1} of .*integer from 1 to {MAX_RANK}"),
    "rank of a pattern": ({"rank_pattern": {"c_attn": 1.5}}, "rank 1.5 of h.0.attn.c_attn"),
    "rank_pattern is a list": ({"rank_pattern": ["c_attn"]}, "rank_pattern is .*expected an object"),
    "alpha is text": ({"lora_alpha": "x"}, "lora_alpha is 'x': expected a finite number"),
    "alpha is null": ({"lora_alpha": None}, "lora_alpha is None"),
    "alpha is infinite": ({"lora_alpha": float("inf")}, "Infinity is no JSON value"),
    "alpha is past a float": ({"lora_alpha": 10**400}, r"lora_alpha is 10+\.\.\.: expected a finite number"),
    "alpha of a pattern": ({"alpha_pattern": {"c_attn": "x"}}, "alpha_pattern is 'x'"),
    "rslora is no flag": ({"use_rslora": "yes"}, "use_rslora is 'yes'"),
    "no target": ({"target_modules": None}, "target_modules None name no projection"),
    "target of another model": ({"target_modules": ["q_proj"]}, r"target_modules \['q_proj'\] name no projection"),
    "the output layer, too": ({"target_modules": ["c_attn", "lm_head"]}, "name lm_head, which is not adapted"),
    "the embedding, too": ({"target_modules": ["c_attn", "wte"]}, "name transformer.wte, which is not adapted"),
    "everything": ({"target_modules": ".*"}, "name lm_head, which is not adapted"),
    "target is a number": ({"target_modules": 3}, "target_modules is 3: expected a list of names or a regular"),
    "targets are numbers": ({"target_modules": [3]}, r"target_modules is \[3\]"),
    "exclude is an object": ({"exclude_modules": {"a": 1}}, "exclude_modules is"),
    "layers are text": ({"layers_to_transform": "0"}, "layers_to_transform is '0'"),
    "layers are floats": ({"layers_to_transform": [0.5]}, r"layers_to_transform is \[0.5\]"),
    "layer is true": ({"layers_to_transform": True}, "layers_to_transform is True"),
    "layers_pattern is a number": ({"layers_to_transform": 0, "layers_pattern": 5}, "layers_pattern is 5"),
    "layers beyond the base": ({"layers_to_transform": [7]}, "name no projection of this GPT-2 .2 layers"),
    "regex too long": ({"target_modules": "a" * 300}, "target_modules holds the expression"),
    "regex broken": ({"target_modules": "c_attn("}, "not a regular expression"),
    "pattern broken": ({"rank_pattern": {"[": 2}}, r"rank_pattern holds '\[', not a regular expression"),
    "regex repeats too often": ({"target_modules": "c_attn{99999999999999999999}"}, "not a regular expression"),
    "pattern with flags": ({"rank_pattern": {"(?i)c_attn": 2}}, "rank_pattern holds .*not a regular expression"),
    "layers_pattern broken": ({"layers_to_transform": 0, "layers_pattern": "(?P<idx>h)"}, "layers_pattern holds"),
    "exclude broken": ({"exclude_modules": "("}, "exclude_modules holds"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_honoured_is_refused_by_name(case: str, tmp_path: Path) -> None:
    fields, message = REFUSED[case]
    with pytest.raises(AdapterRefused, match=message):
        read_lora_spec(write_config(tmp_path, **fields), SHAPE)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_16", "olora", "corda", "loftq", "lora_ga", "mica", "unknown"])
def test_an_initialisation_that_changes_the_base_is_refused(init: str, tmp_path: Path) -> None:
    with pytest.raises(AdapterRefused, match=f"init_lora_weights is '{init}'"):
        read_lora_spec(write_config(tmp_path, init_lora_weights=init), SHAPE)


@pytest.mark.parametrize("init", [True, False, "gaussian", "orthogonal"])
def test_an_initialisation_that_leaves_the_base_alone_is_accepted(init: object, tmp_path: Path) -> None:
    assert read_lora_spec(write_config(tmp_path, init_lora_weights=init), SHAPE).modules


def test_eva_as_peft_saves_it_is_accepted(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="eva_config"):
        config = LoraConfig(init_lora_weights="eva", target_modules=["c_attn"])
    config.save_pretrained(tmp_path)
    assert len(read_lora_spec(tmp_path, SHAPE).modules) == SHAPE.n_layer


@pytest.mark.parametrize(
    "expression", [r"(.*a?)*x", r"(\w|\.)*!", r"(\w+|\.)+!", r"(a*)*", r"(.){9,}!", ".*" * 12 + "!", ".?" * 60 + "!"]
)
@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "rank_pattern"])
def test_an_expression_that_could_match_for_ages_is_refused(expression: str, field: str, tmp_path: Path) -> None:
    folder = write_config(tmp_path, **{field: {expression: 2} if field == "rank_pattern" else expression})
    with pytest.raises(AdapterRefused, match=f"{field} holds the expression"):
        read_lora_spec(folder, SHAPE)


def test_defaults_are_pefts(tmp_path: Path) -> None:
    (tmp_path / CONFIG_FILE).write_text(json.dumps({"peft_type": "LORA", "target_modules": ["c_attn"]}))
    config = LoraConfig()
    expected = (config.r, config.lora_alpha / config.r)
    assert read_lora_spec(tmp_path, SHAPE).modules == {ModuleKey(i, "attn.c_attn"): expected for i in (0, 1)}


def test_the_base_models_name_is_kept_for_information(tmp_path: Path) -> None:
    assert read_lora_spec(write_config(tmp_path, base_model_name_or_path="some/base"), SHAPE).base_model == "some/base"
    assert read_lora_spec(write_config(tmp_path, base_model_name_or_path=7), SHAPE).base_model is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not valid JSON"),
        (b"", "not valid JSON"),
        (b"\xff\xfe{}", "not valid JSON"),
        (b"[1]", "holds list, expected an object"),
        (b"[" * 100_000, "not valid JSON"),
        (b" " * (MAX_CONFIG_BYTES + 1), f"at most {MAX_CONFIG_BYTES:,} are read"),
    ],
    ids=["cut off", "empty", "not UTF-8", "a list", "nested too deep", "huge"],
)
def test_a_file_that_is_no_configuration_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / CONFIG_FILE).write_bytes(content)
    with pytest.raises(AdapterRefused, match=message):
        read_lora_spec(tmp_path, SHAPE)


def test_a_missing_file_and_one_that_is_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterRefused, match=f"no {CONFIG_FILE} in .*not a PEFT adapter folder"):
        read_lora_spec(tmp_path, SHAPE)
    (tmp_path / CONFIG_FILE).mkdir()
    with pytest.raises(AdapterRefused, match="is not a regular file"):
        read_lora_spec(tmp_path, SHAPE)
