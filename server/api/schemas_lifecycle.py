"""Request models of the routes that change adapters."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from adapters.aliases import MAX_TARGETS, MAX_WEIGHT
from server.api.schemas import Text


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class AliasTarget(_Body):
    """Where an alias leads, and how often."""

    ref: Text = Field(max_length=160, description="`name`, which follows the name, or `name@digest`, which stays.")
    weight: float = Field(default=1.0, gt=0, le=MAX_WEIGHT, description="Its share is its weight over the sum of all.")


class AliasRequest(_Body):
    """Body of PUT /v1/aliases/{name}."""

    targets: list[AliasTarget] = Field(min_length=1, max_length=MAX_TARGETS)


class ValidateRequest(_Body):
    """JSON body of POST /v1/adapters:validate."""

    path: Text = Field(min_length=1, max_length=4096, description="As `lora_path` of /v1/load_lora_adapter.")


class LoadRequest(_Body):
    """Body of POST /v1/load_lora_adapter, as vLLM has it."""

    lora_name: Text | None = Field(default=None, description="The name to serve it under.")
    lora_path: Text | None = Field(
        default=None, max_length=4096, description="A folder inside --adapters-dir or --adapter-roots, or a source."
    )
    load_inplace: bool | None = Field(default=None, description="Replace what the name means; false if null.")
    is_3d_lora_weight: Literal[False] | None = Field(default=None, description="vLLM's, of experts: GPT-2 has none.")


class UnloadRequest(_Body):
    """Body of POST /v1/unload_lora_adapter, as vLLM has it, and what to do with its requests."""

    lora_name: Text | None = Field(default=None, description="The name to take away.")
    lora_int_id: None = Field(default=None, description="vLLM's: adapters have no numbers here.")
    when_busy: Literal["wait", "refuse"] | None = Field(default=None, description="wait if null; refuse answers 409.")
    timeout: float | None = Field(default=None, gt=0, le=3600, description="Seconds to wait; 60 if null.")
