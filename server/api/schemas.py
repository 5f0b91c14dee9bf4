"""Request models of the dialects, as docs/api.md and the OpenAPI document show them."""

from typing import Annotated, Any, Self, cast

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from server.api.errors import brief

MAX_STOP_SEQUENCES = 16
MAX_STOP_CHARS = 256
MAX_SEED = 2**64 - 1

# Known to TGI or LoRAX, not supported: accepted when null or neutral, refused by name otherwise.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "typical_p": (1.0,), "frequency_penalty": (0.0,), "presence_penalty": (0.0,), "best_of": (1,), "truncate": (),
    "decoder_input_details": (False,), "top_n_tokens": (0,), "watermark": (False,), "grammar": (),
    "adapter_source": (), "merged_adapters": (), "api_token": (), "response_format": (), "return_k_alternatives": (),
    "apply_chat_template": (False,), "schema": (),
}  # fmt: skip


def _encodable(value: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{value[error.start]!a} is half a surrogate pair, which is no text; send whole characters"
        ) from None
    return value


Text = Annotated[str, AfterValidator(_encodable)]


class AdapterWeight(BaseModel):
    """One adapter of a composition."""

    model_config = ConfigDict(extra="forbid", strict=True)

    ref: Text = Field(max_length=160, description="A name, `name@tag` or `name@digest`.")
    weight: float = Field(default=1.0, description="What it adds to the base is multiplied by this.")


class GenerateParameters(BaseModel):
    """`parameters` of the TGI and LoRAX dialect. Null means the default for every field."""

    model_config = ConfigDict(extra="forbid", strict=True)

    adapter_id: Text | list[AdapterWeight] | None = Field(
        default=None,
        description="An adapter or alias, `name@tag`, `name@digest`; `name:0.7,other:0.3` or a list mixes several. "
        "Null or the base's name is the base.",
    )
    max_new_tokens: int | None = Field(default=None, ge=1, description="20 if null, or fewer where positions run out.")
    do_sample: bool | None = Field(default=None, description="False is greedy.")
    temperature: float | None = Field(default=None, gt=0, le=100, description="Needs do_sample; 1 if null.")
    top_k: int | None = Field(default=None, ge=0, description="Needs do_sample; off if null or 0.")
    top_p: float | None = Field(default=None, gt=0, le=1, description="Needs do_sample; off if null or 1.")
    repetition_penalty: float | None = Field(
        default=None, ge=0.01, le=100, description="1, no penalty, if null; from 0.01 to 100."
    )
    stop: list[Text] | None = Field(
        default=None, max_length=MAX_STOP_SEQUENCES, description="Ends the text just before it."
    )
    seed: int | None = Field(default=None, ge=0, le=MAX_SEED, description="Repeats a sampled text; drawn if null.")
    return_full_text: bool | None = Field(default=None, description="Put the prompt before generated_text.")
    details: bool | None = Field(default=None, description="Tell of tokens, counts and why it ended.")
    ignore_eos_token: bool | None = Field(default=None, description="Go on to max_new_tokens.")

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        kept: dict[str, Any] = {}
        for field, value in cast("dict[str, Any]", values).items():
            if field not in _NEUTRAL:
                kept[field] = value
            elif value is not None and not any(value == n and value is not True for n in _NEUTRAL[field]):
                raise ValueError(f"`{field}` {brief(value)} is not supported; leave it out or null")
        return kept

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.do_sample:
            for field, neutral in (("temperature", 1.0), ("top_k", 0), ("top_p", 1.0)):
                value = getattr(self, field)
                if value is not None and value != neutral:
                    raise ValueError(f"`{field}` {value!r} needs `do_sample` true: without it decoding is greedy")
        for stop in self.stop or []:
            if not 1 <= len(stop) <= MAX_STOP_CHARS:
                raise ValueError(f"`stop` holds a string of {len(stop)} characters; expected 1 to {MAX_STOP_CHARS}")
        return self


class GenerateRequest(BaseModel):
    """Body of POST /generate and /generate_stream."""

    model_config = ConfigDict(
        extra="forbid",
        strict=True,
        json_schema_extra={
            "example": {
                "inputs": "Quote by Oscar Wilde:",
                "parameters": {"adapter_id": "quotes", "max_new_tokens": 64, "do_sample": True, "temperature": 0.8},
            }
        },
    )

    inputs: Text = Field(min_length=1, description="The prompt.")
    parameters: GenerateParameters | None = None
