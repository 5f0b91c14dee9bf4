"""What a step needs on the device and what comes back of it: one buffer each way, one copy each.

The device's buffers stay where they are, so that a CUDA graph may read and write them.
"""

from dataclasses import dataclass

import numpy as np
import torch

from adapters.adapter import MAX_COMPOSED

_INPUTS = {
    "token_ids": torch.int64,  # by token
    "positions": torch.int64,  # by token
    "rows": torch.int64,  # by token: its KV row
    "output_index": torch.int64,  # by sample: which token's logits
    "sample_rows": torch.int64,  # by sample: its KV row
    "top_k": torch.int64,  # by sample, and so on: the vocabulary's size is off
    "wanted": torch.int64,  # 1 for a log-probability
    "uniform": torch.float64,
    "temperature": torch.float32,
    "top_p": torch.float32,
    "penalty": torch.float32,
}
_META = 5  # of LoraMeta, by token
_OUTPUTS = {"tokens": torch.int64, "logprobs": torch.float32}


@dataclass(frozen=True)
class DeviceInputs:
    """Views of the first so many tokens on the device."""

    token_ids: torch.Tensor
    positions: torch.Tensor
    rows: torch.Tensor
    output_index: torch.Tensor
    sample_rows: torch.Tensor
    top_k: torch.Tensor
    wanted: torch.Tensor
    uniform: torch.Tensor
    temperature: torch.Tensor
    top_p: torch.Tensor
    penalty: torch.Tensor
    meta: torch.Tensor  # [rounds, 5, N]


class _Mirrored:
    """Fields side by side in a host buffer (pinned for a GPU) and in one on the device."""

    def __init__(self, fields: dict[str, tuple[torch.dtype, int]], device: torch.device) -> None:
        """fields: type and length of each. Wider types come first, so that all are aligned."""
        size = sum(dtype.itemsize * count for dtype, count in fields.values())
        self.host_bytes = torch.zeros(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
        self.device_bytes = torch.zeros(size, dtype=torch.uint8, device=device)
        self.host, self.device = dict[str, torch.Tensor](), dict[str, torch.Tensor]()
        self.where: dict[str, int] = {}
        start = 0
        for name, (dtype, count) in fields.items():
            end = start + count * dtype.itemsize
            self.host[name] = self.host_bytes[start:end].view(dtype)
            self.device[name] = self.device_bytes[start:end].view(dtype)
            self.where[name], start = start, end


class StepInputs:
    """The inputs of one forward of up to `capacity` tokens. Write the host's arrays, then `upload`."""

    def __init__(self, capacity: int, device: torch.device) -> None:
        self.capacity = capacity
        fields = {name: (dtype, capacity) for name, dtype in _INPUTS.items()}
        meta = {"meta": (torch.int32, MAX_COMPOSED * _META * capacity)}  # last: seldom more than one round is uploaded
        self._parts = _Mirrored(fields | meta, device)
        self.host: dict[str, np.ndarray] = {name: self._parts.host[name].numpy() for name in _INPUTS}
        self._host_meta, self._device_meta = (
            part["meta"].view(MAX_COMPOSED, _META, capacity) for part in (self._parts.host, self._parts.device)
        )

    def host_meta(self, number: int, tokens: int) -> torch.Tensor:
        """[5, tokens] int32 on the host, to be written: round `number`'s."""
        return self._host_meta[number, :, :tokens]

    def upload(self, rounds: int = MAX_COMPOSED) -> None:
        """One copy, ahead of what is launched next; only so many rounds' meta."""
        end = self._parts.where["meta"] + rounds * self._host_meta[0].nbytes
        self._parts.device_bytes[:end].copy_(self._parts.host_bytes[:end], non_blocking=True)

    def views(self, tokens: int, samples: int, rounds: int) -> DeviceInputs:
        """The first so many of each on the device."""
        by_token = {"token_ids", "positions", "rows"}
        fields = {
            name: part[: tokens if name in by_token else samples]
            for name, part in self._parts.device.items()
            if name in _INPUTS
        }
        return DeviceInputs(**fields, meta=self._device_meta[:rounds, :, :tokens])


class StepOutputs:
    """Tokens and log-probabilities of one step."""

    def __init__(self, capacity: int, device: torch.device) -> None:
        self._parts = _Mirrored({name: (dtype, capacity) for name, dtype in _OUTPUTS.items()}, device)
        self.tokens, self.logprobs = self._parts.device["tokens"], self._parts.device["logprobs"]

    def download(self) -> tuple[list[int], list[float]]:
        """Everything, by one copy; waits for what was launched."""
        self._parts.host_bytes.copy_(self._parts.device_bytes)
        tokens, logprobs = self._parts.host["tokens"].numpy(), self._parts.host["logprobs"].numpy()
        return [int(t) for t in tokens], [float(p) for p in logprobs]
