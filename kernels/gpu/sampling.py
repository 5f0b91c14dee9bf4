"""The next token of each row on the device, by the contract of kernels/native.py. Knows nothing of requests.

w = exp((scores - max) / temperature) is fp32 and 0 or more, so that its bits order as it does: the limits of top-k and
top-p are found by bisection on the bits, WAYS thresholds a pass, until one token lies between the bounds. Nothing is
sorted. One program does a row, and rows that want neither limit skip those passes.

Masses are summed in fp32 for each lane, at most V / block terms, and in fp64 across lanes. A lane's errors are of
either sign and average out over thousands of lanes: about 1e-9 of the whole, for a quarter of the cost of fp64. The
draw's running sum is fp64 throughout.
"""

import torch
import triton
import triton.language as tl

_BLOCK = 2048
_WAYS = 4


def choose(
    logits: torch.Tensor, seen: torch.Tensor, rows: torch.Tensor, penalty: torch.Tensor, temperature: torch.Tensor,
    top_k: torch.Tensor, top_p: torch.Tensor, uniform: torch.Tensor, wanted: torch.Tensor, weights: torch.Tensor,
    tokens: torch.Tensor, logprobs: torch.Tensor, block: int = _BLOCK,
) -> None:  # fmt: skip
    """Write each row's next token, -1 if its logits hold NaN or their largest is infinite.

    Run twice on the same inputs it does the same: `seen` is only read.

    logits [S, V] fp32, bf16 or fp16, rows contiguous; seen [kv_rows, V] uint8, 1 where the repetition penalty applies;
    rows [S] int64, each row's row of `seen`; penalty [S] fp32, 1 is off: positive scores divided by it, others
    multiplied; temperature [S] fp32, 0 is greedy, the lowest id among equals; top_k [S] int64, V or more is off, what
    equals the k-th is kept too; top_p [S] fp32, 1 or more is off, by the mass of better tokens, equals in order of id;
    uniform [S] fp64 in [0, 1); wanted [S] int64, 0 or 1. weights: scratch [S, V] fp32.
    Writes tokens [S] int64, and logprobs [S] fp32: log-softmax of the logits at the token where wanted, else 0.
    """
    s, vocab = logits.shape
    if s:
        _choose[s,](
            logits, seen, rows, penalty, temperature, top_k, top_p, uniform, wanted, weights, tokens, logprobs,
            logits.stride(0), weights.stride(0), VOCAB=vocab, BLOCK=min(block, triton.next_power_of_2(vocab)),
            WAYS=_WAYS, num_warps=16,
        )  # fmt: skip


@triton.jit
def _scores(
    logits: tl.tensor, seen: tl.tensor, penalty: tl.tensor, ids: tl.tensor, VOCAB: tl.constexpr
):  # fmt: skip
    """A block's logits in fp32, -inf beyond the vocabulary, and the same after the penalty."""
    x = tl.load(logits + ids, mask=ids < VOCAB, other=-float("inf")).to(tl.float32)
    marked = tl.load(seen + ids, mask=ids < tl.where(penalty != 1.0, VOCAB, 0), other=0) != 0
    return x, tl.where(marked, tl.where(x > 0, tl.div_rn(x, penalty), x * penalty), x)


@triton.jit
def _pick(values: tl.tensor, index: tl.tensor, WAYS: tl.constexpr):
    """values [WAYS] at `index`."""
    return tl.sum(tl.where(tl.arange(0, WAYS) == index, values, 0), axis=0)


@triton.jit
def _threshold(
    weights: tl.tensor, low: tl.tensor, n_low: tl.tensor, m_low: tl.tensor, most: tl.tensor, enough: tl.tensor,
    VOCAB: tl.constexpr, BLOCK: tl.constexpr, WAYS: tl.constexpr,
):  # fmt: skip
    """Bits such that the tokens of at least as much weight are the fewest that number `most` or weigh `enough`.

    Returns (bits, their number, their mass, ties, mass above the ties). `low`, `n_low` and `m_low` are bits that reach
    the limit, to begin with. If `ties` is more than 1, so many tokens weigh exactly what the bits say.
    """
    high = tl.full((), 0x3F800001, tl.int32)  # above 1, the heaviest
    n_high = tl.full((), 0, tl.int32)
    m_high = tl.full((), 0.0, tl.float64)
    while (high - low > 1) & (n_low - n_high > 1):
        step = tl.maximum((high - low) // (WAYS + 1), 1)
        t = low + step * (1 + tl.arange(0, WAYS))
        numbers = tl.zeros((WAYS, BLOCK), tl.int32)
        masses = tl.zeros((WAYS, BLOCK), tl.float32)
        for start in range(0, VOCAB, BLOCK):
            ids = start + tl.arange(0, BLOCK)
            w = tl.load(weights + ids, mask=ids < VOCAB, other=0.0)
            heavy = (w.to(tl.int32, bitcast=True)[None, :] >= t[:, None]) & (ids < VOCAB)[None, :]
            numbers += heavy.to(tl.int32)
            masses += tl.where(heavy, w[None, :], 0.0)
        n = tl.sum(numbers, axis=1)
        m = tl.sum(masses.to(tl.float64), axis=1)
        reached = tl.sum(((t < high) & ((n >= most) | (m >= enough))).to(tl.int32), axis=0)
        above = _pick(t, reached, WAYS)
        if (reached < WAYS) & (above < high):
            high, n_high, m_high = above, _pick(n, reached, WAYS), _pick(m, reached, WAYS)
        if reached > 0:
            low, n_low, m_low = low + step * reached, _pick(n, reached - 1, WAYS), _pick(m, reached - 1, WAYS)
    return low, n_low, m_low, n_low - n_high, m_high


@triton.jit
def _kept(
    weights: tl.tensor, low: tl.tensor, last_tie: tl.tensor, ids: tl.tensor, VOCAB: tl.constexpr, COUNT: tl.constexpr
):  # fmt: skip
    """A block's weights in fp64: of tokens above `low`, and of those equal to it up to id `last_tie`.

    With COUNT, 1 for each that equals it.
    """
    w = tl.load(weights + ids, mask=ids < VOCAB, other=0.0)
    bits = w.to(tl.int32, bitcast=True)
    if COUNT:
        return ((bits == low) & (ids < VOCAB)).to(tl.float64)
    return tl.where((bits > low) | ((bits == low) & (ids <= last_tie)), w, 0.0).to(tl.float64)


@triton.jit
def _first_past(
    weights: tl.tensor, low: tl.tensor, last_tie: tl.tensor, target: tl.tensor, VOCAB: tl.constexpr,
    BLOCK: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """The first token at which the running sum of `_kept` passes `target`, or the last that adds to it.

    Rounding may carry the target past the end.
    """
    start = tl.full((), 0, tl.int32)
    before = tl.full((), 0.0, tl.float64)
    block = start
    base = before
    found = start
    while (start < VOCAB) & (found == 0):
        mass = tl.sum(_kept(weights, low, last_tie, start + tl.arange(0, BLOCK), VOCAB, COUNT), axis=0)
        if mass > 0:
            block, base = start, before
        before += mass
        found = (before > target).to(tl.int32)
        start += BLOCK
    ids = block + tl.arange(0, BLOCK)
    mass = _kept(weights, low, last_tie, ids, VOCAB, COUNT)
    first = tl.min(tl.where((mass > 0) & (base + tl.cumsum(mass, axis=0) > target), ids, VOCAB), axis=0)
    return tl.where(first < VOCAB, first, tl.max(tl.where(mass > 0, ids, 0), axis=0))


@triton.jit
def _draw(
    weights: tl.tensor, total: tl.tensor, k: tl.tensor, p: tl.tensor, uniform: tl.tensor, VOCAB: tl.constexpr,
    BLOCK: tl.constexpr, WAYS: tl.constexpr,
):  # fmt: skip
    """A token of those that top-k, then top-p leave, by the inverse transform of `uniform`. total: of all weights."""
    low, n = tl.full((), 0, tl.int32), tl.full((), VOCAB, tl.int32)
    last_tie = tl.full((), VOCAB, tl.int32)
    if k < VOCAB:
        low, n, total, _, _ = _threshold(weights, low, n, total, k, float("inf"), VOCAB, BLOCK, WAYS)
    if p < 1.0:
        enough = p.to(tl.float64) * total
        low, n, total, ties, above = _threshold(weights, low, n, total, VOCAB + 1, enough, VOCAB, BLOCK, WAYS)
        if ties > 1:
            each = low.to(tl.float32, bitcast=True).to(tl.float64)
            kept = tl.minimum(tl.maximum(tl.ceil((enough - above) / each), 1.0), ties.to(tl.float64))
            last_tie = _first_past(weights, low, last_tie, kept - 0.5, VOCAB, BLOCK, True)
            total = above + kept * each
    return _first_past(weights, low, last_tie, uniform * total, VOCAB, BLOCK, False)


@triton.jit
def _choose(
    logits: tl.tensor, seen: tl.tensor, rows: tl.tensor, penalties: tl.tensor, temperatures: tl.tensor,
    top_k: tl.tensor, top_p: tl.tensor, uniform: tl.tensor, wanted: tl.tensor, weights: tl.tensor, tokens: tl.tensor,
    logprobs: tl.tensor, logits_stride: tl.tensor, weights_stride: tl.tensor, VOCAB: tl.constexpr, BLOCK: tl.constexpr,
    WAYS: tl.constexpr,
):  # fmt: skip
    """One row: `choose`."""
    s = tl.program_id(0).to(tl.int64)
    logits += s * logits_stride
    weights += s * weights_stride
    seen += tl.load(rows + s) * VOCAB
    penalty, temperature = tl.load(penalties + s), tl.load(temperatures + s)
    lane = tl.arange(0, BLOCK)
    raw_best = tl.full((BLOCK,), -float("inf"), tl.float32)
    best = raw_best
    best_id = tl.zeros((BLOCK,), tl.int32)
    odd = best_id
    for start in range(0, VOCAB, BLOCK):
        x, score = _scores(logits, seen, penalty, start + lane, VOCAB)
        odd += (x != x).to(tl.int32)
        raw_best = tl.where(x > raw_best, x, raw_best)
        best_id = tl.where(score > best, start + lane, best_id)
        best = tl.where(score > best, score, best)
    raw_top, top = tl.max(raw_best, axis=0), tl.max(best, axis=0)
    token = tl.min(tl.where(best == top, best_id, VOCAB), axis=0)
    sane = (tl.sum(odd, axis=0) == 0) & (raw_top > -float("inf")) & (raw_top < float("inf"))
    if sane & (temperature > 0):
        sums = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, VOCAB, BLOCK):
            x, score = _scores(logits, seen, penalty, start + lane, VOCAB)
            w = tl.exp(tl.div_rn(score - top, temperature))
            w = tl.where(w == w, w, 0.0)  # what isn't a number is never drawn
            tl.store(weights + start + lane, w, mask=start + lane < VOCAB)
            sums += w
        tl.debug_barrier()  # other threads may read these weights than wrote them
        token = _draw(
            weights, tl.sum(sums.to(tl.float64), axis=0), tl.load(top_k + s), tl.load(top_p + s), tl.load(uniform + s),
            VOCAB, BLOCK, WAYS,
        )  # fmt: skip
    logprob = tl.full((), 0.0, tl.float32)
    if sane & (tl.load(wanted + s) != 0):
        sums = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, VOCAB, BLOCK):
            x, _ = _scores(logits, seen, penalty, start + lane, VOCAB)
            sums += tl.exp(x - raw_top)
        log_sum = tl.log(tl.sum(sums.to(tl.float64), axis=0).to(tl.float32))
        logprob = tl.load(logits + token).to(tl.float32) - raw_top - log_sum
    tl.store(tokens + s, tl.where(sane, token, -1).to(tl.int64))
    tl.store(logprobs + s, logprob)
