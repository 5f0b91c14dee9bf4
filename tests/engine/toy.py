"""An engine with a toy model and adapters that load when the test says so."""

import threading
import time
from collections.abc import Callable
from dataclasses import replace

import torch

from adapters.adapter import Adapter, AdapterRef, LoraPair, ModuleKey, WeightedAdapter
from adapters.arena import Arena
from adapters.golden import Golden
from adapters.residency import Residency
from server.engine.config import EngineConfig
from server.engine.engine import Engine
from server.engine.types import Batch, Sampled, Sequence, SequenceOutput, TokenLogprobs, TopTokens
from tests.oracle import request, run

EOS = 99
VOCAB = [bytes([97 + i % 26]) for i in range(EOS)] + [b"<end>"]  # token 0 is "a", 1 is "b"


CPU = torch.device("cpu")
ADAPTER_BYTES = 256  # of a toy adapter: two matrices of 32 numbers


def toy_adapter(digest: str) -> Adapter:
    """An adapter that takes ADAPTER_BYTES and means nothing."""
    return Adapter(digest, {ModuleKey(0, "attn.c_attn"): LoraPair(torch.ones(1, 32), torch.ones(1, 32))})


class ToyRunner:
    """Says a, b, c, ... for every sequence (`say` may say otherwise) and keeps every batch."""

    def __init__(self) -> None:
        self.batches: list[Batch] = []
        self.say: Callable[[Sequence], int] = lambda sequence: len(sequence.output_ids) % 26
        self.fail: Exception | None = None
        self.prompt_logprob = -1.5  # of every prompt token
        self.best: TopTokens = ((3, -0.25),)  # of every output token

    def run(self, batch: Batch) -> Sampled:
        self.batches.append(batch)
        for item in batch.items:
            assert item.sequence.num_computed + item.num_new_tokens <= item.sequence.num_tokens
        if self.fail is not None:
            error, self.fail = self.fail, None
            raise error
        tokens = [self.say(sequence) for sequence in batch.sampled]
        prompts = [
            TokenLogprobs([self.prompt_logprob] * item.num_told, [((7, -1.25),)] * item.num_told) for item in batch.told
        ]
        return Sampled(tokens, [-0.5] * len(tokens), [self.best] * len(tokens), prompts)


class Toy:
    """An engine over the toy; adapters load at once unless `gates` holds an event for them."""

    def __init__(self, resident: int = 32, dtype: torch.dtype = torch.float32, **limits: int) -> None:
        """`resident`: how many adapters the arena holds; its `dtype` says how closely golden logprobs are compared."""
        limits = {
            "max_batch_size": 2,
            "max_model_len": 32,
            "max_batch_tokens": 16,
        } | limits
        self.gates: dict[str, threading.Event] = {}
        self.errors: dict[str, Exception] = {}
        self.golden: dict[str, Golden] = {}  # by digest
        self.runner = ToyRunner()
        arena = Arena(resident * ADAPTER_BYTES * dtype.itemsize // 4, CPU, dtype)
        self.residency = Residency(self._load, arena, host_cache=limits.get("host_cache", 0))
        self.engine = Engine(EngineConfig(**limits), self.runner, self.residency, EOS, VOCAB)

    def _load(self, ref: AdapterRef) -> Adapter:
        if ref.digest in self.gates:
            assert self.gates[ref.digest].wait(10)
        if ref.digest in self.errors:
            raise self.errors[ref.digest]
        return replace(toy_adapter(ref.digest), golden=self.golden.get(ref.digest))

    def add(self, name: str, adapter: str | None = None, prompt: int = 3, **fields: object) -> None:
        """`adapter`: one, or several joined by "+"."""
        adapters = tuple(WeightedAdapter(ref(each), 0.5) for each in (adapter or "").split("+") if each)
        self.engine.add_request(request(name, [1] * prompt, adapters, **fields))

    def preload(self, *digests: str) -> None:
        for digest in digests:
            self.residency.prefetch(ref(digest))
        self.settle()

    def settle(self) -> None:
        deadline = time.monotonic() + 10
        while self.residency.loading:
            assert time.monotonic() < deadline, "a load never ended"
            self.residency.poll()
            time.sleep(0.001)

    def run(self) -> dict[str, SequenceOutput]:
        return run(self.engine, [])

    def admitted(self) -> list[str]:
        """Request ids in the order of their first step."""
        return list(dict.fromkeys(s.request_id for batch in self.runner.batches for s in batch.sequences))

    def admitted_in_last_step(self) -> list[str]:
        """Request ids whose first step was the last one."""
        batch = self.runner.batches[-1]
        return [i.sequence.request_id for i in batch.items if i.sequence.num_computed == i.num_new_tokens]


Toys = Callable[..., Toy]


def ref(digest: str) -> AdapterRef:
    return AdapterRef(digest, digest, digest)
