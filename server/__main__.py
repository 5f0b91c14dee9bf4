"""`python -m server`: read the settings, build the server, run it."""

import importlib.metadata
import logging
import sys
import time
from pathlib import Path

from pydantic import ValidationError

from adapters.errors import AdapterError
from adapters.sources import Sources
from adapters.store import AdapterStore
from server.api.app import ChorusServer, StartupError
from server.api.spec import Served
from server.logs import configure_logging
from server.metrics import OTHER, Metrics
from server.model.config import GPT2Config, ModelError
from server.model.source import DEMO_MODEL, resolve_model
from server.settings import SECRETS, Settings, SettingsError, read_settings, unknown_variables
from server.tokenizer import Tokenizer

logger = logging.getLogger("server")


def main(arguments: list[str] | None = None) -> int:
    """Serve until stopped; the exit code: 0 after a clean stop, 1 after a failure, 2 for bad settings."""
    try:
        settings = read_settings(arguments)
    except ValidationError as error:
        for problem in error.errors():
            name = str(problem["loc"][0]).replace("_", "-") if problem["loc"] else "settings"
            message = problem["msg"].removeprefix("Value error, ")
            got = "" if name.replace("-", "_") in SECRETS else f", got {problem.get('input')!r}"
            print(f"--{name}: {message}{got}", file=sys.stderr)
        return 2
    except SettingsError as error:
        print(error, file=sys.stderr)
        return 2
    configure_logging(settings.log_level, settings.log_format)
    for quiet in ("httpx", "httpcore", "asyncio"):
        logging.getLogger(quiet).setLevel(logging.WARNING)
    for line in unknown_variables():
        logger.warning("%s", line)
    if not settings.asks_for_key and settings.host != "127.0.0.1":
        logger.warning("inference on %s is open to everyone: set --api-key to ask for a key", settings.host)
    try:
        model_dir = resolve_model(settings.model)
        server = ChorusServer(_served(settings, model_dir), model_dir)
        return server.serve()
    except SettingsError as error:
        logger.error("%s", error)
        return 2
    except (ModelError, AdapterError, NotADirectoryError, ValueError, StartupError, OSError) as error:
        logger.error("%s", error)
        return 1


def _served(settings: Settings, model_dir: Path) -> Served:
    config = GPT2Config.read(model_dir)
    longest = settings.max_model_len or config.n_positions
    if longest > config.n_positions:
        raise SettingsError(f"--max-model-len {longest} exceeds the model's {config.n_positions} positions")
    name = settings.model
    if Path(name).expanduser().is_dir():
        name = "demo" if model_dir == DEMO_MODEL else model_dir.name
    tokenizer = Tokenizer(model_dir)
    if tokenizer.size > config.vocab_size:
        raise ModelError(
            f"{model_dir}: the tokenizer has {tokenizer.size} tokens, the model's vocab_size is {config.vocab_size}: "
            "prompts could hold tokens that it doesn't know; use the tokenizer that belongs to the model"
        )
    reserved = frozenset({name, "base", OTHER})
    store = AdapterStore(settings.store_dir, config.adapter_shape, settings.adapters_dir, reserved)
    if taken := sorted(entry for entry in reserved if store.has(entry)):
        raise SettingsError(
            f"--store-dir {settings.store_dir} holds an adapter named {taken[0]!r}, which the base or the metrics are "
            f"called here: take it away with `python -m adapters remove {taken[0]}`, or use another store"
        )
    store.entries()
    if swept := store.sweep():
        logger.info("%d adapter versions that no name means any more were deleted", len(swept))
    store.close()  # the API process is a fork of this one
    return Served(
        settings=settings,
        model_name=name,
        model_config=config,
        max_model_len=longest,
        tokenizer=tokenizer,
        vocabulary=tokenizer.vocabulary(config.vocab_size),
        store=store,
        sources=Sources(
            [settings.adapters_dir, *settings.adapter_roots],
            settings.adapter_sources,
            int(settings.max_adapter_bytes),
            settings.download_seconds,
        ),
        metrics=Metrics(name, settings.max_batch_size),
        version=importlib.metadata.version("chorus-serve"),
        created=time.time(),
    )


if __name__ == "__main__":
    sys.exit(main())
