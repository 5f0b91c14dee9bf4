"""The engine's configuration."""

from dataclasses import dataclass

LARGEST_PROMPT_BLOCK = 32


@dataclass(frozen=True)
class EngineConfig:
    """Limits of one engine. Raises ValueError naming the field."""

    max_batch_size: int = 32  # sequences that run at once, so KV rows
    max_model_len: int = 1024  # positions of a row: prompt and generated tokens together
    max_batch_tokens: int = 512  # tokens of one step: decoding tokens and prompt chunks together
    adapter_memory: int = 1 << 30  # bytes of the arena that holds resident adapters
    host_cache: int = 1 << 30  # bytes of adapters kept in host memory, to come back without the disk; 0 is off

    @property
    def prompt_block(self) -> int:
        """Prompts are cut at multiples of it only, a power of two that fits beside all other sequences' tokens."""
        room = self.max_batch_tokens - self.max_batch_size + 1
        return 1 << (min(LARGEST_PROMPT_BLOCK, room).bit_length() - 1)

    def __post_init__(self) -> None:
        for field in ("max_batch_size", "max_model_len", "max_batch_tokens", "adapter_memory"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} is {getattr(self, field)}, expected at least 1")
        if self.host_cache < 0:
            raise ValueError(f"host_cache is {self.host_cache}, expected at least 0")
        if self.max_batch_tokens < self.max_batch_size:
            raise ValueError(
                f"max_batch_tokens {self.max_batch_tokens} is less than max_batch_size {self.max_batch_size}: "
                "every running sequence needs a token a step"
            )
