"""The OpenAPI document: what FastAPI can't know of routes that answer for themselves.

Statuses, bodies and keys are said here for each group of routes; tests/clients/test_schemathesis.py holds a live server
to it.
"""

from typing import Any

from fastapi import FastAPI

_TEXT = {"type": "string"}
_COUNT = {"type": "integer", "minimum": 0}
_OBJECT: dict[str, Any] = {"type": "object"}
_EVENTS = {
    "text/event-stream": {
        "schema": {
            "type": "object",
            "description": "Of one event.",
            "properties": {"data": {"type": "string", "description": "JSON, or [DONE] at the end under /v1."}},
            "required": ["data"],
        }
    }
}
_ARCHIVE = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
_WORDS = {
    202: "Done, but requests that run still use it",
    400: "A field is missing, or the adapter is loaded already",
    401: "A key is missing or wrong",
    403: "The server was started without a key for this",
    404: "There is nothing of this name; the nearest are told",
    409: "Something stands against it, which the message names",
    413: "The body is too large",
    422: "Refused: the message names the field, the value and the way out",
    424: "The request failed while it was generated",
    429: "Too many requests; `Retry-After` says when to come back",
    500: "A defect of the server's, which its log describes under `x-request-id`",
    503: "Not ready, or the adapter can't be read just now; with `Retry-After`",
}
_GENERATE = (401, 404, 413, 422, 424, 429, 503)
_READ = (401, 503)
_CHANGE = (401, 403, 404, 409, 413, 422, 429, 503)
_PROBES = ("/health", "/ready", "/metrics")


def _all_of(fields: dict[str, Any], **optional: Any) -> dict[str, Any]:
    return {"type": "object", "properties": fields | optional, "required": list(fields)}


def _list_of(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": schema}


def _ref(name: str) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{name}"}


def _or_null(schema: dict[str, Any]) -> dict[str, Any]:
    return {"anyOf": [schema, {"type": "null"}]}


_LOGPROB = {"type": ["number", "null"]}
_TOKEN = {"id": _COUNT, "text": _TEXT, "logprob": _LOGPROB}
_COUNTS = _all_of({"prompt_tokens": _COUNT, "completion_tokens": _COUNT, "total_tokens": _COUNT})
_ANSWER = {"id": _TEXT, "object": _TEXT, "created": _COUNT, "model": _TEXT, "system_fingerprint": _TEXT}
_REASON = {"enum": ["stop", "length"]}
_SCHEMAS = {
    "TgiError": _all_of({"error": _TEXT, "error_type": _TEXT}),
    "OpenAIError": _all_of(
        {"error": _all_of({"message": _TEXT, "type": _TEXT, "param": _or_null(_TEXT), "code": _or_null(_TEXT)})}
    ),
    "Token": _all_of(_TOKEN | {"special": {"type": "boolean"}, "skipped": {"type": "boolean"}}),
    "Details": _all_of(
        {
            "finish_reason": {"enum": ["length", "eos_token", "stop_sequence"]},
            "generated_tokens": _COUNT, "prompt_tokens": _COUNT, "input_length": _COUNT, "skipped_tokens": _COUNT,
            "seed": _or_null(_COUNT), "prefill": _list_of(_all_of(_TOKEN)), "tokens": _list_of(_ref("Token")),
            "top_tokens": _list_of(_list_of(_ref("Token"))),
        },
        best_of_sequences=_list_of(_OBJECT),
    ),
    "Generated": _all_of({"generated_text": _TEXT}, details=_ref("Details")),
    "Logprobs": _all_of(
        {
            "tokens": _list_of(_TEXT), "token_logprobs": _list_of(_LOGPROB), "text_offset": _list_of(_COUNT),
            "top_logprobs": _list_of(_or_null({"type": "object", "additionalProperties": {"type": "number"}})),
        }
    ),
    "Completion": _all_of(
        _ANSWER
        | {
            "choices": _list_of(
                _all_of(
                    {"index": _COUNT, "text": _TEXT, "logprobs": _or_null(_ref("Logprobs")), "finish_reason": _REASON}
                )
            ),
            "usage": _COUNTS,
        }
    ),
    "ChatCompletion": _all_of(
        _ANSWER
        | {
            "choices": _list_of(
                _all_of(
                    {"index": _COUNT, "message": _all_of({"role": _TEXT, "content": _TEXT}), "finish_reason": _REASON},
                    logprobs=_or_null(_OBJECT),
                )
            ),
            "usage": _COUNTS,
        }
    ),
    "Model": _all_of({"id": _TEXT, "object": _TEXT, "created": _COUNT, "owned_by": _TEXT, "max_model_len": _COUNT}),
    "Models": _all_of({"object": _TEXT, "data": _list_of(_ref("Model"))}),
    "AdapterRecord": _all_of(
        {"name": _TEXT, "kind": {"enum": ["adapter", "alias"]}, "created": {"type": "number"}},
        digest=_TEXT, rank=_COUNT, nbytes=_COUNT, state=_TEXT, reason=_or_null(_TEXT), in_flight=_COUNT,
    ),
    "AdapterPage": _all_of(
        {
            "object": _TEXT, "data": _list_of(_ref("AdapterRecord")), "has_more": {"type": "boolean"},
            "next": _or_null(_TEXT), "refused": _list_of(_all_of({"name": _TEXT, "reason": _TEXT})),
        }
    ),
    "Checked": _all_of({"valid": {"const": True}, "digest": _TEXT, "rank": _COUNT}),
    "Removed": _all_of({"name": _TEXT, "removed": {"const": True}}, in_flight=_COUNT),
    "Pieces": _list_of(_all_of({"id": _COUNT, "text": _TEXT, "start": _COUNT, "stop": _COUNT})),
    "TokenCount": _all_of({"count": _COUNT, "max_model_len": _COUNT, "tokens": _list_of(_COUNT)}),
    "Readiness": _all_of({"ready": {"type": "boolean"}, "missing": _list_of(_TEXT)}),
}  # fmt: skip
_JSON = {
    "POST /": _list_of(_ref("Generated")),
    "POST /generate": _ref("Generated"),
    "POST /tokenize": {"anyOf": [_ref("Pieces"), _ref("TokenCount")]},
    "POST /v1/completions": _ref("Completion"),
    "POST /v1/chat/completions": _ref("ChatCompletion"),
    "GET /v1/models": _ref("Models"),
    "GET /v1/models/{name}": _ref("Model"),
    "GET /v1/adapters": _ref("AdapterPage"),
    "POST /v1/adapters:validate": _ref("Checked"),
    "GET /v1/adapters/{name}": _ref("AdapterRecord"),
    "PUT /v1/adapters/{name}": _ref("AdapterRecord"),
    "DELETE /v1/adapters/{name}": _ref("Removed"),
    "POST /v1/adapters/{name}/rollback": _ref("AdapterRecord"),
    "PUT /v1/aliases/{name}": _ref("AdapterRecord"),
    "DELETE /v1/aliases/{name}": _ref("Removed"),
    "POST /v1/aliases/{name}/rollback": _ref("AdapterRecord"),
    "GET /ready": _ref("Readiness"),
}
"""What a 200 holds as JSON; a route that is missing answers an object."""
_STREAMS = ("POST /", "POST /generate_stream", "POST /v1/completions", "POST /v1/chat/completions")
_PLAIN = ("POST /v1/load_lora_adapter", "POST /v1/unload_lora_adapter", "GET /metrics")


def document(app: FastAPI) -> None:
    """Let `app.openapi()`, and with it /openapi.json and /docs, tell all of this."""
    plain = app.openapi

    def complete() -> dict[str, Any]:
        if app.openapi_schema is None or "securitySchemes" not in app.openapi_schema.get("components", {}):
            made = plain()
            for path, operations in made["paths"].items():
                for method, operation in operations.items():
                    _describe(method.upper(), path, operation)
            parts = made.setdefault("components", {})
            schemas = parts.setdefault("schemas", {})
            for unused in ("HTTPValidationError", "ValidationError"):  # FastAPI's own 422, which is never sent
                schemas.pop(unused, None)
            schemas.update(_SCHEMAS)
            parts["securitySchemes"] = {
                "bearer": {"type": "http", "scheme": "bearer"},
                "header": {"type": "apiKey", "in": "header", "name": "X-API-Key"},
            }
            app.openapi_schema = made
        return app.openapi_schema

    app.openapi = complete  # pyright: ignore[reportAttributeAccessIssue] (FastAPI's own way to extend it)


def _describe(method: str, path: str, operation: dict[str, Any]) -> None:
    route = f"{method} {path}"
    operation["responses"] = _responses(route, path, method)
    if path not in _PROBES:
        operation["security"] = [{"bearer": []}, {"header": []}, {}]  # {}: a server without keys is open
    if route in ("PUT /v1/adapters/{name}", "POST /v1/adapters:validate"):
        content: dict[str, Any] = dict(_ARCHIVE)
        if method == "POST":
            content["application/json"] = {"schema": _all_of({"path": _TEXT})}
        operation["requestBody"] = {"required": True, "content": content}


def _responses(route: str, path: str, method: str) -> dict[str, Any]:
    content: dict[str, Any] = {}
    if route in _PLAIN:
        content["text/plain"] = {"schema": _TEXT}
    elif route != "POST /generate_stream" and route != "GET /health":
        content["application/json"] = {"schema": _JSON.get(route, _OBJECT)}
    if route in _STREAMS:
        content |= _EVENTS
    good: dict[str, Any] = {"description": "As asked"} | ({"content": content} if content else {})
    answers: dict[str, Any] = {"200": good}
    if route == "DELETE /v1/adapters/{name}" or path == "/v1/unload_lora_adapter":
        answers["202"] = good | {"description": _WORDS[202]}
    error = _ref("OpenAIError" if path.startswith("/v1/") else "TgiError")
    for status in _statuses(path, method):
        schema = _ref("Readiness") if path == "/ready" else error
        answers[str(status)] = {
            "description": _WORDS[status],
            "content": {"application/json": {"schema": schema}},
        }
    return answers


def _statuses(path: str, method: str) -> list[int]:
    if path in _PROBES:
        return [503]
    found: set[int] = {500}
    if path in ("/", "/generate", "/generate_stream", "/v1/completions", "/v1/chat/completions"):
        found |= {*_GENERATE}
    elif path == "/tokenize":
        found |= {*_READ, 404, 413, 422, 429}
    elif method == "GET":  # GETs aren't limited, and these alone take something
        found |= {*_READ} | ({404, 422} if "{name}" in path else {422} if path == "/v1/adapters" else set[int]())
    else:
        found |= {*_CHANGE, 400} if path.endswith("_lora_adapter") else {*_CHANGE}
    return sorted(found)
