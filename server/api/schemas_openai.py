"""Request models of the OpenAI dialect, as docs/api.md and the OpenAPI document show them."""

import math
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler, GetJsonSchemaHandler, PlainValidator
from pydantic import WithJsonSchema as Shown
from pydantic_core import CoreSchema, core_schema

from server.api.errors import brief
from server.api.schemas import MAX_SEED, MAX_STOP_CHARS, MAX_STOP_SEQUENCES, Text

MAX_N = 128
MAX_SEQUENCES = 256
"""Of one request: its prompts, and prompts times `best_of`."""
MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 300
MAX_MESSAGES = 256
_TOKEN_ID = re.compile(r"0|[1-9][0-9]{0,8}")
_SURROGATE = re.compile("[\ud800-\udfff]")
_STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Only:
    """Marks a known field that isn't supported: null and these values change nothing, any other is refused by name."""

    def __init__(self, *neutral: Any) -> None:
        self.neutral = neutral

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self._check)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return {"enum": [None, *self.neutral], "description": "Not supported: accepted where it changes nothing."}

    def _check(self, value: Any) -> None:
        same = (value == each and isinstance(value, bool) == isinstance(each, bool) for each in self.neutral)
        if value is not None and not any(same):
            raise ValueError(f"{brief(value)} is not supported; leave it out or null")


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _text(value: str, where: str = "") -> str:
    if found := _SURROGATE.search(value):
        raise ValueError(f"{where}{found.group()!a} is half a surrogate pair, which is no text; send whole characters")
    return value


def _prompts(value: Any) -> tuple[str | tuple[int, ...], ...]:
    """One text or several, one list of token ids or several; none is the beginning of a document, an empty text."""
    if value is None or isinstance(value, str):
        return (_text(value or ""),)
    expected = "expected a text, a list of texts, a list of token ids or a list of such lists"
    if not isinstance(value, list) or not value:
        raise ValueError(f"{brief(value)} is no prompt; {expected}")
    items = cast("list[Any]", value)
    if all(map(_is_id, items)):
        return (tuple(items),)
    if len(items) > MAX_SEQUENCES:
        raise ValueError(f"holds {len(items)} prompts; at most {MAX_SEQUENCES} go into one request")
    prompts: list[str | tuple[int, ...]] = []
    for i, item in enumerate(items):
        if type(item) is not type(items[0]):
            raise ValueError(f"item {i} is {brief(item)} beside {brief(items[0])}; {expected}")
        if isinstance(item, str):
            prompts.append(_text(item, f"item {i}: "))
        elif isinstance(item, list) and item and all(map(_is_id, cast("list[Any]", item))):
            prompts.append(tuple(cast("list[int]", item)))
        else:
            raise ValueError(f"item {i} is {brief(item)}; {expected}")
    return tuple(prompts)


def _stops(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    stops: list[Any] = cast("list[Any]", value) if isinstance(value, list) else [value]
    if len(stops) > MAX_STOP_SEQUENCES:
        raise ValueError(f"holds {len(stops)} texts; at most {MAX_STOP_SEQUENCES} may end the output")
    for stop in stops:
        if not isinstance(stop, str) or not 1 <= len(stop) <= MAX_STOP_CHARS:
            raise ValueError(f"{brief(stop)} is no text of 1 to {MAX_STOP_CHARS} characters")
        _text(stop)
    return tuple(stops)


def _biases(value: Any) -> tuple[tuple[int, float], ...]:
    if value is None:
        return ()
    if not isinstance(value, dict) or len(cast("dict[Any, Any]", value)) > MAX_LOGIT_BIAS:
        raise ValueError(f"{brief(value)} is no object of at most {MAX_LOGIT_BIAS} token ids and numbers")
    biases: list[tuple[int, float]] = []
    for key, bias in cast("dict[str, Any]", value).items():
        if not _TOKEN_ID.fullmatch(key):
            raise ValueError(f'{brief(key)} is no token id; keys are numbers as text, such as "50256"')
        if isinstance(bias, bool) or not isinstance(bias, int | float) or not -100 <= bias <= 100 or math.isnan(bias):
            raise ValueError(f"{brief(bias)} for token {key} is no number from -100 to 100")
        biases.append((int(key), float(bias)))
    return tuple(biases)


def _content(value: Any) -> str:
    """A text, or the texts of several parts, each on lines of its own."""
    if isinstance(value, str):
        return _text(value)
    if not isinstance(value, list):
        raise ValueError(f"{brief(value)} is neither a text nor a list of parts")
    texts: list[str] = []
    for part in cast("list[Any]", value):
        known: dict[str, Any] = cast("dict[str, Any]", part) if isinstance(part, dict) else {}
        said = known.get("text")
        if known.keys() != {"type", "text"} or known["type"] != "text" or not isinstance(said, str):
            raise ValueError(f'{brief(part)} is no text; expected one, or parts {{"type": "text", "text": ...}}')
        texts.append(_text(said))
    return "\n".join(texts)


_STRING = {"type": "string"}
_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}


def _list(items: Mapping[str, Any], most: int) -> dict[str, Any]:
    return {"type": "array", "items": dict(items), "maxItems": most}


def _schema(*options: Mapping[str, Any]) -> Shown:
    return Shown({"anyOf": [*options, {"type": "null"}]})


_STOP = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARS}
_BIAS = {
    "type": "object",
    "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
    "propertyNames": {"pattern": f"^({_TOKEN_ID.pattern})$"},
    "maxProperties": MAX_LOGIT_BIAS,
}
_TEXTS = _list(_STRING, MAX_SEQUENCES) | {"minItems": 1}
_ID_LISTS = _list(_IDS, MAX_SEQUENCES) | {"minItems": 1}
_PART = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": _STRING},
    "required": ["type", "text"],
    "additionalProperties": False,
}

Content = Annotated[str, PlainValidator(_content), Shown({"anyOf": [_STRING, {"type": "array", "items": _PART}]})]
Prompts = Annotated[
    tuple[str | tuple[int, ...], ...], PlainValidator(_prompts), _schema(_STRING, _TEXTS, _IDS, _ID_LISTS)
]
Stops = Annotated[tuple[str, ...], PlainValidator(_stops), _schema(_STOP, _list(_STOP, MAX_STOP_SEQUENCES))]
Biases = Annotated[tuple[tuple[int, float], ...], PlainValidator(_biases), _schema(_BIAS)]


class StreamOptions(BaseModel):
    """`stream_options`."""

    model_config = _STRICT

    include_usage: bool | None = Field(default=None, description="A last chunk with `usage` and no choices.")
    continuous_usage_stats: bool | None = Field(default=None, description="`usage` so far in every chunk.")
    include_obfuscation: Annotated[None, Only(False)] = None


class SamplingFields(BaseModel):
    """What completions and chat have in common. Null means the default for every field."""

    model_config = _STRICT

    model: Text | None = Field(
        default=None,
        max_length=4096,
        description="The base (so too if null), an adapter or alias, `name@tag`, `name@digest`, `name:0.7,other:0.3`.",
    )
    max_tokens: int | None = Field(default=None, ge=0, description="How many tokens at most.")
    max_completion_tokens: int | None = Field(default=None, ge=0, description="Another name of max_tokens.")
    n: int | None = Field(default=None, ge=1, le=MAX_N, description="How many choices for each prompt; 1 if null.")
    stop: Stops = Field(default=(), description="Ends the text just before it.")
    stream: bool | None = Field(default=None, description="Server-sent events as the text arises.")
    stream_options: StreamOptions | None = None
    temperature: float | None = Field(default=None, ge=0, le=100, description="1 if null; 0 is greedy.")
    top_p: float | None = Field(default=None, ge=0, le=1, description="Off if null or 1; 0 keeps the best token alone.")
    top_k: int | None = Field(default=None, ge=-1, lt=2**31, description="Off if null, 0 or -1.")
    seed: int | None = Field(default=None, ge=-(2**63), le=MAX_SEED, description="Repeats a text; drawn if null.")
    frequency_penalty: float | None = Field(
        default=None, ge=-2, le=2, description="Off a token's score for each time that the output has it; 0 if null."
    )
    presence_penalty: float | None = Field(
        default=None, ge=-2, le=2, description="Off a token's score if the output has it; 0 if null."
    )
    repetition_penalty: float | None = Field(
        default=None, ge=0.01, le=100, description="Over prompt and output; 1, none, if null."
    )
    logit_bias: Biases = Field(default=(), description="Token id -> what is added to its score, -100 to 100.")
    ignore_eos: bool | None = Field(default=None, description="Go on to max_tokens.")
    min_tokens: int | None = Field(default=None, ge=0, description="Neither EOS nor a stop string ends it sooner.")
    user: Text | None = Field(default=None, description="Changes nothing.")
    metadata: Annotated[None, Only({})] = None
    response_format: Annotated[None, Only({"type": "text"})] = None
    min_p: Annotated[None, Only(0)] = None
    use_beam_search: Annotated[None, Only(False)] = None
    length_penalty: Annotated[None, Only(1)] = None
    stop_token_ids: Annotated[None, Only([])] = None
    include_stop_str_in_output: Annotated[None, Only(False)] = None
    skip_special_tokens: Annotated[None, Only(True)] = None
    spaces_between_special_tokens: Annotated[None, Only(True)] = None
    add_special_tokens: Annotated[None, Only(False, True)] = None
    truncate_prompt_tokens: Annotated[None, Only()] = None
    prompt_logprobs: Annotated[None, Only()] = None
    return_tokens_as_token_ids: Annotated[None, Only(False)] = None
    return_token_ids: Annotated[None, Only(False)] = None
    logits_processors: Annotated[None, Only([])] = None
    structured_outputs: Annotated[None, Only()] = None
    guided_json: Annotated[None, Only()] = None
    guided_regex: Annotated[None, Only()] = None
    guided_choice: Annotated[None, Only()] = None
    guided_grammar: Annotated[None, Only()] = None
    priority: Annotated[None, Only(0)] = None


class CompletionRequest(SamplingFields):
    """Body of POST /v1/completions."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {"model": "quotes", "prompt": "Quote by Oscar Wilde:", "max_tokens": 64, "seed": 7}
        }
    )

    prompt: Prompts = Field(
        default=("",), description="Texts or token ids. An empty text is the beginning of a document."
    )
    best_of: int | None = Field(
        default=None, ge=1, le=MAX_N, description="Of so many the `n` of the best mean logprob are answered; n if null."
    )
    echo: bool | None = Field(default=None, description="The prompt before the text; max_tokens may then be 0.")
    logprobs: int | None = Field(
        default=None, ge=0, le=MAX_LOGPROBS, description="Logprobs, and of so many best tokens too; none if null."
    )
    suffix: Annotated[None, Only()] = None


class ChatMessage(BaseModel):
    """One message; only its content reaches the model."""

    model_config = _STRICT

    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    name: Annotated[None, Only()] = None
    refusal: Annotated[None, Only()] = None
    annotations: Annotated[None, Only([])] = None
    audio: Annotated[None, Only()] = None
    tool_calls: Annotated[None, Only([])] = None
    function_call: Annotated[None, Only()] = None


class ChatRequest(SamplingFields):
    """Body of POST /v1/chat/completions."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {"model": "quotes", "messages": [{"role": "user", "content": "Quote by Oscar Wilde:"}]}
        }
    )

    messages: list[ChatMessage] = Field(
        min_length=1, max_length=MAX_MESSAGES, description="Their contents, a line break between two, are the prompt."
    )
    logprobs: bool | None = Field(default=None, description="Tell each token's logprob.")
    top_logprobs: int | None = Field(
        default=None, ge=0, le=MAX_LOGPROBS, description="Of so many best tokens too; needs logprobs."
    )
    tools: Annotated[None, Only([])] = None
    tool_choice: Annotated[None, Only("none", "auto")] = None
    parallel_tool_calls: Annotated[None, Only(False, True)] = None
    functions: Annotated[None, Only([])] = None
    function_call: Annotated[None, Only("none", "auto")] = None
    modalities: Annotated[None, Only(["text"])] = None
    audio: Annotated[None, Only()] = None
    prediction: Annotated[None, Only()] = None
    reasoning_effort: Annotated[None, Only("none")] = None
    verbosity: Annotated[None, Only("medium")] = None
    service_tier: Annotated[None, Only("auto", "default")] = None
    store: Annotated[None, Only(False)] = None
    web_search_options: Annotated[None, Only()] = None
    safety_identifier: Text | None = Field(default=None, description="Changes nothing.")
    prompt_cache_key: Text | None = Field(default=None, description="Changes nothing.")
    chat_template: Annotated[None, Only()] = None
    chat_template_kwargs: Annotated[None, Only({})] = None
    add_generation_prompt: Annotated[None, Only(True)] = None
    continue_final_message: Annotated[None, Only(False)] = None
    documents: Annotated[None, Only([])] = None

    @property
    def prompt(self) -> str:
        """The plain template: the contents, a line break between two. GPT-2 has no chat template of its own."""
        return "\n".join(message.content for message in self.messages)
