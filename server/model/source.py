"""Finds a model: a local directory as it is, or a hub id downloaded into the hub's cache. Without torch."""

from pathlib import Path

from server.model.config import ModelError

DEMO_MODEL = Path(__file__).resolve().parents[2] / "models" / "demo"
_FILES = [
    "config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "tokenizer.json",
    "vocab.json",
    "merges.txt",
]


def resolve_model(model: str) -> Path:
    """The local directory of `model`, a directory or a hub id (`owner/name`, or `name`).

    Raises ModelError: not a directory and not to be had from the hub, with the ways out.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return path.resolve()
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise ModelError(f"model directory {model!r} does not exist")
    # The hub's client is slow to import and only needed here.
    from huggingface_hub import snapshot_download  # pyright: ignore[reportUnknownVariableType]
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

    ways_out = f"pass --model DIR (a local GPT-2 checkpoint) or leave --model out for the demo base in {DEMO_MODEL}"
    try:
        return Path(snapshot_download(model, allow_patterns=_FILES))
    except HFValidationError as error:
        raise ModelError(f"model {model!r} is neither a directory nor a hub id ({error}); {ways_out}") from None
    except RepositoryNotFoundError:
        raise ModelError(f"model {model!r} does not exist on the hub, or is private; {ways_out}") from None
    except (LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(
            f"model {model!r} is not in the local cache and the hub can't be reached ({reason}); {ways_out}"
        ) from None
