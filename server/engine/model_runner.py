"""Turns a scheduled batch into tensors, runs the model and chooses tokens."""

from dataclasses import replace
from itertools import accumulate
from typing import Protocol

import torch

from adapters.adapter import Mix
from adapters.lora.native import NativeLora
from adapters.lora.packed import PackCache
from adapters.residency import Residency
from server.engine.kv_cache import KVCache
from server.engine.logprobs import prompt_logprobs
from server.engine.penalties import SamplingRow
from server.engine.sampler import sample
from server.engine.types import Batch, Sampled, Sequence
from server.model.gpt2 import GPT2, ForwardBatch, PromptChunk


class Runner(Protocol):
    """The seam between deciding and computing; tests put a toy model here."""

    def run(self, batch: Batch) -> Sampled:
        """A token for each of `batch.sampled`, and what is told of the prompts in `batch.told`, in order."""
        ...


class ModelRunner:
    """Runs batches on one GPT-2, its KV cache and the resident adapters."""

    def __init__(self, model: GPT2, kv_cache: KVCache, residency: Residency) -> None:
        self._model, self._kv, self._residency = model, kv_cache, residency
        self._device = model.device
        native = model.backend.native
        self._lora = PackCache() if native is None else NativeLora(native)

    @torch.inference_mode()
    def run(self, batch: Batch) -> Sampled:
        """Compute the batch's tokens and choose the next one of each sequence that is ready for it."""
        mixes: list[Mix] = []
        for item in batch.items:
            mixes += [self._mix(item.sequence)] * item.num_new_tokens
        lora = self._lora.batch(mixes, self._device)
        inputs = forward_batch(batch, self._device)
        for item in batch.items:
            if item.sequence.row is not None:
                self._kv.fill(item.sequence.row, item.sequence.num_computed, item.num_new_tokens)
        model, native = self._model, self._model.backend.native
        hidden = model.hidden(inputs, self._kv.k, self._kv.v, lora)  # [N, d]
        ends = accumulate(item.num_new_tokens for item in batch.items)
        told = [(i, end - i.num_new_tokens) for i, end in zip(batch.items, ends, strict=True) if i.num_told]
        prompts = prompt_logprobs(told, lambda part: model.logits(hidden[part]), native)
        if not (sampled := batch.sampled):
            return Sampled([], [], prompts=prompts)
        rows = [SamplingRow.of(sequence, model.config.eos_token_id) for sequence in sampled]
        chosen = sample(model.logits(hidden[inputs.output_index]), rows, native)
        return replace(chosen, prompts=prompts)

    def _mix(self, sequence: Sequence) -> Mix:
        return tuple((self._residency.adapter(each.ref.digest), each.weight) for each in sequence.adapters)


def forward_batch(batch: Batch, device: torch.device) -> ForwardBatch:
    """The index tensors of a batch.

    Example: a decoding sequence in row 0 at position 7, a prompt of three tokens in row 2, nothing computed yet:
    positions [7, 0, 1, 2], rows [0, 2, 2, 2], num_decode 1, one chunk (start 1, length 3), output_index [0, 3].
    """
    token_ids: list[int] = []
    positions: list[int] = []
    rows: list[int] = []
    chunks: list[PromptChunk] = []
    output_index: list[int] = []
    decode_rows: list[int] = []
    longest = 0
    for item in batch.items:
        sequence, count = item.sequence, item.num_new_tokens
        if sequence.row is None:
            raise ValueError(f"{sequence.request_id} is scheduled without a row")
        first = sequence.num_computed
        if sequence.prefilling:
            # Block by block: sums are the same however the prompt was cut.
            for done in range(0, count, block := batch.prompt_block):
                size = min(block, count - done)
                chunks.append(PromptChunk(len(token_ids) + done, size, sequence.row, first + done))
        else:
            decode_rows.append(sequence.row)
            longest = max(longest, first + 1)
        token_ids += [sequence.token_at(p) for p in range(first, first + count)]
        positions += range(first, first + count)
        rows += [sequence.row] * count
        if item.samples:
            output_index.append(len(token_ids) - 1)
    consecutive = bool(decode_rows) and decode_rows[-1] - decode_rows[0] == len(decode_rows) - 1
    return ForwardBatch(
        token_ids=torch.tensor(token_ids, device=device),
        positions=torch.tensor(positions, device=device),
        rows=torch.tensor(rows, device=device),
        num_decode=len(decode_rows),
        decode_rows=(decode_rows[0], decode_rows[-1] + 1) if consecutive else None,
        max_decode_len=longest,
        chunks=tuple(chunks),
        output_index=torch.tensor(output_index, device=device, dtype=torch.int64),
    )
