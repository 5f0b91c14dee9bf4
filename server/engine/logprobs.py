"""Log-softmax of raw logits, at given tokens and at the best ones. A row's results don't depend on the other rows."""

import math
from collections.abc import Callable
from collections.abc import Sequence as Seq

import torch

from kernels.native import Native
from server.engine.types import ScheduledSequence, TokenLogprobs, TopTokens

BLOCK = 32
"""How many of a prompt's positions have logits at once."""


def logprobs_at(
    logits: torch.Tensor, tokens: Seq[int], counts: Seq[int], native: Native | None = None
) -> TokenLogprobs:
    """Of a token of each row, and of so many best ones, best first, equals by id; by our CPU kernel if given.

    A token that is among the best has the same number there, bit for bit. logits [S, V] fp32 contiguous.
    """
    vocab = logits.shape[-1]
    counts = [min(count, vocab) for count in counts]
    if native is not None:
        found = native.logprobs(logits, torch.tensor(tokens), torch.tensor(counts))
    else:
        found = _by_torch(logits, tokens, max(counts, default=0))
    logprobs, ids, best = (part.numpy() for part in found)
    tops: list[TopTokens] = []
    for at, row, values in zip(range(len(tokens)), ids, best, strict=True):
        count = 0 if math.isnan(logprobs[at]) else counts[at]
        tops.append(tuple((int(row[i]), float(values[i])) for i in range(count)))
    return TokenLogprobs([float(logprob) for logprob in logprobs], tops)


def prompt_logprobs(
    chunks: Seq[tuple[ScheduledSequence, int]],
    logits_of: Callable[[slice], torch.Tensor],
    native: Native | None = None,
) -> list[TokenLogprobs]:
    """Of the next prompt token at each of `num_told` positions of each chunk, BLOCK positions at a time.

    chunks: each one and its first token in the flat batch; logits_of: logits [n, V] fp32 of a slice of it.
    """
    results: list[TokenLogprobs] = []
    for item, start in chunks:
        sequence, logprobs, tops = item.sequence, list[float](), list[TopTokens]()
        count = sequence.request.sampling_params.top_logprobs
        for done in range(0, item.num_told, BLOCK):
            size = min(BLOCK, item.num_told - done)
            first = sequence.num_computed + done + 1
            tokens = sequence.request.prompt_token_ids[first : first + size]
            told = logprobs_at(logits_of(slice(start + done, start + done + size)), tokens, [count] * size, native)
            logprobs += told.logprobs
            tops += told.top_logprobs
        results.append(TokenLogprobs(logprobs, tops))
    return results


def _by_torch(logits: torch.Tensor, tokens: Seq[int], most: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As Native.logprobs, `most` best ones for each row."""
    log_sum = logits.logsumexp(-1, keepdim=True)
    log_sum[logits.isnan().any(-1) | logits.amax(-1).isinf()] = math.nan
    chosen = logits.gather(1, torch.tensor(tokens, device=logits.device)[:, None])
    values, ids = best_of(logits, most)
    # One copy to the host; a float64 holds every token id exactly.
    packed = torch.cat([(chosen - log_sum).double(), ids.double(), (values - log_sum).double()], dim=1).cpu()
    return packed[:, 0], packed[:, 1 : 1 + most], packed[:, 1 + most :]


def best_of(values: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest of each row and their places, largest first, equals by place. [S, V] fp32 -> [S, count] twice."""
    vocab = values.shape[-1]
    bits = (values + 0.0).view(torch.int32)  # no -0, which would come after 0
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()  # as the numbers are
    keys = (ordered << 32) + torch.arange(vocab - 1, -1, -1, device=values.device)
    ids = vocab - 1 - (keys.topk(count, dim=-1).values & 0xFFFFFFFF)
    return values.gather(1, ids), ids
