"""A typed door to `safetensors.safe_open`, which ships no types. Works without torch."""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, cast

from safetensors import safe_open


class TensorSlice(Protocol):
    """One tensor's header."""

    def get_shape(self) -> Sequence[int]: ...

    def get_dtype(self) -> str: ...


class TensorFile(Protocol):
    """An open safetensors file; its header has been validated."""

    def keys(self) -> Sequence[str]: ...

    def get_slice(self, name: str) -> TensorSlice: ...

    def get_tensor(self, name: str) -> Any:
        """A numpy array or a torch tensor, as the file was opened; mapped from the file."""
        ...


@contextmanager
def open_tensors(path: Path, framework: str) -> Generator[TensorFile]:
    """Open `path` for reading with `framework` "np" or "pt". Raises SafetensorError or OSError."""
    opened: Any = safe_open(path, framework=framework)
    with opened as file:
        yield cast("TensorFile", file)
