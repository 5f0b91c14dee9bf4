"""Flags: what they say is what is recorded, and bad values are named."""

import shlex

import pytest

from training.__main__ import main
from training.cli import parse_args
from training.config import TrainConfig
from training.errors import ConfigError
from training.report import command


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--name", "a/b"], "--name 'a/b'"),
        (["--rank", "0"], "--rank is 0: give at least 1"),
        (["--rank", "4096"], "--rank is 4096: give at most 512"),
        (["--epochs", "0"], "--epochs is 0.0"),
        (["--lr", "nan"], "--lr is nan"),
        (["--dropout", "1"], "--dropout is 1.0"),
        (["--batch-size", "0"], "--batch-size is 0"),
        (["--seed", "-1"], "--seed is -1"),
        (["--limit", "0"], "--limit is 0"),
        (["--targets", "c_attn,q_proj"], "--targets 'c_attn,q_proj': choose some of"),
        (["--column", "quote"], "--column 'quote': write FIELD=COLUMN"),
        (["--template", "no field"], "--template 'no field' has no {field}"),
        (["--template", "{quote}"], "leaves nothing to prompt with"),
        (["--template", "Say {quote:>9}!"], "--template"),
        (["--prompt", "Elsewhere"], "--prompt 'Elsewhere' is not the beginning"),
        (["--resume", "--overwrite"], "give one of them"),
        (["--init-digest", "0" * 64], "--init-digest says what --init-from holds: give that one, too"),
        (["--seed", "4294967296"], "--seed is 4294967296: give at most"),
        (["--column", "quotes=text"], "--column quotes=...: there is no such field; it may be author, quote, tags"),
        (["--clip", "0"], "--clip is 0.0: give a number above 0"),
        (["--weight-decay", "-1"], "--weight-decay is -1.0: give 0 or more"),
        (["--max-tokens", "0"], "--max-tokens is 0"),
        (["--gate", "eos_rate"], "--gate 'eos_rate': write NAME=VALUE, for example --gate eos_rate=0.95"),
        (["--gate", "eos_rate=high"], "'high' is not a number"),
    ],
)
def test_a_bad_value_is_named(flags: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_args(["--name", "x", *flags])
    assert message in str(caught.value)


def test_the_recorded_command_makes_the_same_run() -> None:
    config = TrainConfig(
        "mine", authors=("Oscar Wilde", "Jane Austen"), tags=("love",), columns={"quote": "text"}, rank=3, alpha=5,
        epochs=1.5, lr=3e-4, targets=("c_attn",), template="{author} said: {quote}", seed=9, limit=50,
        rslora=True, schedule="linear", patience=2, warmup=0,
    )  # fmt: skip
    again = parse_args(shlex.split(command(config))[3:])
    assert again.recorded() == config.recorded()


def test_the_command_keeps_an_alpha_that_another_rank_would_have_and_every_digit() -> None:
    config = TrainConfig("x", rank=4, alpha=16, lr=0.00234567891234, dropout=0.1234567)
    assert parse_args(shlex.split(command(config))[3:]).recorded() == config.recorded()


def test_a_user_sees_one_line_and_status_2(capsys: pytest.CaptureFixture[str], tmp_path) -> None:
    assert main(["--name", "x", "--data", "nowhere.jsonl", "--output", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error == "error: --data nowhere.jsonl: there is no such file or folder\n"
    assert list(tmp_path.iterdir()) == []
