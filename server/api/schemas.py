"""Request models of the dialects, as docs/api.md and the OpenAPI document show them."""

from typing import Annotated, Any, Literal, Self, cast

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from server.api.errors import brief

MAX_STOP_SEQUENCES = 16
MAX_STOP_CHARS = 256
MAX_BEST_OF = 16
MAX_TOP_TOKENS = 20
MAX_PENALTY = 2.0
MAX_SEED = 2**64 - 1


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


# Known to TGI or LoRAX, not supported: accepted when null (flags when false too), refused by name otherwise.
_UNSUPPORTED = {
    "watermark": "",
    "grammar": "",
    "response_format": "",
    "schema": "",
    "return_k_alternatives": "; use `top_n_tokens`",
    "apply_chat_template": "; put the whole text into `inputs`",
    "adapter_source": "; adapters are known by their names alone",
    "api_token": "; the server needs none for an adapter",
    "merged_adapters": ": LoRAX merges A and B apart from each other, which is no weighted sum of adapters; that is "
    '`adapter_id` "one:0.7,other:0.3"',
}
_SECRET = {"api_token"}
_UNSUPPORTED_FLAGS = {"watermark", "apply_chat_template"}
_SAMPLING: tuple[tuple[str, float], ...] = (
    ("temperature", 1), ("top_k", 0), ("top_p", 1), ("typical_p", 1), ("best_of", 1),
)  # fmt: skip


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
    top_k: int | None = Field(default=None, ge=0, lt=2**31, description="Needs do_sample; off if null or 0.")
    top_p: float | None = Field(default=None, gt=0, le=1, description="Needs do_sample; off if null or 1.")
    typical_p: float | None = Field(default=None, gt=0, le=1, description="Needs do_sample; off if null or 1.")
    repetition_penalty: float | None = Field(
        default=None, ge=0.01, le=100, description="1, no penalty, if null; from 0.01 to 100."
    )
    frequency_penalty: float | None = Field(
        default=None,
        ge=-MAX_PENALTY,
        le=MAX_PENALTY,
        description="Off a token's score for every time that the output has it; 0 if null.",
    )
    presence_penalty: float | None = Field(
        default=None,
        ge=-MAX_PENALTY,
        le=MAX_PENALTY,
        description="Off a token's score if the output has it; 0 if null.",
    )
    stop: list[Text] | None = Field(
        default=None, max_length=MAX_STOP_SEQUENCES, description="Ends the text just before it."
    )
    seed: int | None = Field(default=None, ge=0, le=MAX_SEED, description="Repeats a sampled text; drawn if null.")
    best_of: int | None = Field(
        default=None,
        ge=1,
        le=MAX_BEST_OF,
        description="Needs do_sample: so many texts, with seeds from `seed` on; the one whose tokens are the likeliest "
        "on average is the answer, the others are in details. Not for streams.",
    )
    truncate: int | None = Field(default=None, ge=1, description="Keep the prompt's last tokens only.")
    return_full_text: bool | None = Field(default=None, description="Put the prompt before generated_text.")
    details: bool | None = Field(default=None, description="Tell of tokens, counts and why it ended.")
    decoder_input_details: bool | None = Field(
        default=None, description="Tell of the prompt's tokens too, in details. Not for streams."
    )
    top_n_tokens: int | None = Field(
        default=None, ge=0, le=MAX_TOP_TOKENS, description="Tell of the likeliest tokens at each step, in details."
    )
    ignore_eos_token: bool | None = Field(default=None, description="Go on to max_new_tokens.")
    watermark: Literal[False] | None = Field(default=None, description="Not supported.")
    grammar: None = Field(default=None, description="Not supported.")
    response_format: None = Field(default=None, description="Not supported.")
    json_schema: None = Field(default=None, alias="schema", description="Not supported.")
    return_k_alternatives: None = Field(default=None, description="Not supported.")
    apply_chat_template: Literal[False] | None = Field(default=None, description="Not supported.")
    adapter_source: None = Field(default=None, description="Not supported.")
    merged_adapters: None = Field(default=None, description="Not supported.")
    api_token: None = Field(default=None, description="Not supported.")

    @property
    def wants_details(self) -> bool:
        """Of an answer in one piece: asked for by name, or by asking for something that only they hold."""
        return bool(self.details or self.decoder_input_details or self.top_n_tokens)

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, values: Any) -> Any:
        if isinstance(values, dict):
            sent = cast("dict[str, Any]", values)
            for field, way_out in _UNSUPPORTED.items():
                value = sent.get(field)
                if value is not None and not (value is False and field in _UNSUPPORTED_FLAGS):
                    shown = "" if field in _SECRET else f" {brief(value)}"
                    raise ValueError(f"`{field}`{shown} is not supported{way_out or '; leave it out or null'}")
        return cast("object", values)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.do_sample:
            for field, neutral in _SAMPLING:
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


class CompatGenerateRequest(GenerateRequest):
    """Body of POST /."""

    stream: bool | None = Field(default=None, description="Answer with events, as /generate_stream does.")


class TokenizeRequest(BaseModel):
    """Body of POST /tokenize: TGI's, with `inputs`, or vLLM's, with `prompt`."""

    model_config = ConfigDict(
        extra="forbid", strict=True, json_schema_extra={"example": {"inputs": "Quote by Oscar Wilde:"}}
    )

    inputs: Text | None = Field(default=None, description="Answered by a list of tokens with their places.")
    parameters: GenerateParameters | None = Field(
        default=None, description="With `inputs`: `truncate` counts, the others don't."
    )
    prompt: Text | None = Field(default=None, description="Answered by count, max_model_len and token ids.")
    model: Text | None = Field(default=None, description="With `prompt`: the base or an adapter; they share tokens.")
    add_special_tokens: bool | None = Field(default=None, description="GPT-2 has none to add.")
    return_token_strs: Literal[False] | None = Field(default=None, description="Not supported.")

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if (self.inputs is None) == (self.prompt is None):
            raise ValueError("expected either `inputs` (TGI) or `prompt` (vLLM)")
        if self.inputs is not None and self.model is not None:
            raise ValueError("`model` goes with `prompt`, not with `inputs`")
        if self.prompt is not None and self.parameters is not None:
            raise ValueError("`parameters` go with `inputs`, not with `prompt`")
        return self
