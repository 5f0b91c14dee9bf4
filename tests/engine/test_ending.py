"""How a sequence ends: stop strings, EOS, max_tokens and the end of its row; and what the engine refuses to begin."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine.config import EngineConfig
from server.engine.types import BANNED, ErrorKind, FinishReason, SequenceOutput
from tests.engine.toy import EOS, VOCAB, Toy, Toys


def say(toy: Toy, tokens: list[int], **params: object) -> SequenceOutput:
    """What comes back when the model wants to say `tokens`, then "z" for ever."""
    toy.runner.say = lambda s: tokens[len(s.output_ids)] if len(s.output_ids) < len(tokens) else 25
    toy.add("a", **({"max_tokens": 20} | params))
    return toy.run()["a"]


def letters(text: str) -> list[int]:
    return [ord(c) - 97 for c in text]


@pytest.mark.parametrize("count", [1, 2, 29])
def test_max_tokens(toys: Toys, count: int) -> None:
    output = say(toys(), letters("abc"), max_tokens=count)
    assert (len(output.token_ids), output.finish_reason) == (count, FinishReason.LENGTH)


def test_eos_ends_and_is_part_of_the_output(toys: Toys) -> None:
    output = say(toys(), [0, 1, EOS, 2])
    assert (output.token_ids, output.finish_reason) == ((0, 1, EOS), FinishReason.EOS)
    first = say(toys(), [EOS])
    assert (first.token_ids, first.finish_reason) == ((EOS,), FinishReason.EOS)


def test_eos_at_the_last_token_is_still_an_end_of_its_own(toys: Toys) -> None:
    assert say(toys(), [0, EOS], max_tokens=2).finish_reason is FinishReason.EOS


def test_ignore_eos_goes_on(toys: Toys) -> None:
    output = say(toys(), [0, EOS, EOS, 1], max_tokens=4, ignore_eos=True)
    assert (output.token_ids, output.finish_reason) == ((0, EOS, EOS, 1), FinishReason.LENGTH)


@pytest.mark.parametrize(
    ("stop", "tokens", "offset"),
    [
        ((b"c",), "abc", 2),
        ((b"bc",), "abc", 1),
        ((b"abc",), "abc", 0),
        ((b"never", b"cd"), "abcd", 2),
        ((b"cd", b"bcd"), "abcd", 1),
        ((b"abd", b"bc"), "abc", 1),
        ((b"aab",), "aaab", 1),
    ],
)
def test_a_stop_string_ends_before_itself(toys: Toys, stop: tuple[bytes, ...], tokens: str, offset: int) -> None:
    output = say(toys(), letters(tokens), stop=stop)
    assert (output.finish_reason, output.stop_offset) == (FinishReason.STOP, offset)
    assert output.token_ids == tuple(letters(tokens)), "the tokens up to the match are all there"


def test_the_prompt_does_not_count_for_stop_strings(toys: Toys) -> None:
    output = say(toys(), letters("ca"), stop=(b"bc",), prompt=3, max_tokens=4)  # the prompt is "bbb"
    assert output.finish_reason is FinishReason.LENGTH


def test_a_stop_string_inside_eos_is_not_looked_for(toys: Toys) -> None:
    assert say(toys(), [0, EOS], stop=(b"end",)).finish_reason is FinishReason.EOS
    ignored = say(toys(), [0, EOS], stop=(b"end",), ignore_eos=True)
    assert (ignored.finish_reason, ignored.stop_offset) == (FinishReason.STOP, 2)


@pytest.mark.parametrize(
    ("stop", "min_tokens", "tokens", "offset"),
    [
        ((b"b",), 2, "abab", 3),  # the first b is the second token
        ((b"b",), 1, "abab", 1),
        ((b"ab",), 3, "ababab", 2),  # it ends after them, wherever it begins
        ((b"b", b"never there"), 2, "abcb", 3),  # a long one beside it doesn't make it look further back
        ((b"bc", b"c"), 2, "abc", 1),
    ],
)
def test_no_stop_string_ends_in_the_first_min_tokens(
    toys: Toys, stop: tuple[bytes, ...], min_tokens: int, tokens: str, offset: int
) -> None:
    output = say(toys(), letters(tokens), stop=stop, min_tokens=min_tokens)
    assert (output.finish_reason, output.stop_offset) == (FinishReason.STOP, offset)
    assert len(output.token_ids) > min_tokens


def test_no_token_left_to_choose_is_an_error_of_this_sequence_alone(toys: Toys) -> None:
    toy = toys()
    toy.runner.say = lambda s: BANNED if s.request_id == "a" and len(s.output_ids) == 2 else 3
    toy.add("a", max_tokens=5)
    toy.add("b", max_tokens=5)
    outputs = toy.run()
    assert (outputs["a"].finish_reason, outputs["a"].error_kind) == (FinishReason.ERROR, ErrorKind.GENERATION)
    assert outputs["a"].error is not None
    assert outputs["a"].error.startswith("no token can be chosen after 2: logit_bias, the penalties and min_tokens ban")
    assert (outputs["b"].finish_reason, len(outputs["b"].token_ids)) == (FinishReason.LENGTH, 5)


def test_a_prompt_whose_logits_are_not_finite_ends_its_sequence(toys: Toys) -> None:
    toy = toys()
    toy.runner.prompt_logprob = math.nan
    toy.add("a", max_tokens=5, prompt_logprobs=True)
    toy.add("b", max_tokens=5)
    outputs = toy.run()
    assert outputs["a"].finish_reason is FinishReason.ERROR
    assert "not finite" in (outputs["a"].error or "")
    assert (outputs["a"].token_ids, outputs["a"].prompt_logprobs) == ((), ())
    assert outputs["b"].finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize(
    ("logit_bias", "message"),
    [
        (((5, 1.0), (100, 1.0)), r"logit_bias names token 100, the base has 0..99"),
        (((-1, 1.0),), r"logit_bias names token -1"),
        (((5, math.nan),), r"logit_bias of token 5 is nan, expected a number or -inf"),
        (((5, math.inf),), r"logit_bias of token 5 is inf"),
    ],
)
def test_a_logit_bias_that_can_not_be_added_is_refused(
    toys: Toys, logit_bias: tuple[tuple[int, float], ...], message: str
) -> None:
    toy = toys()
    with pytest.raises(ValueError, match=message):
        toy.add("a", logit_bias=logit_bias)
    toy.add("b", logit_bias=((0, -math.inf), (99, 1e9)), max_tokens=1)
    assert set(toy.run()) == {"b"}


def test_a_stop_string_at_the_last_token_wins_over_the_length(toys: Toys) -> None:
    assert say(toys(), letters("ab"), stop=(b"b",), max_tokens=2).finish_reason is FinishReason.STOP


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.lists(st.sampled_from([0, 1, EOS]), max_size=12),
    st.lists(st.text("ab<end>", min_size=1, max_size=4).map(str.encode), min_size=1, max_size=3),
)
def test_the_first_match_in_the_bytes_is_found_at_the_first_token_that_completes_one(
    tokens: list[int], stops: list[bytes]
) -> None:
    toy = Toy()
    try:
        output = say(toy, tokens, stop=tuple(stops), ignore_eos=True, max_tokens=14)
    finally:
        toy.engine.close()
    said = [*tokens, *[25] * 14][:14]
    for count in range(1, 15):
        text = b"".join(VOCAB[token] for token in said[:count])
        found = [text.find(stop) for stop in stops if stop in text]
        if found:
            assert (output.finish_reason, output.stop_offset) == (FinishReason.STOP, min(found))
            assert output.token_ids == tuple(said[:count])
            return
    assert (output.finish_reason, output.stop_offset) == (FinishReason.LENGTH, None)


def test_a_row_is_used_to_its_end(toys: Toys) -> None:
    toy = toys(max_model_len=8)
    output = say(toy, [], prompt=3, max_tokens=5)
    assert (len(output.token_ids), output.finish_reason) == (5, FinishReason.LENGTH)
    assert max(i.sequence.num_computed for batch in toy.runner.batches for i in batch.items) == 7


@pytest.mark.parametrize(("prompt", "count"), [(0, 1), (3, 30), (33, 1), (32, 1)])
def test_what_does_not_fit_is_refused(toys: Toys, prompt: int, count: int) -> None:
    toy = toys()
    with pytest.raises(ValueError, match=f"prompt of {prompt} tokens and max_tokens {count} don't fit into 1..32"):
        toy.add("a", prompt=prompt, max_tokens=count)
    assert not toy.engine.has_work


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"max_batch_size": 0}, "max_batch_size is 0"),
        ({"max_model_len": 0}, "max_model_len is 0"),
        ({"max_batch_tokens": -1}, "max_batch_tokens is -1"),
        ({"max_batch_size": 8, "max_batch_tokens": 7}, "max_batch_tokens 7 is less than max_batch_size 8"),
        ({"adapter_memory": 0}, "adapter_memory is 0"),
    ],
)
def test_limits_that_contradict_each_other_are_refused(limits: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EngineConfig(**limits)


def test_the_figures_of_a_step(toys: Toys) -> None:
    toy = toys(max_batch_size=2)
    toy.preload("x")
    for name, adapter in (("a", "x"), ("b", None), ("c", "x")):
        toy.add(name, adapter, prompt=5, max_tokens=2)
    first, second, third = (toy.engine.step().stats for _ in range(3))
    assert (first.num_running, first.num_waiting, first.batch_size) == (2, 1, 2)
    assert (first.num_prompt_tokens, first.num_generated_tokens, first.kv_cache_usage) == (10, 2, 1.0)
    assert (first.running_adapters, first.waiting_adapters) == (("x",), ("x",))
    assert (first.resident_adapters, first.adapter_loads) == (1, 1)
    assert (len(first.first_token_latencies), len(first.inter_token_latencies)) == (2, 0)
    assert (second.num_running, second.num_prompt_tokens, second.num_generated_tokens) == (0, 0, 2)
    assert (len(second.first_token_latencies), len(second.inter_token_latencies)) == (0, 2)
    assert (third.batch_size, third.num_prompt_tokens, third.kv_cache_usage) == (1, 5, 0.5)
