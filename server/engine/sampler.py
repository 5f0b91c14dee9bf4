"""Chooses each row's next token. Rows are independent: a request's tokens don't depend on who else is in the batch.

Processing follows `transformers`: penalties (`penalties.py`), temperature, top-k, top-p, typical-p. The vocabulary is
never sorted: our CPU kernel finds the limits with a histogram; torch works on the top candidates, and takes more of
them until they hold top-p's mass. Each request has its own random stream, one uniform number per token from its seed
and the token's index; it draws from the tokens that are left in order of id.
"""

import math
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import replace
from itertools import accumulate, chain

import torch

from kernels.native import Native
from server.engine.logprobs import logprobs_at
from server.engine.penalties import SamplingRow, edited, pack_edits, penalise
from server.engine.types import BANNED, DIVERGED, Sampled, SamplingParams, TopTokens

_FIRST_CANDIDATES = 64
COLDEST = 1e-30  # greedy already; less would overflow
_MASK = (1 << 64) - 1


def sample(logits: torch.Tensor, rows: Seq[SamplingRow], native: Native | None = None) -> Sampled:
    """Choose a token for each row, with our CPU kernel if given. logits [S, V] fp32 contiguous, not changed."""
    tokens, logprobs = choose_by_torch(logits, rows) if native is None else _choose_natively(native, logits, rows)

    def logits_of(wanted: list[int]) -> torch.Tensor:
        return logits if len(wanted) == len(logits) else logits[wanted]

    return with_top_logprobs(Sampled(tokens, logprobs), [row.params for row in rows], logits_of, native)


def with_top_logprobs(
    sampled: Sampled, params: Seq[SamplingParams], logits_of: Callable[[list[int]], torch.Tensor],
    native: Native | None = None,
) -> Sampled:  # fmt: skip
    """The same, with the best tokens' logprobs where they are asked for. logits_of: logits [n, V] fp32 of some rows."""
    counts = [p.top_logprobs if p.logprobs else 0 for p in params]
    wanted = [i for i, count in enumerate(counts) if count and sampled.token_ids[i] >= 0]
    if not wanted:
        return sampled
    token_ids = [sampled.token_ids[i] for i in wanted]
    told = logprobs_at(logits_of(wanted), token_ids, [counts[i] for i in wanted], native)
    logprobs, tops = [*sampled.logprobs], [TopTokens()] * len(params)
    for i, logprob, top in zip(wanted, told.logprobs, told.top_logprobs, strict=True):
        logprobs[i], tops[i] = logprob, top  # of one sum, so that they are equal bit for bit where the token is
    return replace(sampled, logprobs=logprobs, top_logprobs=tops)


def choose_by_torch(logits: torch.Tensor, rows: Seq[SamplingRow]) -> tuple[list[int], list[float]]:
    """Each row's token, or DIVERGED or BANNED, and its logprob where asked for, else 0. logits [S, V] fp32."""
    tokens = torch.empty(len(rows), dtype=torch.int64, device=logits.device)
    scores = penalise(logits, rows)
    greedy = [i for i, row in enumerate(rows) if row.params.temperature == 0]
    drawn = [i for i, row in enumerate(rows) if row.params.temperature > 0]
    typical = [i for i in drawn if rows[i].params.typical_p < 1]
    filtered = [i for i in drawn if rows[i].params.typical_p >= 1 and _filtered(rows[i].params)]
    full = [i for i in drawn if rows[i].params.typical_p >= 1 and not _filtered(rows[i].params)]
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
    for i in typical:
        probs = typical_probabilities(_scaled(scores, rows, [i]), rows[i].params)
        tokens[i] = _pick(probs, [rows[i]])[0]
    logprobs = torch.zeros(len(rows), device=logits.device)
    wanted = [i for i, row in enumerate(rows) if row.params.logprobs]
    if wanted:
        raw = logits[wanted]
        logprobs[wanted] = raw.gather(1, tokens[wanted, None])[:, 0] - raw.logsumexp(-1)
    for stands_for, odd in ((BANNED, _odd(scores)), (DIVERGED, _odd(logits))):
        tokens[odd], logprobs[odd] = stands_for, 0.0
    # One copy to the host; a float64 holds every token id exactly.
    packed = torch.stack([tokens.double(), logprobs.double()]).cpu().numpy()
    return [int(t) for t in packed[0]], [float(p) for p in packed[1]]


def _choose_natively(native: Native, logits: torch.Tensor, rows: Seq[SamplingRow]) -> tuple[list[int], list[float]]:
    vocab, params = logits.shape[-1], [row.params for row in rows]
    edits = pack_edits(rows)
    seen = [row.seen if row.params.repetition_penalty != 1.0 else () for row in rows]
    if edits is not None:
        seen = [set(tokens) for tokens in seen]
    typical = any(p.typical_p < 1 for p in params)
    return native.choose(
        logits,
        torch.tensor([p.repetition_penalty for p in params]),
        torch.tensor([*chain.from_iterable(seen)], dtype=torch.int64),
        torch.tensor([0, *accumulate(map(len, seen))]),
        torch.tensor([max(p.temperature, COLDEST) if p.temperature else 0.0 for p in params]),
        torch.tensor([min(p.top_k or vocab, vocab) for p in params]),
        torch.tensor([max(p.top_p, COLDEST) for p in params]),
        torch.tensor([uniform(row.params.seed, row.index) for row in rows], dtype=torch.float64),
        torch.tensor([int(p.logprobs and not p.top_logprobs) for p in params]),
        torch.tensor([p.typical_p for p in params]) if typical else None,
        edits,
    )


def needs_torch(params: SamplingParams, index: int) -> bool:
    """Whether the GPU's kernel can't choose the index-th output token."""
    return edited(params, index) or params.typical_p < 1


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


def typical_probabilities(scores: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """What top-k, top-p and then typical-p leave of one row: probabilities [1, V], 0 where a token is left out.

    scores [1, V], temperature applied. Of the tokens by how near their surprise lies to the expected one, as many as
    hold `typical_p`, and what is as near as the last (Meister et al. 2022).
    """
    if _filtered(params):
        ids, probs = candidates(scores, [params])
        kept = torch.zeros_like(scores, dtype=torch.bool).scatter(1, ids, probs > 0)
        scores = scores.masked_fill(~kept, -math.inf)
    logs = scores.log_softmax(-1)
    expected = -(logs * logs.exp()).nansum(-1, keepdim=True)
    far, order = (-logs - expected).abs().sort(-1)
    held = logs.gather(1, order).exp().cumsum(-1)
    last = (held < params.typical_p).sum(-1, keepdim=True).clamp(max=scores.shape[-1] - 1)
    near = torch.zeros_like(scores, dtype=torch.bool).scatter(1, order, far <= far.gather(1, last))
    return scores.masked_fill(~near, -math.inf).softmax(-1)


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


def _odd(scores: torch.Tensor) -> torch.Tensor:
    """Rows [S] that hold NaN or whose largest is infinite."""
    return scores.isnan().any(-1) | scores.amax(-1).isinf()


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
