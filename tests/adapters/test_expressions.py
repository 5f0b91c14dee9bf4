"""An expression in a config may cost milliseconds for a name, whatever it says; what could cost more is not run."""

import re
from pathlib import Path

import pytest

from adapters.adapter import BaseShape
from adapters.errors import AdapterRefused
from adapters.expressions import compile_all
from adapters.lora_config import read_lora_spec
from tests.adapters.support import SHAPE, write_config

SLOW = {
    "alternatives that overlap": "(.|..)" * 30 + "!",
    "alternatives of alternatives": "((a|b)|(.|..))" * 12 + "!",
    "alternatives under names": "(?P<a>.|..)(?:.|..)" + "(.|..)" * 20 + "!",
    "six repetitions": ".*" * 6 + "[!?]",
    "repetitions and alternatives": ".*.*.*" + "(.|..)" * 8 + "[!?]",
    "optional ones": ".?" * 26 + "!",
    "a repeated group": "(.*a)+!",
    "hidden behind a class in a comment": "(?#[)" + "(.|..)" * 30 + "![x]",
    "hidden behind a class in a verbose comment": "(?x)#[\n" + "(.|..)" * 30 + "!#]",
    "hidden behind several flags": "(?ix)#[\n" + "(.|..)" * 30 + "!#]",
    "hidden behind an escape": r"\[" + "(.|..)" * 30 + "![x]",
    "behind a class with an escape": r"[\](]" + "(.|..)" * 30 + "!",
    "long": "a" * 257,
}


@pytest.mark.parametrize("case", SLOW)
@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "rank_pattern", "layers_pattern"])
def test_what_could_take_long_is_refused_and_not_tried(case: str, field: str, tmp_path: Path) -> None:
    value = {SLOW[case]: 2} if field == "rank_pattern" else [SLOW[case]] if field == "layers_pattern" else SLOW[case]
    fields = {"layers_to_transform": 0} if field == "layers_pattern" else {}
    with pytest.raises(AdapterRefused, match=rf"^{field} holds the expression .* or with a repeated group$"):
        read_lora_spec(write_config(tmp_path, **{field: value}, **fields), SHAPE)


@pytest.mark.parametrize(
    "pattern",
    [
        r".*\.h\.(0|1|2|10|11)\.(attn|mlp)\.(c_attn|c_proj|c_fc)",
        r"(?:.*?(?:attn|mlp).*?(?:c_attn|c_proj|c_fc).*?)|(?:h\.0\.(?:attn|mlp)\..*)",
        r"transformer\.h\.\d+\.(?!mlp)\w+\.c_\w*",
        "|".join(f"transformer.h.{i}.c_fc" for i in range(10)),
    ],
)
def test_what_people_write_is_taken(pattern: str) -> None:
    assert compile_all([pattern], "target_modules")[0].pattern == pattern


def test_many_cheap_expressions_are_as_bad_as_one_dear_one() -> None:
    assert len(compile_all([rf".*\.{i}" for i in range(900)], "rank_pattern")) == 900
    with pytest.raises(AdapterRefused, match="rank_pattern holds the expression"):
        compile_all([f".*.*.*.*{i}" for i in range(20)], "rank_pattern")
    with pytest.raises(AdapterRefused, match=r"rank_pattern holds 1,025 expressions of .*at most 1,024"):
        compile_all(["a"] * 1025, "rank_pattern")
    with pytest.raises(AdapterRefused, match=r"200 expressions of 40,000 characters; at most 1,024 of 32,768"):
        compile_all(["a" * 200] * 200, "rank_pattern")


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"])
def test_a_list_longer_than_any_model_needs_is_refused(field: str, tmp_path: Path) -> None:
    value = [1] * 2000 if field == "layers_to_transform" else ["c_attn"] * 2000
    with pytest.raises(AdapterRefused, match=f"{field} lists 2,000 entries; at most 1,024 are taken"):
        read_lora_spec(write_config(tmp_path, **{field: value}), BaseShape(24, 8, 20))


@pytest.mark.parametrize("rank", [True, 2.0, "2", None, [2]])
def test_a_rank_that_is_no_integer_is_refused(rank: object, tmp_path: Path) -> None:
    with pytest.raises(AdapterRefused, match=f"rank {re.escape(repr(rank))} of h.0.attn.c_attn is not an integer"):
        read_lora_spec(write_config(tmp_path, rank_pattern={"c_attn": rank}), SHAPE)
