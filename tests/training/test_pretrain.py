"""Pretraining: what is held out, which windows are drawn, the sampled loss, and a small run from nothing."""

import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, GPT2LMHeadModel

from training.errors import ConfigError, DataError
from training.pretrain import DEMO_BASE, main, parse_weights, save
from training.pretrain_data import Mixture, Source, find_sources, held_out_windows, load_sources, split, tokenize
from training.pretrain_evaluate import evaluate
from training.pretrain_loop import Recipe, Shape, learning_rate_scale, new_model
from training.pretrain_loss import SampledSoftmax, full_loss

CPU = torch.device("cpu")
TINY = "--layers 1 --heads 2 --width 16 --positions 32 --batch-size 8 --lr 0.1 --device cpu --precision fp32".split()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices this small are slower on several threads, much slower on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def source(name: str, tokens: range, weight: float = 1.0) -> Source:
    ids = np.array(tokens, dtype=np.int32)
    return Source(name, weight, "", *split(ids))


def words(seed: int, count: int) -> str:
    """Sentences of few words in ever new orders: easy to get better at, and not to be known by heart."""
    random = np.random.default_rng(seed)
    vocabulary = "the sea ship captain whale wind sail night star old white deep saw went took said and of a".split()
    return " ".join(str(word) + ("." if random.random() < 0.1 else "") for word in random.choice(vocabulary, count))


@pytest.fixture
def prose(tmp_path: Path) -> Path:
    folder = tmp_path / "prose"
    folder.mkdir()
    (folder / "alice.txt").write_text(words(1, 2000) + "\n<|endoftext|>\n" + words(2, 1000))
    (folder / "tales.txt").write_text(words(3, 1500))
    return folder


# Data


def test_held_out_is_the_end_of_a_source_and_never_drawn() -> None:
    tokens = np.arange(50_000, dtype=np.int32)
    train, held_out = split(tokens)
    assert len(held_out) == 500
    assert np.array_equal(np.concatenate([train, held_out]), tokens)
    assert len(split(tokens[:5000])[1]) == 257  # at least
    mixture = Mixture([source("a", range(50_000))], window=33, seed=0)
    assert mixture.draw(2000).max() < 49_500


def test_held_out_windows_predict_every_token_but_the_first_once() -> None:
    for count in (2, 32, 33, 34, 257):
        windows = held_out_windows(np.arange(count, dtype=np.int32), positions=32)
        assert [int(token) for window in windows for token in window[1:]] == list(range(1, count))
        assert all(2 <= len(window) <= 33 for window in windows)


def test_mixture_draws_sources_by_weight_times_size() -> None:
    sources = [source("a", range(1_257), 3.0), source("b", range(2_000, 8_257), 0.5)]  # 1,000 and 6,000 to train on
    mixture = Mixture(sources, window=9, seed=0)
    assert mixture.shares == pytest.approx([0.5, 0.5])
    windows = mixture.draw(2000)
    assert windows.shape == (2000, 9)
    assert np.array_equal(windows - windows[:, :1], np.tile(np.arange(9), (2000, 1)))  # contiguous
    assert (windows[:, 0] < 2_000).mean() == pytest.approx(0.5, abs=0.05)
    assert np.array_equal(Mixture(sources, 9, seed=0).draw(2000), windows)
    frequencies = mixture.frequencies(9_000)
    assert frequencies.sum() == pytest.approx(1)
    assert frequencies[0] == pytest.approx(0.5 / 1_000)
    assert frequencies[2_000] == pytest.approx(0.5 / 6_000)
    assert frequencies[1_100] == 0, "held-out tokens must not be counted"


def test_each_document_ends_with_eos(tmp_path: Path) -> None:
    (tmp_path / "alice.txt").write_text("ab" + "<|endoftext|>\n \n<|endoftext|>" + "c" * 400)
    [loaded] = load_sources(tmp_path, {"alice": 1.0}, lambda texts: [[ord(c) for c in t] for t in texts], 0, window=9)
    assert loaded.train[:4].tolist() == [ord("a"), ord("b"), 0, ord("c")]
    assert loaded.held_out[-2:].tolist() == [ord("c"), 0]
    assert tokenize(["x", "y"], lambda texts: [[1, 2]] * len(texts), eos=9).tolist() == [1, 2, 9, 1, 2, 9]


def test_prose_that_cannot_be_used_is_named(prose: Path) -> None:
    with pytest.raises(ConfigError, match=r"tales\.txt has no weight.*--weight tales=1"):
        find_sources(prose, {})
    with pytest.raises(ConfigError, match=r"--weight nobody: there is no nobody\.txt.*alice, tales"):
        find_sources(prose, {"nobody": 1.0})
    with pytest.raises(ConfigError, match="every source"):
        find_sources(prose, {"alice": 0.0, "tales": 0.0})
    with pytest.raises(DataError, match="no such folder"):
        find_sources(prose / "missing", {})
    with pytest.raises(DataError, match=r"no \.txt file"):
        find_sources(prose.parent, {})
    for entry in ("alice", "alice=much", "alice=-1", "alice=nan"):
        with pytest.raises(ConfigError, match=f"--weight {entry}"):
            parse_weights([entry])
    (prose / "tales.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match=r"tales\.txt is not UTF-8"):
        load_sources(prose, {"tales": 1.0}, lambda texts: [[1]] * len(texts), 0, window=33)
    (prose / "tales.txt").write_text("Too short.")
    with pytest.raises(DataError, match=r"tales\.txt has 2 tokens: 257 are held out and 33 more"):
        load_sources(prose, {"tales": 1.0}, lambda texts: [[1]] * len(texts), 0, window=33)


# Loss


@pytest.fixture
def problem() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, np.ndarray]:
    """hidden [64, 16], embedding [300, 16], targets [64] of frequent and rare tokens, frequencies [300]"""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(64, 16, generator=generator)
    embedding = 0.4 * torch.randn(300, 16, generator=generator)
    targets = torch.randint(300, (64,), generator=generator)
    return hidden, embedding.requires_grad_(), targets, np.random.default_rng(0).random(300)


def test_sampled_loss_is_the_full_one_when_all_are_sampled(problem) -> None:
    hidden, embedding, targets, frequencies = problem
    want = full_loss(hidden, embedding, targets)
    [want_gradient] = torch.autograd.grad(want, embedding)
    for frequent in (1, 100, 299):
        got = SampledSoftmax(frequencies, frequent, 300 - frequent, 0, CPU)(hidden, embedding, targets)
        [gradient] = torch.autograd.grad(got, embedding)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(gradient, want_gradient)


def test_sampled_loss_is_near_the_full_one_in_expectation(problem) -> None:
    hidden, embedding, targets, frequencies = problem
    # The estimate of the normaliser is unbiased, row by row; its logarithm, the loss, is a little low (Jensen).
    want = functional_losses(full_loss, hidden, embedding, targets)
    sampled = SampledSoftmax(frequencies, 100, 50, 0, CPU)
    with torch.no_grad():
        draws = torch.stack([functional_losses(sampled, hidden[:8], embedding, targets[:8]) for _ in range(400)])
    assert (targets[:8, None] == torch.from_numpy(sampled._rare)).any(), "the rows should include a rare target"
    torch.testing.assert_close(draws.exp().mean(0), want[:8].exp(), rtol=0.03, atol=0)
    losses = [sampled(hidden, embedding, targets).item() for _ in range(200)]
    assert np.mean(losses) == pytest.approx(want.mean().item(), abs=0.03)


def functional_losses(loss, hidden: torch.Tensor, embedding: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The loss of each row alone. [N]"""
    return torch.stack([loss(hidden[i : i + 1], embedding, targets[i : i + 1]) for i in range(len(hidden))])


@pytest.mark.parametrize(("frequent", "sampled"), [(0, 10), (10, 0), (200, 101)])
def test_a_sample_that_does_not_fit_is_refused(frequent: int, sampled: int) -> None:
    with pytest.raises(ValueError, match=f"{frequent} frequent and {sampled} sampled tokens don't fit .* 300"):
        SampledSoftmax(np.ones(300), frequent, sampled, 0, CPU)


def test_learning_rate_warms_up_and_decays() -> None:
    assert learning_rate_scale(0, 0.0, warmup_steps=60) == pytest.approx(1 / 60)
    assert learning_rate_scale(60, 0.0, warmup_steps=60) == 1
    assert learning_rate_scale(60, 0.5, warmup_steps=60) == pytest.approx(0.51)
    assert learning_rate_scale(60, 1.0, warmup_steps=60) == pytest.approx(0.02)


# Runs


def test_a_run_from_nothing_learns_and_is_repeatable(prose: Path, tmp_path: Path, capsys) -> None:
    first, second, more = tmp_path / "first", tmp_path / "second", tmp_path / "more"
    run = ["--prose", str(prose), "--weight", "tales=0.5", "--tokens", "7680", "--seed", "3"]
    assert main([*run, *TINY, "--output", str(first)]) == 0, capsys.readouterr().err
    report = json.loads((first / "pretrain.json").read_text())
    assert report["tokens"] == 7_680
    assert report["steps"] == 30
    assert report["shape"] == {"layer": 1, "head": 2, "embd": 16, "positions": 32}
    assert set(report["sources"]) == set(report["held_out"]["by_source"]) == {"alice", "tales"}
    assert report["held_out"]["tokens"] == 2 * 256
    assert report["held_out"]["loss"] < 0.6 * math.log(50_257), "it should be far below that of a model at random"

    assert main([*run, *TINY, "--output", str(second)]) == 0
    assert (second / "model.safetensors").read_bytes() == (first / "model.safetensors").read_bytes()

    capsys.readouterr()
    judged = ["--prose", str(prose), "--weight", "tales=0.5", "--device", "cpu", "--seed", "3"]
    assert main([*judged, "--init-from", str(first), "--eval-only"]) == 0
    printed = capsys.readouterr().out
    assert f"held-out loss {report['held_out']['loss']:.4f} nats over 512 tokens" in printed
    assert repr(report["samples"][0]) in printed

    assert main([*judged, "--init-from", str(first), "--output", str(more), "--tokens", "1024"]) == 0
    again = json.loads((more / "pretrain.json").read_text())
    assert again["steps"] == 2
    assert again["init_from_sha256"] == hashlib.sha256((first / "model.safetensors").read_bytes()).hexdigest()
    assert again["shape"] == report["shape"]


def test_a_checkpoint_is_fp16_tied_and_loads(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(DEMO_BASE)
    model = new_model(Shape(1, 2, 16, 32), len(tokenizer), tokenizer.eos_token_id, dropout=0.1)
    save(model, tokenizer, tmp_path)
    assert model.dtype == torch.float32, "saving must leave the model being trained as it is"
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert (tmp_path / "model.safetensors").stat().st_size < 2 * parameters + 10_000, "the embedding is stored once"
    loaded = GPT2LMHeadModel.from_pretrained(tmp_path)
    assert loaded.dtype == torch.float16
    assert torch.equal(loaded.lm_head.weight, loaded.transformer.wte.weight)
    assert torch.equal(loaded.transformer.wte.weight, model.transformer.wte.weight.half())
    assert AutoTokenizer.from_pretrained(tmp_path).get_vocab() == tokenizer.get_vocab()


def test_evaluation_is_the_mean_over_every_predicted_token() -> None:
    torch.manual_seed(0)
    model = new_model(Shape(1, 2, 16, 32), vocabulary=700, eos=699, dropout=0.5)
    sources = [source("a", range(600)), source("b", range(100, 700))]
    held_out = evaluate(model, sources)
    assert model.training, "evaluation leaves dropout off for itself only"
    assert held_out.tokens == 2 * 256
    model.eval()
    ids = torch.from_numpy(np.stack(held_out_windows(sources[0].held_out, 32)))  # [8, 33]
    with torch.no_grad():
        want = model(ids[:, :-1]).logits.flatten(0, 1).log_softmax(-1).gather(1, ids[:, 1:].reshape(-1, 1))
    assert held_out.by_source["a"] == pytest.approx(-want.mean().item(), rel=1e-5)
    assert held_out.loss == pytest.approx(sum(held_out.by_source.values()) / 2)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("", "--output DIR is missing"),
        ("--eval-only", "--eval-only evaluates a checkpoint: add --init-from"),
        ("--eval-only --init-from . --minutes 3", "--minutes has no use beside --eval-only"),
        ("--output {tmp}", "is not an empty folder"),
        ("--output {tmp}/out --init-from . --layers 2", "--layers shapes a new model"),
        ("--output {tmp}/out --init-from {tmp}/missing", "missing: no tokenizer.json"),
        ("--output {tmp}/out --heads 3 --width 16", "--heads 3 doesn't divide --width 16"),
        ("--output {tmp}/out --layers 0", "--layers is 0"),
        ("--output {tmp}/out --tokens 0", "--tokens is 0"),
        ("--output {tmp}/out --muon-lr nan", "--muon-lr is nan"),
        ("--output {tmp}/out --dropout 1", "--dropout is 1.0"),
        ("--output {tmp}/out --seed -1", "--seed is -1"),
    ],
)
def test_flags_that_cannot_be_honoured_are_named(prose: Path, tmp_path: Path, capsys, flags: str, message: str) -> None:
    arguments = flags.format(tmp=tmp_path).split()
    assert main(["--prose", str(prose), "--weight", "tales=1", "--device", "cpu", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_recipe_needs_a_budget() -> None:
    with pytest.raises(ConfigError, match="--minutes or --tokens"):
        Recipe()


def test_a_loss_that_explodes_ends_the_run(prose: Path, tmp_path: Path, capsys) -> None:
    run = ["--prose", str(prose), "--weight", "tales=1", "--tokens", "25600", "--output", str(tmp_path / "out")]
    assert main([*run, *TINY, "--lr", "1e30", "--muon-lr", "1e30"]) == 2
    assert "lower --lr and --muon-lr" in capsys.readouterr().err
