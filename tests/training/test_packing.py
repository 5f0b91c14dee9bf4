"""Packed passes against transformers and PEFT, one row at a time: nothing leaks between rows or voices."""

import random
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional

from training import forward
from training.base import Base
from training.data import Example
from training.forward import Lane, token_losses
from training.packing import pack

VOICES = ("first", "second")


def example(ids: list[int], bare: int = 1) -> Example:
    return Example({}, ids, bare, bare, str(ids))


def random_rows(seed: int, lengths: list[int]) -> list[Example]:
    rng = random.Random(seed)
    return [example([*(rng.randrange(50256) for _ in range(n - 1)), 50256], rng.randrange(1, n)) for n in lengths]


@pytest.fixture(scope="module")
def model(base: Base) -> Any:
    """Two voices with weights that have effect."""
    torch.manual_seed(0)
    peft: Any = base.load()
    targets = ["c_attn", "c_proj", "c_fc"]
    for name in VOICES:
        lora = LoraConfig(r=4, lora_alpha=8, target_modules=targets, fan_in_fan_out=True, init_lora_weights=False,
                          task_type="CAUSAL_LM")  # fmt: skip
        if peft.__class__.__name__ == "GPT2LMHeadModel":
            peft = get_peft_model(peft, lora, adapter_name=name)
        else:
            peft.add_adapter(name, lora)
    return peft.eval()


def oracle(model: Any, voice: str | None, row: Example) -> torch.Tensor:
    """PEFT's own forward of one row alone."""
    ids = torch.tensor([row.token_ids])
    if voice is None:
        with model.disable_adapter():
            logits = model(ids).logits[0, :-1]
    else:
        model.set_adapter(voice)
        logits = model(ids).logits[0, :-1]
    return functional.cross_entropy(logits, ids[0, 1:], reduction="none")[max(1, row.bare_length) - 1 :]


def test_the_running_example() -> None:
    eos = 50256
    packed = pack([[example([5, 6, 7, eos], 2)], [example([8, 9, eos]), example([4, eos])]])
    assert packed.ids.tolist() == [5, 6, 7, 8, 9, 4]
    assert packed.positions.tolist() == [0, 1, 2, 0, 1, 0]
    assert packed.targets.tolist() == [6, 7, eos, 9, eos, eos]
    assert packed.kept.tolist() == [False, True, True, True, True, True], "every EOS is learned"
    assert packed.places.tolist() == [0, 1, 2, 3, 4, 6]
    assert packed.sizes == [3, 3]
    assert packed.padding == pytest.approx(3 / 9)


@pytest.mark.parametrize("lengths", [([5], [3]), ([2, 30, 7, 7], [64, 2]), ([9, 4, 11], [])])
def test_a_pass_of_two_voices_is_pefts_of_each_row(model: Any, lengths: tuple[list[int], list[int]]) -> None:
    rows = [random_rows(i, part) for i, part in enumerate(lengths)]
    found = token_losses(model, pack(rows), [Lane(voice) for voice in VOICES])
    for voice, part, losses in zip(VOICES, rows, found, strict=True):
        expected = torch.cat([oracle(model, voice, row) for row in part] or [torch.zeros(0)])
        torch.testing.assert_close(losses, expected, atol=2e-4, rtol=1e-4)


def test_the_base_alone_is_a_lane_too(model: Any) -> None:
    rows = random_rows(1, [12, 5])
    found, adapted = token_losses(model, pack([rows, rows]), [Lane(None), Lane("first")])
    torch.testing.assert_close(found, torch.cat([oracle(model, None, row) for row in rows]), atol=2e-4, rtol=1e-4)
    assert (found - adapted).abs().max() > 1e-3


def test_other_rows_change_neither_loss_nor_gradient(model: Any) -> None:
    """One row alone, then between others of its voice and of another: bit by bit but for the order of sums."""

    def of(rows: list[list[Example]], where: slice) -> tuple[torch.Tensor, list[torch.Tensor]]:
        model.zero_grad()
        losses = token_losses(model, pack(rows), [Lane(voice) for voice in VOICES])[0][where]
        losses.sum().backward()
        return losses.detach(), [p.grad.clone() for n, p in model.named_parameters() if ".first." in n]

    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    (mine,) = random_rows(5, [17])
    before, after = random_rows(6, [40])[0], random_rows(7, [3])[0]
    count = 17 - max(1, mine.bare_length)
    start = 40 - max(1, before.bare_length)
    losses, gradients = of([[mine], []], slice(None))
    crowded, same = of([[before, mine, after], random_rows(8, [50, 6])], slice(start, start + count))
    torch.testing.assert_close(crowded, losses, atol=1e-5, rtol=1e-5)
    for one, other in zip(gradients, same, strict=True):
        torch.testing.assert_close(other, one, atol=1e-5, rtol=1e-4)


def test_dropout_is_a_voices_own_and_checkpointing_changes_nothing(model: Any) -> None:
    rows = [random_rows(1, [9, 12]), random_rows(2, [20])]
    lanes = [Lane("first", 0.3, 11), Lane("second", 0.3, 12)]
    alone = token_losses(model, pack(rows[:1]), lanes[:1])[0]
    together = token_losses(model, pack(rows), lanes)[0]
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    assert (alone - token_losses(model, pack(rows[:1]), [Lane("first", 0.3, 13)])[0]).abs().max() > 1e-3

    def gradients(checkpointing: bool) -> list[torch.Tensor]:
        model.zero_grad()
        for losses in token_losses(model, pack(rows), lanes, checkpointing=checkpointing):
            losses.sum().backward(retain_graph=True)
        return [p.grad.clone() for n, p in model.named_parameters() if "lora_" in n]

    for parameter in (p for n, p in model.named_parameters() if "lora_" in n):
        parameter.requires_grad_()
    for one, other in zip(gradients(False), gradients(True), strict=True):
        torch.testing.assert_close(other, one, atol=1e-6, rtol=1e-6)


def test_processes_share_a_batch_and_its_dropout(model: Any) -> None:
    rows = [random_rows(3, [9, 12, 5, 30]), random_rows(4, [20])]
    lanes = [Lane("first", 0.3, 11), Lane("second", 0.3, 12)]
    whole = token_losses(model, pack(rows), lanes)
    parts = [token_losses(model, pack(rows, rank, 2), lanes) for rank in range(2)]
    for voice in range(2):
        total = sum(part[voice].sum() for part in parts)
        torch.testing.assert_close(total, whole[voice].sum(), atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize("longest", [0, forward.PLAIN_ATTENTION], ids=["fused attention", "plain attention"])
def test_bfloat16_is_near(longest: int, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses, and the gradients' direction."""
    monkeypatch.setattr(forward, "PLAIN_ATTENTION", longest)
    rows = [random_rows(3, [9, 12, 5, 30])]
    parameters = [p.requires_grad_() for n, p in model.named_parameters() if "lora_" in n and ".first." in n]

    def of(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        (losses,) = token_losses(model, pack(rows), [Lane("first")], dtype)
        gradients = torch.autograd.grad(losses.sum(), parameters)
        return losses.detach(), torch.cat([gradient.flatten() for gradient in gradients])

    (exact, straight), (near, other) = of(torch.float32), of(torch.bfloat16)
    assert near.dtype == torch.float32
    torch.testing.assert_close(near, exact, atol=0.15, rtol=0.02)
    assert float(torch.cosine_similarity(straight, other, dim=0)) > 0.99
