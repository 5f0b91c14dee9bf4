"""How a row's scores are changed before a token is chosen.

In order, as in transformers and vLLM: logit_bias is added; the repetition penalty, over prompt and output, divides
positive scores and multiplies others; frequency and presence penalties, over the output alone, are taken off (OpenAI's
definition); EOS is banned until there are `min_tokens`. What follows (temperature and the filters) is the sampler's.
"""

import math
from collections import Counter
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import accumulate, chain

import torch

from kernels.native import Edits
from server.engine.types import SamplingParams, Sequence


@dataclass(frozen=True)
class SamplingRow:
    """What the sampler needs to know of one row."""

    params: SamplingParams
    seen: Seq[int]  # prompt and output tokens, for the repetition penalty
    index: int  # how many tokens this request has been given
    output: Seq[int] = ()  # them, for frequency and presence penalties
    eos: int | None = None  # for min_tokens

    @classmethod
    def of(cls, sequence: Sequence, eos: int | None) -> "SamplingRow":
        """A sequence's next one."""
        params, output = sequence.request.sampling_params, sequence.output_ids
        seen: Seq[int] = ()
        if params.repetition_penalty != 1.0:
            seen = [*sequence.request.prompt_token_ids, *output]
        return cls(params, seen, len(output), output, eos)


def edited(params: SamplingParams, index: int) -> bool:
    """Whether the scores of the index-th output token change beyond the repetition penalty."""
    return bool(params.logit_bias or params.frequency_penalty or params.presence_penalty or index < params.min_tokens)


def edits(row: SamplingRow) -> dict[int, tuple[float, float]]:
    """By token: what is added to its score before the repetition penalty, and what is taken off after it."""
    params = row.params
    changes: dict[int, tuple[float, float]] = {}
    for token, bias in params.logit_bias:
        changes[token] = (changes.get(token, (0.0, 0.0))[0] + bias, 0.0)
    if params.frequency_penalty or params.presence_penalty:
        for token, count in Counter(row.output).items():
            taken = params.frequency_penalty * count + params.presence_penalty
            changes[token] = (changes.get(token, (0.0, 0.0))[0], taken)
    if row.index < params.min_tokens and row.eos is not None:
        changes[row.eos] = (0.0, math.inf)
    return changes


def pack_edits(rows: Seq[SamplingRow]) -> Edits | None:
    """All rows' edits as our CPU kernel takes them; None where there are none."""
    if not any(edited(row.params, row.index) for row in rows):
        return None
    each = [edits(row) for row in rows]
    values = [*chain.from_iterable(changes.values() for changes in each)]
    return Edits(
        torch.tensor([*chain.from_iterable(each)], dtype=torch.int64),
        torch.tensor([0, *accumulate(map(len, each))]),
        torch.tensor([added for added, _ in values], dtype=torch.float32),
        torch.tensor([taken for _, taken in values], dtype=torch.float32),
    )


def penalise(logits: torch.Tensor, rows: Seq[SamplingRow]) -> torch.Tensor:
    """The rows' scores [S, V]: `logits` itself where nothing changes, else a copy."""
    wanted = [i for i, row in enumerate(rows) if row.params.repetition_penalty != 1.0 or edits(row)]
    if not wanted:
        return logits
    scores = logits.clone()
    for i in wanted:
        row, changes = rows[i], edits(rows[i])
        ids = torch.tensor([*changes], dtype=torch.int64, device=logits.device)
        values = torch.tensor([*changes.values()], device=logits.device).view(-1, 2)
        scores[i, ids] += values[:, 0]
        if (penalty := row.params.repetition_penalty) != 1.0:
            seen = torch.tensor(sorted(set(row.seen)), device=logits.device)
            score = scores[i, seen]
            scores[i, seen] = torch.where(score < 0, score * penalty, score / penalty)
        scores[i, ids] -= values[:, 1]
    return scores
