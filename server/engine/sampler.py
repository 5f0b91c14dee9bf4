"""Chooses each row's next token. Rows are independent: a request's tokens don't depend on who else is in the batch.

Processing follows `transformers`: repetition penalty, temperature, top-k, top-p. The vocabulary is never sorted: our
CPU kernel finds the limits with a histogram; torch works on the top candidates, and takes more of them until they hold
top-p's mass. Each request has its own random stream, one uniform number per token from its seed and the token's index;
it draws from the tokens that are left in order of id.
"""

import math
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import accumulate, chain

import torch

from kernels.native import Native
from server.engine.types import DIVERGED, SamplingParams

_FIRST_CANDIDATES = 64
COLDEST = 1e-30  # greedy already; less would overflow
_MASK = (1 << 64) - 1


@dataclass(frozen=True)
class SamplingRow:
    """What the sampler needs to know of one row."""

    params: SamplingParams
    seen: Seq[int]  # prompt and output tokens, for the repetition penalty
    index: int  # how many tokens this request has been given


@dataclass(frozen=True)
class Sampled:
    """One step's choice: tokens [S], and log-softmax of the raw logits for the rows that asked, else 0.

    A row with NaN, or whose largest logit is infinite, has the token DIVERGED.
    """

    token_ids: list[int]
    logprobs: list[float]


def sample(logits: torch.Tensor, rows: Seq[SamplingRow], native: Native | None = None) -> Sampled:
    """Choose a token for each row, with our CPU kernel if given. logits [S, V] fp32 contiguous, not changed."""
    if native is not None:
        return _sample_natively(native, logits, rows)
    tokens = torch.empty(len(rows), dtype=torch.int64, device=logits.device)
    scores = penalise(logits, rows)
    greedy = [i for i, row in enumerate(rows) if row.params.temperature == 0]
    full = [i for i, row in enumerate(rows) if row.params.temperature > 0 and not _filtered(row.params)]
    filtered = [i for i, row in enumerate(rows) if row.params.temperature > 0 and _filtered(row.params)]
    if greedy:
        tokens[greedy] = scores[greedy].argmax(-1)
    if full:
        probs = _scaled(scores, rows, full).softmax(-1)
        tokens[full] = _pick(probs, [rows[i] for i in full])
    if filtered:
        ids, probs = candidates(_scaled(scores, rows, filtered), [rows[i].params for i in filtered])
        ids, by_id = ids.sort(-1)  # tokens are drawn in order of id, filtered or not
        probs = probs.gather(1, by_id)
        picked = _pick(probs, [rows[i] for i in filtered])
        tokens[filtered] = ids.gather(1, picked[:, None])[:, 0]
    logprobs = torch.zeros(len(rows), device=logits.device)
    wanted = [i for i, row in enumerate(rows) if row.params.logprobs]
    if wanted:
        raw = logits[wanted]
        logprobs[wanted] = raw.gather(1, tokens[wanted, None])[:, 0] - raw.logsumexp(-1)
    diverged = logits.isnan().any(-1) | logits.amax(-1).isinf()
    tokens[diverged], logprobs[diverged] = DIVERGED, 0.0
    # One copy to the host; a float64 holds every token id exactly.
    packed = torch.stack([tokens.double(), logprobs.double()]).cpu().numpy()
    return Sampled([int(t) for t in packed[0]], [float(p) for p in packed[1]])


def _sample_natively(native: Native, logits: torch.Tensor, rows: Seq[SamplingRow]) -> Sampled:
    vocab, params = logits.shape[-1], [row.params for row in rows]
    seen = [row.seen if row.params.repetition_penalty != 1.0 else () for row in rows]
    tokens, logprobs = native.choose(
        logits,
        torch.tensor([p.repetition_penalty for p in params]),
        torch.tensor([*chain.from_iterable(seen)], dtype=torch.int64),
        torch.tensor([0, *accumulate(map(len, seen))]),
        torch.tensor([max(p.temperature, COLDEST) if p.temperature else 0.0 for p in params]),
        torch.tensor([p.top_k or vocab for p in params]),
        torch.tensor([max(p.top_p, COLDEST) for p in params]),
        torch.tensor([uniform(row.params.seed, row.index) for row in rows], dtype=torch.float64),
        torch.tensor([int(p.logprobs) for p in params]),
    )
    return Sampled(tokens, logprobs)


def penalise(logits: torch.Tensor, rows: Seq[SamplingRow]) -> torch.Tensor:
    """Apply each row's repetition penalty: positive scores of seen tokens divided by it, negative ones multiplied.

    Returns `logits` itself when no row has one, else a copy. [S, V]
    """
    wanted = [i for i, row in enumerate(rows) if row.params.repetition_penalty != 1.0]
    if not wanted:
        return logits
    scores = logits.clone()
    for i in wanted:
        penalty = rows[i].params.repetition_penalty
        seen = torch.tensor(sorted(set(rows[i].seen)), device=logits.device)
        values = scores[i, seen]
        scores[i, seen] = torch.where(values < 0, values * penalty, values / penalty)
    return scores


def candidates(scores: torch.Tensor, params: Seq[SamplingParams]) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens that top-k and top-p leave in each row, best first, and their probabilities.

    scores [S, V], temperature applied. Returns ids [S, C] and probabilities [S, C]: 0 where a token is left out.
    """
    vocab = scores.shape[-1]
    ks = [p.top_k if 0 < p.top_k < vocab else vocab for p in params]
    top_k = torch.tensor(ks, device=scores.device)[:, None]
    top_p = torch.tensor([p.top_p if p.top_p < 1 else math.inf for p in params], device=scores.device)[:, None]
    log_total = scores.logsumexp(-1, keepdim=True)
    width = min(vocab, max([_FIRST_CANDIDATES, *(k + 1 for k in ks if k < vocab)]))
    while True:
        values, ids = scores.topk(width, dim=-1)
        # What equals the k-th best is kept too, as in transformers.
        kept = values >= values.gather(1, (top_k - 1).clamp(max=width - 1))
        # With top-k on, the mass is that of the k best; otherwise of the whole vocabulary.
        limited = values.masked_fill(~kept, float("-inf"))
        total = torch.where(top_k < vocab, limited.logsumexp(-1, keepdim=True), log_total)
        probs = (limited - total).exp()
        keep = kept & (probs.cumsum(-1) - probs < top_p)  # by the mass of the better candidates
        keep[:, 0] = True
        # Enough when a worse candidate than the last one kept is in sight: nothing kept lies beyond, not even a tie.
        if width == vocab or bool((values.masked_fill(~keep, math.inf).amin(-1) > values[:, -1]).all()):
            break
        width = min(vocab, width * 8)
    probs = probs * keep
    return _ties_by_id(values, ids), probs / probs.sum(-1, keepdim=True)


def _ties_by_id(values: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """`ids` with those of equal values ascending: `topk` orders them differently for every number of candidates."""
    ids, by_id = ids.sort(-1)
    _, order = values.gather(1, by_id).sort(dim=-1, descending=True, stable=True)
    return ids.gather(1, order)


def uniform(seed: int, index: int) -> float:
    """The index-th number in [0, 1) of a seed's stream (SplitMix64, Steele et al. 2014)."""
    state = (_mix(seed & _MASK) + (index + 1) * 0x9E3779B97F4A7C15) & _MASK
    return (_mix(state) >> 11) * 2.0**-53


def _mix(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def _filtered(params: SamplingParams) -> bool:
    return params.top_k > 0 or params.top_p < 1.0


def _scaled(scores: torch.Tensor, rows: Seq[SamplingRow], chosen: list[int]) -> torch.Tensor:
    temperature = torch.tensor([rows[i].params.temperature for i in chosen], device=scores.device)
    return scores[chosen] / temperature[:, None].clamp(min=COLDEST)


def _pick(probs: torch.Tensor, rows: Seq[SamplingRow]) -> torch.Tensor:
    """Inverse transform: the first index whose cumulative probability exceeds the row's uniform number. [S]"""
    u = torch.tensor([uniform(row.params.seed, row.index) for row in rows], device=probs.device, dtype=torch.float64)
    cumulative = probs.double().cumsum(-1)
    picked = torch.searchsorted(cumulative, (u * cumulative[:, -1])[:, None], right=True)[:, 0]
    # Rounding may carry u past the end: the last token that has any probability then.
    last = probs.shape[-1] - 1 - (probs.flip(-1) > 0).int().argmax(-1)
    return torch.minimum(picked, last)
