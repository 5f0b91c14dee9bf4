"""Runs batches on a GPU: decoding captured in CUDA graphs, LoRA and sampling inside; prompts launched eagerly.

A decoding step is one copy to the device, one graph, one copy back. Batches are padded to the next bucket; padding
works in a KV row of its own, on the base. Prompts are computed apart, after the decoding tokens, in the same step.
"""

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import replace
from itertools import accumulate

import torch

from adapters.adapter import Adapter, Mix
from adapters.lora.grouped import SlotLora
from adapters.residency import Residency
from kernels.gpu.lora import LoraMeta, write_meta
from kernels.gpu.sampling import choose
from server.engine.cuda_graph import Capture, Graphs, buckets
from server.engine.kv_cache import KVCache
from server.engine.logprobs import prompt_logprobs
from server.engine.penalties import SamplingRow
from server.engine.sampler import COLDEST, choose_by_torch, needs_torch, uniform, with_top_logprobs
from server.engine.step_buffers import DeviceInputs, StepInputs, StepOutputs
from server.engine.types import Batch, Sampled, ScheduledSequence, Sequence, TokenLogprobs
from server.model.gpt2 import GPT2, ForwardBatch, PromptChunk

_LEAST_RANK = 16


class DeviceRunner:
    """One GPT-2 on a GPU, its KV cache and the resident adapters."""

    def __init__(
        self, model: GPT2, kv_cache: KVCache, residency: Residency, max_batch_tokens: int, capture: Capture
    ) -> None:
        """`kv_cache` has one row more than sequences run at once: the last is the padding's."""
        self._model, self._kv, self._residency = model, kv_cache, residency
        self._padding_row = kv_cache.k.shape[1] - 1
        self._buckets = buckets(self._padding_row)
        device, vocab = model.device, model.config.vocab_size
        self._decode = StepInputs(self._buckets[-1], device)
        self._prompts = StepInputs(max_batch_tokens, device)
        self._outputs = StepOutputs(self._decode.capacity + self._padding_row, device)
        self._seen = torch.zeros(self._padding_row + 1, vocab, dtype=torch.uint8, device=device)  # for penalties
        self._logits = torch.empty(self._decode.capacity, vocab, dtype=model.dtype, device=device)  # of the last decode
        self._one = torch.ones((), dtype=torch.uint8, device=device)
        self._lora = SlotLora(residency.arena, model.config.adapter_shape, residency.slots)
        self._graphs = Graphs(capture)
        self._targets = frozenset[str]()  # projections that any adapter so far has changed: few sets, so few graphs

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Capture the base's steps and, for adapters of every projection, those of rank 16; compile the rest.

        Other sets of projections and ranks, and composed adapters, are captured when they first run.
        """
        targets = frozenset(key.target for key in self._lora.modules)
        for size in reversed(self._buckets):
            self._write([], self._decode, size)
            self._decode.upload()
            for shape in ((frozenset[str](), 0, 0), (targets, _LEAST_RANK, 1), *[(targets, 32, 1)] * (size == 1)):
                self._run_decode(size, *shape)
        self._outputs.download()

    @torch.inference_mode()
    def run(self, batch: Batch) -> Sampled:
        """Compute the batch's tokens and choose the next one of each sequence that is ready for it."""
        decoding = [item for item in batch.items if not item.prefill]
        prompts = [item for item in batch.items if item.prefill]
        for item in batch.items:
            assert item.sequence.row is not None
            self._kv.fill(item.sequence.row, item.sequence.num_computed, item.num_new_tokens)
        if decoding:
            size = next(size for size in self._buckets if size >= len(decoding))
            targets, max_rank, rounds = _shape(self._write(decoding, self._decode, size))
            self._targets |= targets
            self._decode.upload(rounds)
            self._run_decode(size, self._targets if rounds else targets, max_rank, rounds)
        logits, told = self._run_prompts(prompts) if prompts else (self._logits[:0], [])
        count = len(logits)
        # Also where nothing was sampled: when this returns the step has ended, the host's buffers may be written anew,
        # and adapters that it read may be evicted.
        tokens, logprobs = self._outputs.download()
        kept = [*range(len(decoding)), *range(self._decode.capacity, self._decode.capacity + count)]
        sampled = Sampled([tokens[i] for i in kept], [logprobs[i] for i in kept], prompts=told)
        decoded = len(decoding)
        return self._finish(
            sampled, batch.sampled, lambda i: self._logits[i] if i < decoded else logits[i - decoded]
        )  # fmt: skip

    def _finish(self, sampled: Sampled, sequences: Seq[Sequence], logits_of: Callable[[int], torch.Tensor]) -> Sampled:
        """What the graph can't do, for the rows that ask for it. logits_of: a row's logits [V]."""
        params = [sequence.request.sampling_params for sequence in sequences]
        again = [i for i, sequence in enumerate(sequences) if needs_torch(params[i], len(sequence.output_ids))]

        def some(wanted: list[int]) -> torch.Tensor:
            return torch.stack([logits_of(i) for i in wanted]).float()

        if again:
            rows = [SamplingRow.of(sequences[i], self._model.config.eos_token_id) for i in again]
            tokens, logprobs = [*sampled.token_ids], [*sampled.logprobs]
            for i, token, logprob in zip(again, *choose_by_torch(some(again), rows), strict=True):
                tokens[i], logprobs[i] = token, logprob
            sampled = replace(sampled, token_ids=tokens, logprobs=logprobs)
        return with_top_logprobs(sampled, params, some)

    def _run_decode(self, size: int, targets: frozenset[str], max_rank: int, rounds: int) -> None:
        inputs = self._decode.views(size, size, rounds)

        def work() -> None:
            _, logits = self._forward(inputs, size, (), targets, max_rank, 0)
            self._logits[:size] = logits

        self._graphs.run((size, targets, max_rank, rounds), work)

    def _run_prompts(self, items: Seq[ScheduledSequence]) -> tuple[torch.Tensor, list[TokenLogprobs]]:
        """Logits of those that are sampled, and what is told of the prompts."""
        count, samples = sum(item.num_new_tokens for item in items), sum(item.samples for item in items)
        targets, max_rank, rounds = _shape(self._write(items, self._prompts, count))
        for item in items:
            sequence, row = item.sequence, item.sequence.row
            if not sequence.num_computed and sequence.request.sampling_params.repetition_penalty != 1.0:
                assert row is not None
                self._seen[row] = 0
                self._seen[row, torch.tensor(sequence.request.prompt_token_ids, device=self._seen.device)] = 1
        self._prompts.upload(rounds)
        chunks: list[PromptChunk] = []
        start = 0
        for item in items:
            assert item.sequence.row is not None
            chunks.append(PromptChunk(start, item.num_new_tokens, item.sequence.row, item.sequence.num_computed))
            start += item.num_new_tokens
        inputs = self._prompts.views(count, samples, rounds)
        hidden, logits = self._forward(inputs, 0, chunks, targets, max_rank, self._decode.capacity)
        told = [(item, chunk.start) for item, chunk in zip(items, chunks, strict=True) if item.num_told]
        return logits, prompt_logprobs(told, lambda part: self._model.logits(hidden[part]).float())

    def _forward(
        self, inputs: DeviceInputs, num_decode: int, chunks: Seq[PromptChunk], targets: frozenset[str], max_rank: int,
        first: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """Compute and sample; the results go to the outputs from `first` on. Hidden states [N, d] and logits [S, V]."""
        batch = ForwardBatch(
            inputs.token_ids, inputs.positions, inputs.rows, num_decode, None, 0, tuple(chunks), inputs.output_index
        )
        lora = self._lora.batch([LoraMeta.of(meta) for meta in inputs.meta], targets, max_rank) if targets else None
        hidden = self._model.hidden(batch, self._kv.k, self._kv.v, lora)
        logits = self._model.logits(hidden[inputs.output_index])
        samples = len(inputs.output_index)
        if num_decode:  # each brings the token that was chosen for it last; before sampling, which may run again
            self._seen.index_put_((inputs.rows, inputs.token_ids), self._one)
        if samples:
            choose(
                logits, self._seen, inputs.sample_rows, inputs.penalty, inputs.temperature, inputs.top_k, inputs.top_p,
                inputs.uniform, inputs.wanted, torch.empty(logits.shape, device=logits.device),
                self._outputs.tokens[first : first + samples], self._outputs.logprobs[first : first + samples],
            )  # fmt: skip
        return hidden, logits

    def _write(self, items: Seq[ScheduledSequence], inputs: StepInputs, size: int) -> list[Mix]:
        """Fill the host's arrays for `size` tokens; what is left over after the items is padding. Their adapters."""
        vocab, padding_row = self._model.config.vocab_size, self._padding_row
        tokens = [
            (sequence := item.sequence, sequence.num_computed + i) for item in items for i in range(item.num_new_tokens)
        ]
        digests = dict.fromkeys(digest for item in items for digest in item.sequence.digests)
        adapters = {digest: self._adapter(digest) for digest in digests}
        ends = accumulate(item.num_new_tokens for item in items)
        sampled = [(end - 1, item.sequence) for end, item in zip(ends, items, strict=True) if item.samples]
        params = [sequence.request.sampling_params for _, sequence in sampled]
        draws = [
            uniform(p.seed, len(sequence.output_ids)) if p.temperature else 0.0
            for p, (_, sequence) in zip(params, sampled, strict=True)
        ]
        columns: dict[str, tuple[Seq[float | None], float]] = {  # and what pads them
            "token_ids": ([sequence.token_at(position) for sequence, position in tokens], 0),
            "positions": ([position for _, position in tokens], 0),
            "rows": ([sequence.row for sequence, _ in tokens], padding_row),
            "output_index": ([*(index for index, _ in sampled), *range(len(tokens), size)], 0),
            "sample_rows": ([sequence.row for _, sequence in sampled], padding_row),
            "top_k": ([p.top_k or vocab for p in params], vocab),
            "wanted": ([p.logprobs for p in params], 0),
            "uniform": (draws, 0),
            "temperature": ([max(p.temperature, COLDEST) if p.temperature else 0.0 for p in params], 0),
            "top_p": ([p.top_p for p in params], 1),
            "penalty": ([p.repetition_penalty for p in params], 1),
        }
        for name, (values, padding) in columns.items():
            column = inputs.host[name]
            column[: len(values)] = values
            column[len(values) : size] = padding
        for number in range(max((len(item.sequence.adapters) for item in items), default=0)):
            turn = [s.adapters[number : number + 1] for s, _ in tokens]  # each token's adapter in this round, if any
            slots = [adapters[each[0].ref.digest][0] if each else 0 for each in turn]
            write_meta(slots, [each[0].weight if each else 0.0 for each in turn], inputs.host_meta(number, size))
        return [tuple((adapters[each.ref.digest][1], each.weight) for each in i.sequence.adapters) for i in items]

    def _adapter(self, digest: str) -> tuple[int, Adapter]:
        slot, adapter = self._residency.slot(digest), self._residency.adapter(digest)
        self._lora.publish(slot, adapter)
        return slot, adapter


def _shape(mixes: Seq[Mix]) -> tuple[frozenset[str], int, int]:
    """What the launches depend on: the projections that any adapter changes, a bound of their ranks, and how many one
    row has at most."""
    adapters = {adapter for mix in mixes for adapter, _ in mix}
    rank = max((adapter.max_rank for adapter in adapters), default=0)
    bound = max(_LEAST_RANK, 1 << (rank - 1).bit_length()) if rank else 0
    targets = frozenset(target for adapter in adapters for target in adapter.targets)
    return targets, bound, max(map(len, mixes), default=0)
