"""Batches of token ids. Examples of like length go together; each batch is padded to its own longest.

Padding is masked by length, never by id: GPT-2 has no padding token and its usual stand-in is EOS, so a mask by id
would hide every EOS from the loss and the adapter would never learn to stop.
"""

import random
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Sampler

IGNORED = -100  # the label that the loss leaves out
POOL_BATCHES = 50  # examples are sorted by length within random pools of so many batches


class LengthGrouped(Sampler[int]):
    """A new order of the examples for each epoch, in which neighbours have like lengths.

    It depends on seed and epoch alone, so that a resumed run goes on with the order it had.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self._lengths, self._batch_size, self._seed = lengths, batch_size, seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Which epoch the next iteration is; the Trainer says."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        shuffle = random.Random(f"{self._seed}/{self._epoch}").shuffle
        order, size = list(range(len(self))), self._batch_size
        shuffle(order)
        pools = [order[i : i + POOL_BATCHES * size] for i in range(0, len(order), POOL_BATCHES * size)]
        order = [i for pool in pools for i in sorted(pool, key=self._lengths.__getitem__)]
        batches = [order[i : i + size] for i in range(0, len(order), size)]
        last = [batches.pop()] if len(order) % size else []  # the one that isn't full stays last
        shuffle(batches)
        yield from (i for batch in batches + last for i in batch)


def collate(examples: Sequence[dict[str, Any]], pad_id: int = 0) -> dict[str, torch.Tensor]:
    """Examples with `input_ids` (ending in EOS) -> input_ids, attention_mask, labels, each [B, T] int64.

    T is the length of the batch's longest example; labels equal the ids, and are IGNORED in the padding and before
    `learn_from`, an index into the ids.
    """
    lengths = [len(example["input_ids"]) for example in examples]
    shape = (len(examples), max(lengths))
    input_ids, labels = torch.full(shape, pad_id), torch.full(shape, IGNORED)  # [B, T]
    attention_mask = torch.zeros(shape, dtype=torch.long)  # [B, T]
    for row, (example, length) in enumerate(zip(examples, lengths, strict=True)):
        ids = torch.tensor(example["input_ids"])
        input_ids[row, :length] = labels[row, :length] = ids
        labels[row, : example["learn_from"]] = IGNORED
        attention_mask[row, :length] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
