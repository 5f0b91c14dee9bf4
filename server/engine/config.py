"""The engine's configuration."""

from dataclasses import dataclass


@dataclass(frozen=True)
class EngineConfig:
    """Limits of one engine. Raises ValueError naming the field."""

    max_batch_size: int = 32  # sequences that run at once, so KV rows
    max_model_len: int = 1024  # positions of a row: prompt and generated tokens together
    max_batch_tokens: int = 512  # tokens of one step: decoding tokens and prompt chunks together
    max_resident_adapters: int = 128  # adapters on the device at once

    def __post_init__(self) -> None:
        for field in ("max_batch_size", "max_model_len", "max_batch_tokens", "max_resident_adapters"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} is {getattr(self, field)}, expected at least 1")
        if self.max_batch_tokens < self.max_batch_size:
            raise ValueError(
                f"max_batch_tokens {self.max_batch_tokens} is less than max_batch_size {self.max_batch_size}: "
                "every running sequence needs a token a step"
            )
        if self.max_resident_adapters < 2 * self.max_batch_size:
            raise ValueError(
                f"max_resident_adapters {self.max_resident_adapters} is less than twice max_batch_size "
                f"{self.max_batch_size}: the running adapters and the next ones need a place each"
            )
