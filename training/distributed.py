"""The processes that share a run: one, or as many as `torchrun` or `accelerate launch` started.

Each takes every world-th row of a batch and all add up their gradients, so that all take the same step. What goes wrong
on one of them is raised on all, so that none waits for another that has ended.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import distributed

from training.errors import ConfigError, TrainingError
from training.launcher import launched

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among the others."""

    device: torch.device
    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        """Whether this one writes files and speaks."""
        return self.rank == 0

    def add_up(self, tensors: Sequence[torch.Tensor]) -> None:
        """Replace each tensor by its sum over all processes."""
        if self.world == 1 or not tensors:
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        distributed.all_reduce(flat)
        for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def wait(self) -> None:
        """Until every process is here."""
        if self.world > 1:
            distributed.barrier()

    def everywhere(self, work: Callable[[], T]) -> T:
        """Do `work` on every process. If it raises a TrainingError or OSError on one, that is raised on all."""
        try:
            result, error = work(), None
        except (TrainingError, OSError) as raised:
            result, error = None, raised
        for other in self._all(error):
            if other is not None:
                raise other
        return result  # type: ignore[return-value]

    def first_does(self, work: Callable[[], T]) -> T:
        """Do `work` on the first process; all get what it returns or raises."""
        return self._all(self.everywhere(lambda: work() if self.first else None))[0]

    def agree(self, value: object, otherwise: str) -> None:
        """Raises ConfigError(otherwise) on all processes unless `value` is the same on all."""
        if any(other != value for other in self._all(value)):
            raise ConfigError(otherwise)

    def _all(self, value: Any) -> list[Any]:
        values = [value] * self.world
        if self.world > 1:
            distributed.all_gather_object(values, value)
        return values

    def leave(self) -> None:
        """End the group; no other call may follow."""
        if self.world > 1:
            distributed.destroy_process_group()


def join(device: str = "auto") -> Ranks:
    """Join the processes that the launcher started, on the device of this one. Raises ConfigError."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch finds no GPU here; --device cpu trains without one")
    cpu = device == "cpu" or not torch.cuda.is_available()
    if launched()[1] == 1:
        return Ranks(torch.device("cpu" if cpu else "cuda"))
    from accelerate import PartialState  # it knows the launchers' environment and each device's backend

    # The others wait while the first measures a choir.
    state: Any = PartialState(cpu=cpu, timeout=timedelta(days=1))
    return Ranks(state.device, state.process_index, state.num_processes)


def auto_dtype(device: torch.device) -> str:
    """What `--dtype auto` means: bfloat16 where the device computes it at speed, otherwise fp32 (decision 12)."""
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        capabilities = getattr(torch.cpu, "get_capabilities", dict[str, Any])()  # torch 2.11 has none
        fast = any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16"))
    return "bfloat16" if fast else "float32"
