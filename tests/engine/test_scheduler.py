"""Who runs when, and how a request ends: the engine with a toy model and adapters that load when the test says so."""

import threading
from collections import Counter

import pytest
import torch

from adapters.errors import AdapterRefused, AdapterUnavailable
from server.engine.types import ErrorKind, FinishReason, SequenceOutput, StepOutput
from tests.engine.toy import Toys


def outputs(step: StepOutput) -> dict[str, SequenceOutput]:
    return {output.request_id: output for output in step.outputs}


def test_a_flood_for_one_adapter_starves_no_other(toys: Toys) -> None:
    toy = toys(max_batch_size=1)
    toy.preload("flood", "b", "c")
    for i in range(50):
        toy.add(f"flood{i}", "flood", max_tokens=2)
    for name in ("b", "c"):
        for i in range(3):
            toy.add(f"{name}{i}", name, max_tokens=2)
    toy.add("base0", max_tokens=2)
    toy.run()
    assert toy.admitted()[:11] == [
        "flood0", "b0", "c0", "base0", "flood1", "b1", "c1", "flood2", "b2", "c2", "flood3"
    ]  # fmt: skip


def test_first_come_first_served_within_an_adapter(toys: Toys) -> None:
    toy = toys(max_batch_size=3)
    for i in range(12):
        toy.add(f"{i}", "a", max_tokens=1 + i % 4)
    toy.run()
    assert toy.admitted() == [f"{i}" for i in range(12)]


def test_a_turn_taken_is_given_up_even_when_others_come_and_go(toys: Toys) -> None:
    toy = toys(max_batch_size=1)
    toy.preload("a", "b")
    served: Counter[str] = Counter()
    for i in range(60):  # a always has work waiting, b arrives one by one
        toy.add(f"a{i}", "a", max_tokens=1)
        if i % 2:
            toy.add(f"b{i}", "b", max_tokens=1)
        served.update(name[0] for name, output in outputs(toy.engine.step()).items() if output.finish_reason)
    assert served["b"] >= 29, f"{served}: b asked for 30 of 60 turns"


@pytest.mark.parametrize("size", [1, 2, 4])
def test_adapters_that_load_hold_up_nobody_who_is_ready(toys: Toys, size: int) -> None:
    toy = toys(max_batch_size=size)
    toy.preload("ready")
    for i in range(size + 1):
        toy.gates[f"slow{i}"] = threading.Event()
        toy.add(f"slow{i}", f"slow{i}", max_tokens=2)
    toy.add("base", max_tokens=1)
    toy.add("ready", "ready", max_tokens=1)
    done = {name for _ in range(3) for name in outputs(toy.engine.step())}
    assert done == {"base", "ready"}, "free rows wait for loads that others don't need"
    for gate in toy.gates.values():
        gate.set()
    assert len(toy.run()) == size + 1


def test_the_budget_of_a_step_is_never_exceeded_and_is_used(toys: Toys) -> None:
    generator = torch.Generator().manual_seed(0)
    toy = toys(max_batch_size=6, max_batch_tokens=7)
    expected = 0
    for i in range(60):
        prompt, count = (int(n) for n in torch.randint(1, 14, (2,), generator=generator))
        expected += prompt + count - 1  # the last token's keys are never computed
        toy.add(f"{i}", prompt=prompt, max_tokens=count, ignore_eos=True)
    assert len(toy.run()) == 60
    sizes = [sum(item.num_new_tokens for item in batch.items) for batch in toy.runner.batches]
    assert max(sizes) == 7
    assert sum(sizes) == expected, "every position is computed once"
    for batch in toy.runner.batches:
        kinds = [item.prefill for item in batch.items]
        assert kinds == sorted(kinds), "decoding tokens come first"
        assert len(batch.items) <= 6
        assert len({s.request_id for s in batch.sequences}) == len(batch.items)
        assert all(item.num_new_tokens == 1 for item in batch.items if not item.prefill)


def test_decoding_goes_on_while_a_long_prompt_is_computed(toys: Toys) -> None:
    toy = toys(max_batch_size=2, max_batch_tokens=6)  # five beside the one that talks; prompts are cut at fours
    toy.add("talks", prompt=1, max_tokens=20, stream=True)
    toy.engine.step()
    toy.add("reads", prompt=12, max_tokens=1)
    chunks = []
    for _ in range(3):
        assert len(outputs(toy.engine.step())["talks"].token_ids) == 1, "a token in every step"
        chunks += [i.num_new_tokens for i in toy.runner.batches[-1].items if i.prefill]
    assert chunks == [4, 4, 4]
    assert "reads" not in toy.engine.step().stats.running_adapters
    assert set(toy.run()) == {"talks"}, "reads has ended with its last chunk"


def test_abort_while_waiting(toys: Toys) -> None:
    toy = toys(max_batch_size=1)
    for name in ("a", "b", "c"):
        toy.add(name, max_tokens=4)
    toy.engine.step()
    toy.engine.abort("b")
    assert toy.engine.step().stats.num_waiting == 1
    assert set(toy.run()) == {"a", "c"}
    assert "b" not in toy.admitted()


def test_abort_while_its_adapter_loads(toys: Toys) -> None:
    toy = toys()
    toy.gates["slow"] = threading.Event()
    toy.add("a", "slow")
    assert toy.engine.step().stats.batch_size == 0
    toy.engine.abort("a")
    assert not toy.engine.has_work
    toy.gates["slow"].set()
    toy.settle()
    toy.engine.check_integrity()
    toy.add("b", "slow")
    assert set(toy.run()) == {"b"}, "what was loaded for nobody is used by the next"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_abort_while_running_frees_the_row_and_the_adapter(toys: Toys, stream: bool, steps: int) -> None:
    toy = toys(max_batch_size=1, max_batch_tokens=2)  # a prompt of three takes two steps
    toy.preload("x")
    toy.add("a", "x", max_tokens=20, stream=stream)
    toy.add("b", "x", max_tokens=2)
    for _ in range(steps):
        toy.engine.step()
    toy.engine.abort("a")
    toy.engine.abort("a")
    toy.engine.abort("never heard of")
    finished = toy.run()
    assert set(finished) == {"b"}, "an aborted request says nothing more, its row is another's"
    assert finished["b"].finish_reason is FinishReason.LENGTH


def test_a_stream_gets_each_token_once_and_the_others_all_at_the_end(toys: Toys) -> None:
    toy = toys()
    toy.add("live", max_tokens=4, stream=True, logprobs=True)
    toy.add("whole", max_tokens=4, logprobs=True)
    steps = [outputs(toy.engine.step()) for _ in range(4)]
    assert [step["live"].token_ids for step in steps] == [(0,), (1,), (2,), (3,)]
    assert [step["live"].logprobs for step in steps] == [(-0.5,)] * 4
    assert [step["live"].finish_reason for step in steps] == [None, None, None, FinishReason.LENGTH]
    assert [set(step) for step in steps] == [{"live"}] * 3 + [{"live", "whole"}]
    assert steps[3]["whole"].token_ids == (0, 1, 2, 3)
    assert steps[3]["whole"].logprobs == (-0.5,) * 4


def test_a_step_that_fails_ends_its_sequences_and_no_others(toys: Toys) -> None:
    toy = toys()
    toy.preload("x")
    for name in ("a", "b", "c"):
        toy.add(name, "x", max_tokens=3)
    toy.engine.step()
    toy.runner.fail = RuntimeError("shapes don't match")
    failed = outputs(toy.engine.step())
    assert set(failed) == {"a", "b"}
    for output in failed.values():
        assert (output.finish_reason, output.error_kind) == (FinishReason.ERROR, ErrorKind.GENERATION)
        assert output.error == "generation failed: RuntimeError: shapes don't match"
    finished = toy.run()
    assert {name: output.finish_reason for name, output in finished.items()} == {"c": FinishReason.LENGTH}


def test_a_broken_device_ends_the_engine(toys: Toys) -> None:
    toy = toys()
    toy.add("a")
    toy.runner.fail = torch.AcceleratorError("an illegal memory access was encountered")
    with pytest.raises(torch.AcceleratorError, match="illegal memory access"):
        toy.engine.step()


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (AdapterRefused("bias is 'all'"), ErrorKind.ADAPTER_REFUSED),
        (AdapterUnavailable("disk"), ErrorKind.ADAPTER_UNAVAILABLE),
        (OSError("gone"), ErrorKind.ADAPTER_UNAVAILABLE),
    ],
)
def test_an_adapter_that_fails_ends_only_who_asked_for_it(toys: Toys, error: Exception, kind: ErrorKind) -> None:
    toy = toys()
    toy.errors["bad"] = error
    for name, adapter in (("a", "bad"), ("b", None), ("c", "good"), ("d", "bad")):
        toy.add(name, adapter, max_tokens=2)
    finished = toy.run()
    assert {name for name, o in finished.items() if o.finish_reason is FinishReason.LENGTH} == {"b", "c"}
    for name in ("a", "d"):
        assert finished[name].error_kind is kind
        assert str(error) in (finished[name].error or "")
        assert finished[name].token_ids == ()
