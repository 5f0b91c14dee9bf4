"""Every setting of the server, and the only reader of the environment.

Flags win over `CHORUS_*` variables, those over `.env` in the working directory, that over the defaults.
`python -m server.settings` prints docs/settings.md.
"""

import difflib
import os
import re
import sys
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal

from dotenv import dotenv_values
from pydantic import BeforeValidator, ByteSize, Field, SecretStr, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, CliApp, CliImplicitFlag, NoDecode, SettingsConfigDict

from server.model.source import DEMO_MODEL

PREFIX = "CHORUS_"
ENV_FILE = ".env"
BUNDLED_ADAPTERS = Path(__file__).resolve().parents[1] / "adapters" / "bundled"


def _split(value: object) -> object:
    """`a,b` as a list; CLI and environment give text."""
    return [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value


def _split_keys(value: object) -> object:
    """The same, but a blank one stays, to be refused: it must not open the server."""
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else value


Words = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split)]
Paths = Annotated[tuple[Path, ...], NoDecode, BeforeValidator(_split)]
Secrets = Annotated[tuple[SecretStr, ...], NoDecode, BeforeValidator(_split_keys)]
SECRETS = ("api_key", "admin_key")
"""Settings whose values no message may show."""


class Settings(BaseSettings):
    """Chorus: serve one frozen GPT-2 with many LoRA adapters."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        env_file=ENV_FILE,
        env_ignore_empty=True,
        extra="ignore",  # a .env may hold other programs' variables; those with our prefix: unknown_variables
        frozen=True,
        cli_kebab_case=True,
        cli_prog_name="python -m server",
        cli_hide_none_type=True,
    )

    model: str = Field(
        str(DEMO_MODEL), min_length=1, description="Hub id or directory of a GPT-2 checkpoint; the embedded demo base."
    )
    adapters_dir: Path = Field(
        BUNDLED_ADAPTERS, description="Folder of PEFT adapter folders, each served under its name; the bundled ones."
    )
    store_dir: Path = Field(
        Path("var/store"),
        description="Where published adapters, their names and aliases are kept; on a disk of this machine, it holds a "
        "database.",
    )
    adapter_roots: Paths = Field(
        (), description="More folders that a path given over HTTP may lie in, comma-separated; --adapters-dir is one."
    )
    adapter_sources: Words = Field(
        (),
        description="Beginnings of addresses that adapters may be fetched from over HTTP, comma-separated, e.g. "
        "hf://my-org/, s3://bucket/adapters/; none if left out.",
    )
    max_adapter_bytes: Annotated[ByteSize, Field(ge=1 << 10)] = Field(
        default=ByteSize(1 << 30), description="The largest adapter, or archive of one, that is taken in."
    )
    download_seconds: float = Field(default=300.0, gt=0, description="The longest that fetching an adapter may take.")
    host: Literal["127.0.0.1", "0.0.0.0", "::"] = Field(default="127.0.0.1", description="Address to listen on.")
    port: Annotated[int, Field(ge=1024, le=65535)] = Field(default=8000, description="Port to listen on.")
    api_workers: int = Field(
        default=1,
        ge=1,
        le=64,
        description="Processes that speak HTTP, before the one that computes: more where one is busy all the time.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="Where to compute; auto is cuda if there is one."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Precision of weights and cache; auto is float32 on a CPU, bfloat16 on a GPU that has it."
    )
    kernels: Literal["auto", "off"] = Field(
        "auto",
        description="Our kernels: C++ on a CPU, if `make install` built them, or Triton on a GPU; off is torch alone.",
    )
    max_batch_size: int = Field(default=32, ge=1, le=1024, description="Requests that decode together.")
    max_model_len: int | None = Field(
        None, ge=2, description="Positions of a request, prompt and output; the model's own if left out."
    )
    max_batch_tokens: int | None = Field(
        None,
        ge=1,
        description="Tokens of one step, running requests and chunks of prompts together: so long may a prompt hold up "
        "the others. At least max_batch_size; if left out 128 on a CPU, 512 on a GPU, or twice max_batch_size, "
        "whichever is more.",
    )
    max_waiting: int = Field(
        default=1024, ge=0, description="Requests that may wait for a place; more are answered 429."
    )
    adapter_memory: Annotated[ByteSize, Field(ge=1 << 20)] = Field(
        default=ByteSize(2 << 30),
        description="Memory of the adapters on the device, e.g. 500MB or 8GiB: as many stay as fit, the least recently "
        "used make room. A rank-16 adapter of all four projections takes 12 MiB of gpt2-medium in bfloat16.",
    )
    host_cache: Annotated[ByteSize, Field(ge=0)] = Field(
        default=ByteSize(1 << 30),
        description="Host memory for adapters that were read before: what had to make room on the device comes back "
        "without being read and hashed again; 0 is off.",
    )
    api_key: Secrets = Field(
        (),
        description="Key that inference needs, or several, comma-separated; open if there is none, here or in a file.",
    )
    api_key_file: Path | None = Field(
        None, description="File of such keys, `KEY` or `LABEL KEY` a line; read anew when it changes."
    )
    admin_key: Secrets = Field(
        (),
        description="Key, or several, of the routes that change adapters; they are closed if there is none. It opens "
        "all others, too.",
    )
    admin_key_file: Path | None = Field(None, description="File of such keys, as --api-key-file.")
    key_concurrency: int | None = Field(
        None,
        ge=1,
        description="POST requests that a key may have under way at once; more are answered 429. Without keys they are "
        "counted by remote address.",
    )
    key_rate: str | None = Field(
        None, description="POST requests that a key may send, `N/second` or `N/minute`; more are answered 429."
    )
    cors_origins: Words = Field(
        (),
        description="Origins whose web pages may call the server, comma-separated, e.g. https://app.example.org; * is "
        "any.",
    )
    hang_seconds: float = Field(
        default=60.0, gt=1, description="A worker silent for so long is killed and started anew."
    )
    drain_seconds: int = Field(default=60, ge=1, description="How long SIGTERM waits for requests in flight.")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="Least severe lines to log."
    )
    log_format: Literal["text", "json"] = Field(default="text", description="Log lines as text, or JSON for machines.")
    log_prompts: CliImplicitFlag[bool] = Field(default=False, description="Let the line of a request tell its prompts.")
    otel_endpoint: str | None = Field(
        None,
        pattern="^https?://.+",
        description="Where traces are sent by OTLP over HTTP, e.g. http://collector:4318; OTEL_EXPORTER_OTLP_ENDPOINT "
        "does the same. Needs the `otel` extra.",
    )

    @field_validator("key_rate")
    @classmethod
    def _is_a_rate(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"[1-9][0-9]{0,8}/(second|minute)", value):
            raise ValueError("is no rate; write N/second or N/minute, e.g. 60/minute")
        return value

    @field_validator("cors_origins")
    @classmethod
    def _are_origins(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for origin in value:
            if origin != "*" and not re.fullmatch(r"https?://[^/?#\s@]+", origin):
                raise ValueError(f"{origin!r} is no origin; write scheme://host or scheme://host:port, no path, or *")
        return value

    @field_validator("max_batch_tokens")
    @classmethod
    def _a_token_for_each(cls, value: int | None, info: ValidationInfo) -> int | None:
        batch = info.data.get("max_batch_size")  # missing if it is wrong itself
        if value is not None and batch is not None and value < batch:
            raise ValueError(f"must be at least {batch}, --max-batch-size: every running request needs a token a step")
        return value

    @property
    def asks_for_key(self) -> bool:
        """Whether inference needs a key."""
        return bool(self.api_key or self.api_key_file)


class SettingsError(ValueError):
    """A setting that the model which is served rules out; the message names its flag."""


def read_settings(arguments: list[str] | None = None) -> Settings:
    """Settings from flags, environment and `.env`.

    Raises pydantic.ValidationError, and SettingsError for a key that is given but empty; exits 2 on unknown flags.
    """
    given = sys.argv[1:] if arguments is None else arguments
    for flag in ("--api-key", "--admin-key"):
        # What an unset variable of a shell becomes; pydantic-settings would take it for none.
        if f"{flag}=" in given or (flag, "") in pairwise(given):
            raise SettingsError(f"{flag}: is blank; leave it out to have no key")
    return CliApp.run(Settings, cli_args=arguments)


def unknown_variables() -> list[str]:
    """A line for each `CHORUS_*` name in the environment or `.env` that is no setting, with the nearest that is."""
    known = [PREFIX + name.upper() for name in Settings.model_fields]
    lines: list[str] = []
    in_file = dotenv_values(ENV_FILE, interpolate=False, encoding="utf-8") if Path(ENV_FILE).is_file() else {}
    for names, where in ((os.environ, ""), (in_file, f"{ENV_FILE}: ")):
        for name in sorted(names):
            upper = name.upper()  # a variable's case does not matter
            if upper.startswith(PREFIX) and upper not in known:
                nearest = difflib.get_close_matches(upper, known, n=1)
                hint = f"; did you mean {nearest[0]}?" if nearest else ""
                lines.append(f"{where}{name} names no setting{hint}")
    return lines


def traces_asked_for(settings: Settings) -> bool:
    """By --otel-endpoint or OpenTelemetry's own variables. Raises SettingsError for a protocol not spoken here."""
    names = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
    off = os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true" or os.environ.get("OTEL_TRACES_EXPORTER") == "none"
    if settings.otel_endpoint is None and (off or not any(os.environ.get(name) for name in names)):
        return False
    for name in ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"):
        if (protocol := os.environ.get(name)) not in (None, "", "http/protobuf"):
            raise SettingsError(f"{name} is {protocol!r}: traces are sent by http/protobuf only (port 4318, as a rule)")
    return True


def document() -> str:
    """docs/settings.md."""
    rows = [
        "# Settings",
        "",
        "Generated by `python -m server.settings`. Flags win over variables, those over `.env`.",
        "",
    ]
    rows += ["| flag | variable | default | what |", "|---|---|---|---|"]
    root = Path(__file__).resolve().parents[1]
    for name, field in Settings.model_fields.items():
        size = field.default.human_readable() if isinstance(field.default, ByteSize) else field.default
        default = "" if size in (None, ()) else str(size).replace(f"{root}/", "")
        rows.append(f"| `--{name.replace('_', '-')}` | `{PREFIX}{name.upper()}` | {default} | {field.description} |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    print(document(), end="")
