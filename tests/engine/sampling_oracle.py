"""Transformers' logits processors, in the order in which `generate` applies them, as the truth for the sampler."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from kernels.build import library
from kernels.native import Native
from server.engine.penalties import SamplingRow
from server.engine.types import SamplingParams

BACKENDS = [None, *([Native()] if library().is_file() else [])]
VOCAB = 700  # more than the candidates that are looked at first
EOS = 7


def make_logits(rows: int, seed: int, spread: float = 3.0, vocab: int = VOCAB) -> torch.Tensor:
    return spread * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))


def row(
    seed: int = 0, index: int | None = None, seen: tuple[int, ...] = (), output: tuple[int, ...] = (), **params: Any
) -> SamplingRow:
    index = len(output) if index is None else index
    return SamplingRow(SamplingParams(seed=seed, **params), seen, index, output, EOS)


def theirs(logits: torch.Tensor, row: SamplingRow) -> torch.Tensor:
    """Every token's probability [V]."""
    params, prompt = row.params, len(row.seen) - row.index
    chain = LogitsProcessorList()
    if params.logit_bias:
        chain.append(SequenceBiasLogitsProcessor([[[token], bias] for token, bias in params.logit_bias]))
    if params.repetition_penalty != 1.0:
        chain.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    chain.append(lambda _, scores: openai_penalties(scores, params, row.output))  # which transformers lacks
    if params.min_tokens:
        chain.append(MinNewTokensLengthLogitsProcessor(prompt, params.min_tokens, EOS))
    if params.temperature:
        chain.append(TemperatureLogitsWarper(params.temperature))
    if params.top_k:
        chain.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1.0:
        chain.append(TopPLogitsWarper(params.top_p))
    if params.typical_p < 1.0:
        chain.append(TypicalLogitsWarper(params.typical_p))
    scores = chain(torch.tensor([row.seen], dtype=torch.long), logits[None].clone())[0]
    return scores.softmax(-1)


def openai_penalties(scores: torch.Tensor, params: SamplingParams, output: Sequence[int]) -> torch.Tensor:
    """mu[j] - c[j] * alpha_frequency - (c[j] > 0) * alpha_presence: OpenAI's definition. scores [1, V]"""
    scores = scores.clone()
    for token, count in Counter(output).items():
        scores[0, token] -= count * params.frequency_penalty + (count > 0) * params.presence_penalty
    return scores
