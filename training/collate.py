"""Batches of token ids. Pads each batch to its own longest example and masks the padding by length.

Never by id: GPT-2 has no padding token and its usual stand-in is EOS, so a mask by id would hide every EOS from
the loss and the adapter would never learn to stop.
"""

from collections.abc import Sequence

import torch

IGNORED = -100  # the label that the loss leaves out


def collate(examples: Sequence[dict[str, list[int]]], pad_id: int = 0) -> dict[str, torch.Tensor]:
    """Examples with `input_ids` (ending in EOS) -> input_ids, attention_mask, labels, each [B, T] int64.

    T is the length of the batch's longest example; labels equal the ids, and IGNORED in the padding.
    """
    lengths = [len(example["input_ids"]) for example in examples]
    shape = (len(examples), max(lengths))
    input_ids, labels = torch.full(shape, pad_id), torch.full(shape, IGNORED)  # [B, T]
    attention_mask = torch.zeros(shape, dtype=torch.long)  # [B, T]
    for row, (example, length) in enumerate(zip(examples, lengths, strict=True)):
        ids = torch.tensor(example["input_ids"])
        input_ids[row, :length] = labels[row, :length] = ids
        attention_mask[row, :length] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
