"""No adapter serves before it has said its golden prompts: in the batch, beside others, and nobody is told of it."""

import threading
import time

import pytest
import torch

from adapters.golden import Golden, GoldenPrompt
from adapters.status import AdapterStatus
from server.engine.types import DIVERGED, ErrorKind, FinishReason, Sequence, SequenceOutput, TopTokens
from tests.engine.toy import EOS, Toy, Toys, ref


def golden(*tokens: int, prompt: int = 3, logprob: float = -0.5) -> Golden:
    return Golden((GoldenPrompt("Quote:", (1,) * prompt, tokens, (logprob,) * len(tokens)),))


def proofs(toy: Toy) -> list[str]:
    """The proofs that were computed, in order."""
    sequences = [s for batch in toy.runner.batches for s in batch.sequences if s.proof]
    return list(dict.fromkeys(s.request_id for s in sequences))


def steps_until(toy: Toy, name: str) -> list[SequenceOutput]:
    """Step until a request has ended; everything that was said."""
    said: list[SequenceOutput] = []
    deadline = time.monotonic() + 10
    while not any(o.request_id == name and o.finish_reason for o in said):
        assert time.monotonic() < deadline, f"{name} never ended"
        said += toy.engine.step().outputs
    return said


def test_an_adapter_that_says_its_prompts_serves(toys: Toys) -> None:
    toy = toys()
    toy.golden["a"] = golden(0, 1, 2)
    toy.add("r", "a", max_tokens=2, logprobs=True)
    done = toy.run()
    assert list(done) == ["r"], "the proof is nobody's request"
    assert done["r"].token_ids == (0, 1)
    assert toy.admitted() == ["golden/a/0", "r"], "proved first, then served"
    assert toy.residency.stats.loads == 1


def test_eos_is_a_token_among_others(toys: Toys) -> None:
    toy = toys()
    toy.golden["a"] = golden(0, EOS, 7)
    toy.runner.say = lambda sequence: (0, EOS, 7)[len(sequence.output_ids)]
    toy.add("r", "a", max_tokens=2, ignore_eos=True)
    assert toy.run()["r"].error is None


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (golden(0, 5, logprob=-0.6), "token 0: expected 0 (logprob -0.600), got 0 (-0.500)"),
        (Golden((golden(0).prompts[0], golden(4, logprob=-2).prompts[0])), "prompt 1 'Quote:', token 0: expected 4"),
    ],
)
def test_an_adapter_that_says_something_else_is_refused(toys: Toys, made: Golden, said: str) -> None:
    toy = toys()
    toy.golden["a"] = made
    toy.add("r", "a")
    toy.add("base")
    done = toy.run()
    error = done["r"].error
    assert error is not None
    assert said in error
    assert error.startswith("golden.json: prompt ")
    assert "tolerance 0.001: the adapter was made on another base" in error
    assert done["r"].error_kind is ErrorKind.ADAPTER_REFUSED
    assert done["base"].finish_reason is FinishReason.LENGTH
    assert toy.residency.status("a") is AdapterStatus.REFUSED
    assert toy.residency.arena.used_bytes == 0, "off the device"
    toy.add("again", "a")
    assert toy.run()["again"].error == error
    assert len(proofs(toy)) == len(made.prompts), "judged once"


def test_a_tie_is_excused_and_what_follows_it_is_not_compared(toys: Toys) -> None:
    toy = toys()
    toy.golden["a"] = golden(9, 9, logprob=-0.5004)
    toy.runner.best = ((0, -0.5), (9, -0.5004))
    toy.add("r", "a")
    assert toy.run()["r"].error is None


@pytest.mark.parametrize("best", [((0, -0.5), (8, -0.5)), ((0, -0.5), (9, -0.6)), ((0, -0.5), (9, -0.503))])
def test_another_token_as_likely_is_no_tie_unless_the_golden_one_is(toys: Toys, best: TopTokens) -> None:
    toy = toys()
    toy.golden["a"] = golden(9, 9, logprob=best[-1][1] if best[-1] == (9, -0.503) else -0.5)
    toy.runner.best = best
    toy.add("r", "a")
    assert "token 0: expected 9" in (toy.run()["r"].error or "")


def test_others_are_not_held_up_and_it_is_loading_and_pinned(toys: Toys) -> None:
    toy = toys(resident=1, max_batch_size=3)
    toy.golden["a"] = golden(*range(12))
    toy.add("r", "a", max_tokens=2)
    toy.add("base", max_tokens=3, stream=True)
    said = steps_until(toy, "base")
    assert {o.request_id for o in said} == {"base"}
    assert toy.residency.status("a") is AdapterStatus.LOADING
    for _ in range(5):
        toy.residency.prefetch(ref("c"))  # there is no room for it
        toy.residency.poll()
        time.sleep(0.001)
    assert toy.residency.status("a") is AdapterStatus.LOADING
    toy.add("b", "b", max_tokens=1)  # wants its room
    done = toy.run()
    assert [done[name].error for name in "rb"] == [None, None]
    assert proofs(toy) == ["golden/a/0"]


def test_proofs_wait_for_rows_as_others_do(toys: Toys) -> None:
    toy = toys(max_batch_size=1)
    toy.golden["a"] = golden(0)
    toy.add("base", max_tokens=8)
    toy.engine.step()
    toy.preload("b")
    toy.add("r", "a")
    done = toy.run()
    assert toy.admitted() == ["base", "golden/a/0", "r"]
    assert done["r"].error is None


def test_a_proof_is_not_kept_out_by_one_that_starves(toys: Toys) -> None:
    """The starving one waits for room that a pinned one under proof holds: that must end first."""
    toy = toys(resident=1, max_batch_size=2)
    toy.golden |= {"a": golden(0, 1), "b": golden(0, 1)}
    for i in range(6):
        toy.add(f"a{i}", "a", max_tokens=9)
        toy.add(f"b{i}", "b", max_tokens=9)
    assert all(output.error is None for output in toy.run().values())
    assert proofs(toy) == ["golden/a/0", "golden/b/0"] or proofs(toy) == ["golden/b/0", "golden/a/0"]


def test_halves_are_compared_by_their_mean_too(toys: Toys) -> None:
    """bfloat16's noise at one token may be as large as what is wrong with another adapter at each."""
    toy = toys(dtype=torch.bfloat16)
    toy.golden |= {
        "noise": Golden((GoldenPrompt("Quote:", (1,), tuple(range(10)), (-0.7, *(-0.5,) * 9)),)),
        "wrong": Golden((GoldenPrompt("Quote:", (1,), tuple(range(10)), (-0.57, *(-0.6,) * 9)),)),
    }
    toy.add("noise", "noise")
    toy.add("wrong", "wrong")
    done = toy.run()
    assert done["noise"].error is None
    error = done["wrong"].error
    assert error is not None
    assert "the logprobs of 10 tokens are 0.097 off on average, tolerance 0.05, most of all prompt 0" in error
    assert "token 1: expected 1 (logprob -0.600), got 1 (-0.500)" in error


def test_once_for_a_digest_however_often_it_comes_back(toys: Toys) -> None:
    toy = toys(resident=1)
    toy.golden |= {"a": golden(0, 1), "b": golden(0, 1)}
    for name in ("a1", "b1", "a2", "b2"):
        toy.add(name, name[0])
        toy.run()
    assert toy.residency.stats.evictions == 3
    assert proofs(toy) == ["golden/a/0", "golden/b/0"]
    toy.engine.forget("a")
    toy.add("a3", "a")
    toy.run()
    batches = [b for b in toy.runner.batches if any(s.request_id == "golden/a/0" for s in b.sequences)]
    assert len(batches) == 4, "forgotten, so proved anew"


def test_a_step_that_fails_is_no_verdict(toys: Toys) -> None:
    toy = toys(host_cache=1 << 20)
    toy.golden["a"] = golden(0, 1)
    toy.add("r", "a")
    toy.runner.fail = RuntimeError("device")
    done = toy.run()
    assert done["r"].error_kind is ErrorKind.ADAPTER_UNAVAILABLE
    assert done["r"].error == "golden.json could not be replayed: generation failed: RuntimeError: device"
    assert toy.residency.status("a") is AdapterStatus.FAILED
    assert toy.residency.arena.used_bytes == 0
    toy.residency._failures._failures["a"].when -= 5  # later
    toy.add("again", "a")
    assert toy.run()["again"].error is None
    assert toy.residency.cache.hits == 1, "tried again from host memory"


def test_logits_that_are_not_finite_are_a_mismatch(toys: Toys) -> None:
    toy = toys()
    toy.golden["a"] = golden(0, 1)

    def say(sequence: Sequence) -> int:
        return DIVERGED if sequence.proof and sequence.output_ids else len(sequence.output_ids)

    toy.runner.say = say
    toy.add("r", "a")
    error = toy.run()["r"].error
    assert error is not None
    assert "token 1: expected 1 (logprob -0.500), got logits that are not finite" in error


def test_what_does_not_fit_is_cut_and_nothing_left_is_a_warning(toys: Toys, caplog: pytest.LogCaptureFixture) -> None:
    toy = toys(max_model_len=8)
    toy.golden["cut"] = golden(0, 1, 2, 77, prompt=5)  # the last one would not match
    toy.golden["none"] = golden(77, prompt=8)
    toy.add("cut", "cut", max_tokens=1)
    assert toy.run()["cut"].error is None
    assert not caplog.records
    toy.add("none", "none", max_tokens=1)
    assert toy.run()["none"].error is None
    assert "golden.json of adapter 'none' could not be replayed: none of its prompts fits into 8" in caplog.text


def test_ids_that_the_base_lacks_are_refused(toys: Toys) -> None:
    toy = toys()
    toy.golden["a"] = golden(0, 100)
    toy.add("r", "a")
    assert toy.run()["r"].error == (
        "golden.json: prompts[0].token_ids holds 100, the base has 100 tokens: the adapter was made on another base"
    )
    assert not proofs(toy)


def test_a_request_that_leaves_meanwhile_leaves_nothing_behind(toys: Toys) -> None:
    toy = toys()
    toy.golden["a"] = golden(*range(6))
    toy.add("r", "a")
    while not proofs(toy):
        toy.engine.step()
    toy.engine.abort("r")
    assert toy.run() == {}
    assert toy.residency.status("a") is AdapterStatus.READY
    toy.engine.check_integrity()


def test_forgotten_under_proof_it_goes_when_the_proof_has_ended(toys: Toys) -> None:
    toy = toys()
    toy.golden["a"] = golden(*range(6))
    toy.add("r", "a")
    while not proofs(toy):
        toy.engine.step()
    toy.engine.abort("r")
    toy.engine.forget("a")
    assert toy.run() == {}
    assert toy.residency.status("a") is AdapterStatus.ABSENT
    assert toy.residency.arena.used_bytes == 0


def test_figures_are_of_requests_alone_and_changes_are_told(toys: Toys) -> None:
    toy = toys()
    toy.golden |= {"a": golden(0, 1, 2), "bad": golden(5, logprob=-3.0)}
    toy.gates["a"] = threading.Event()
    toy.add("r", "a", max_tokens=2)
    toy.add("bad", "bad")
    told: list[tuple[str, str, str | None]] = []
    generated = prompts = 0
    while toy.engine.has_work:
        stats = toy.engine.step().stats
        told += stats.residency
        generated += stats.num_generated_tokens
        prompts += stats.num_prompt_tokens
        toy.gates["a"].set()
    assert (generated, prompts) == (2, 3)
    assert [status for digest, status, _ in told if digest == "a"][-1] == "ready"
    assert ("a", "loading", None) in told
    (refusal,) = {entry for entry in told if entry[1] == "refused"}
    assert refusal[0] == "bad"
    assert refusal[2] is not None
    assert refusal[2].startswith("golden.json: prompt 0")


def test_adapters_that_are_composed_are_proved_each_alone(toys: Toys) -> None:
    toy = toys(resident=2)
    toy.golden |= {"a": golden(0, 1), "b": golden(0, 1)}
    toy.add("r", "a+b", max_tokens=2)
    toy.add("other", "c", max_tokens=2)
    done = toy.run()
    assert [done[name].error for name in ("r", "other")] == [None, None]
    assert sorted(proofs(toy)) == ["golden/a/0", "golden/b/0"]
