"""/openapi.json, made from the same table as the parser: only routes that exist, only answers that are given.

Each field's schema says exactly what the parser takes of it. Rules between fields are said where JSON Schema can say them; those
that compare two numbers, or need the model, are in words at the route.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from jaxpaged.server.answer_schemas import ANSWERS, ref
from jaxpaged.server.fields import ENDPOINTS, MAX_LABEL_CHARS, STREAM_OPTION_NAMES, BodyField

_Json = dict[str, Any]

_HEAD_PROBLEMS = {
    "400": "the request cannot be read in one way, or has no proper Host",
    "403": "a page of a browser that may not call, or a Host that is none of the server's names",
    "414": "the URL is too long",
    "431": "too many headers, or too long ones",
    "500": "a fault of the server; the message has the request's id and nothing else",
}
_KEY_PROBLEM = {"401": "no valid API key"}
_BODY_PROBLEMS = {
    "400": "a field does not fit; the body names it",
    "404": "no such model",
    "408": "the body did not arrive in time",
    "413": "the body is too large",
    "415": "not JSON, or compressed",
    "429": "too many bodies are arriving, or requests waiting",
    "503": "starting or shutting down",
    "504": "the operator's time limit passed",
}
_NOT_READY = {"503": "starting or shutting down"}
_READS: Mapping[str, str] = {
    "/v1/models": "The models.",
    "/v1/models/{model}": "One model.",
    "/health": "Whether requests are taken and make progress.",
    "/readyz": "The same as /health.",
    "/ping": "The same as /health.",
    "/livez": "Whether the process answers.",
    "/version": "The server's version.",
    "/load": "Calls in flight.",
    "/metrics": "Prometheus metrics.",
    "/openapi.json": "This API, as an OpenAPI document.",
    "/": "What this is, and its routes: a page for a browser, else JSON.",
    "/favicon.ico": "Nothing; browsers ask for it.",
}
_OPEN = ("/health", "/readyz", "/ping", "/livez")
_SUMMARIES = {
    "/v1/chat/completions": "Answer a conversation.",
    "/v1/completions": "Complete a text.",
    "/tokenize": "Turn text or a conversation into token ids.",
    "/detokenize": "Turn token ids into text.",
    "/reset_prefix_cache": "Forget the keys and values of earlier prompts: of those with the same key, or of all if it is an admin's.",
}
_EXAMPLES: Mapping[str, _Json] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "How are you?"}], "max_tokens": 16},
    "/v1/completions": {"prompt": "Once upon a time", "max_tokens": 16},
    "/tokenize": {"prompt": "Once upon a time"},
    "/detokenize": {"tokens": [1, 2, 3]},
}
_RULES = {
    "/v1/chat/completions": "A message's tool calls, results and reasoning are refused where the model's chat template leaves them out. ",
    "/v1/completions": "Prompts times n (or best_of, beam_width) are bounded. ",
}
_GENERATION_RULES = (
    "Prompt and output fit the context; min_tokens is at most max_tokens; best_of (not streamed where it is more) and beam_width are at "
    "least n, which is at most 10 in a beam search; fields of sampling and of beam search exclude each other, and so do stop and "
    "detokenize false; ids are in the vocabulary, and masks of ids leave one that may be generated, with min_tokens one that does not end "
    "the output. What breaks such a rule is a 400 that names the field."
)


def describe_api(
    *, version: str, needs_key: bool, root_path: str = "", names: Sequence[str] = (), vocab_size: int | None = None
) -> dict[str, Any]:
    """Returns the OpenAPI 3.1 document.

    Args:
        version: Of this program.
        needs_key: Whether the server wants a bearer token.
        root_path: Prefix under which a proxy serves it.
        names: Of the model, for the examples; empty while they are not known.
        vocab_size: Of the model; None while it is not known.
    """
    paths: _Json = {path: {"post": _post(path, names[:1])} for path in ENDPOINTS}
    paths |= {path: {"get": _read(path), "head": _read(path, body=False)} for path in _READS}
    paths["/ping"]["post"] = _read("/ping")
    paths["/reset_prefix_cache"] = {"post": _reset()}
    for path, operations in paths.items():
        for operation in operations.values():
            operation["responses"] |= _problems(_KEY_PROBLEM) if needs_key and path not in _OPEN else {}
            operation["responses"] = dict(sorted(operation["responses"].items()))
    document: _Json = {
        "openapi": "3.1.0",
        "info": {
            "title": "jaxpaged",
            "version": version,
            "description": "OpenAI's API over a paged KV pool. Methods that a path does not list get a 405 with Allow.",
        },
        "paths": paths,
        "components": {"schemas": {**ANSWERS, **_shared_schemas(names, vocab_size)}},
    }
    if root_path:
        document["servers"] = [{"url": root_path}]
    if needs_key:
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"key": []}]
    return document


def body_schema(path: str) -> dict[str, Any]:
    """Returns the JSON schema of an endpoint's body. Fields that nobody defines are ignored, so more than these may be there."""
    fields = ENDPOINTS[path]
    schema: _Json = {
        "type": "object",
        "required": [field.name for field in fields if field.required],
        "properties": {field.name: _property(field) for field in fields},
    }
    if path == "/tokenize":
        return _either(schema, "prompt", "messages")
    rules = _rules(fields)
    return schema | {"allOf": rules} if rules else schema


def _property(field: BodyField) -> _Json:
    note = {"no effect": " No effect.", "unsupported": " Not supported: takes only what asks for nothing."}.get(field.status, "")
    schema: Mapping[str, Any] = _asks_for_nothing(field) if field.status == "unsupported" else field.schema
    shown = dict(schema) if field.required else _nullable(schema)
    shown["description"] = field.meaning + note
    if field.default is not None:
        shown["default"] = field.default
    return shown


def _nullable(schema: Mapping[str, Any]) -> _Json:
    """Returns a schema that takes null too."""
    if not schema:
        return {}
    if "enum" in schema:
        return {**schema, "enum": [*schema["enum"], None]}
    if "type" in schema:
        kinds = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
        return {**schema, "type": list(dict.fromkeys((*kinds, "null")))}
    if "anyOf" in schema:
        return {**schema, "anyOf": [*schema["anyOf"], {"type": "null"}]}
    return {"anyOf": [schema, {"type": "null"}]}


def _asks_for_nothing(field: BodyField) -> _Json:
    """What ``asks_for_nothing`` says, as a schema."""
    if field.empty_asks:
        return {"type": "null"}
    scalars = [item for item in field.neutral if not isinstance(item, dict | list)]
    lists = [{"const": item} for item in field.neutral if isinstance(item, list)]
    objects = [{"type": "object", "required": list(item), "properties": {k: {"const": v} for k, v in item.items()}}
               for item in field.neutral if isinstance(item, dict)]  # fmt: skip
    empty: list[_Json] = [{"type": "array", "maxItems": 0}, {"type": "object", "additionalProperties": {"type": "null"}}]
    return {"anyOf": [{"enum": ["", *scalars]}, *lists, *objects, *empty]}


def _either(schema: _Json, *names: str) -> _Json:
    """Returns the schema of an object that has exactly one of these properties; the others may be null."""
    branches = []
    for name in names:
        own = {key: value for key, value in schema["properties"][name].items() if key != "type"} | {"type": _without_null(schema, name)}
        others = {other: {"type": "null"} for other in names if other != name}
        branches.append({**schema, "required": [name], "properties": {**schema["properties"], name: own, **others}})
    return {"oneOf": branches}


def _without_null(schema: _Json, name: str) -> Any:
    kinds = [kind for kind in schema["properties"][name]["type"] if kind != "null"]
    return kinds[0] if len(kinds) == 1 else kinds


def _rules(fields: Sequence[BodyField]) -> list[_Json]:
    """Returns the rules between fields that a schema can say."""
    names = {field.name for field in fields}
    rules = []
    if "top_logprobs" in names:
        rules.append({"if": _has(top_logprobs={"type": "integer", "minimum": 1}), "then": _has(logprobs={"const": True})})
    if "continue_final_message" in names:
        rules.append({"not": _has(continue_final_message={"const": True}, add_generation_prompt={"const": True})})
    if "tool_choice" in names:
        rules.append({"if": _has(tools={"type": "array", "minItems": 1}), "then": _has(tool_choice={"const": "none"})})
    if "stream" in names:
        alone = {"prompt_logprobs": {"type": "null"}, "use_beam_search": {"not": {"const": True}}}
        quiet = {"not": {"anyOf": [_has(**{name: {"const": True}}) for name in STREAM_OPTION_NAMES]}}
        rules.append({"if": _has(stream={"const": True}), "then": {"properties": alone}, "else": {"properties": {"stream_options": quiet}}})
    return rules


def _has(**properties: _Json) -> _Json:
    return {"type": "object", "required": list(properties), "properties": properties}


def _shared_schemas(names: Sequence[str], vocab_size: int | None) -> _Json:
    named = f" Served here: {', '.join(names)}." if names else ""
    return {
        "ModelName": {"type": "string", "maxLength": MAX_LABEL_CHARS, "description": "A name of the model." + named},
        "TokenId": {"type": "integer", "minimum": 0, "maximum": 2**31 - 1 if vocab_size is None else vocab_size - 1},
    }


def _post(path: str, names: Sequence[str]) -> _Json:
    generation = path.startswith("/v1/")
    content: _Json = {"application/json": {"schema": ref(_ANSWER_OF[path])}}
    if generation:
        content["text/event-stream"] = {"schema": _event(ref(_ANSWER_OF[path] + "Chunk"))}
    body: _Json = {"schema": body_schema(path)}
    example = {"model": names[0], **_EXAMPLES[path]} if names else _EXAMPLES[path]
    if names and not generation:
        body["example"] = example
    operation: _Json = {
        "summary": _SUMMARIES[path],
        "requestBody": {"required": True, "content": {"application/json": body}},
        "responses": {
            "200": {"description": "The answer.", "content": content, "headers": _headers("x-jaxpaged-ignored-fields")},
            **_problems(_HEAD_PROBLEMS | _BODY_PROBLEMS),
        },
    }
    if generation:
        # In words: tools that make requests from examples put every field beside the model's name, whatever the rules between fields.
        operation["description"] = f"{_RULES[path]}{_GENERATION_RULES} For example: {json.dumps(example)}"
    return operation


def _event(chunk: _Json) -> _Json:
    """The schema of one event of a stream."""
    chunks = {"type": "string", "contentMediaType": "application/json", "contentSchema": {"anyOf": [chunk, ref("Error")]}}
    return {"type": "object", "required": ["data"], "properties": {"data": {"anyOf": [{"const": "[DONE]"}, chunks]}}}


def _read(path: str, *, body: bool = True) -> _Json:
    kind = "text/plain" if path == "/metrics" else "application/json"
    schema: _Json = {"type": "string"} if path == "/metrics" else ref(_ANSWER_OF[path]) if path in _ANSWER_OF else {}
    answer: _Json = {"description": _READS[path], "headers": _headers()}
    problems = dict(_HEAD_PROBLEMS)
    if path in _OPEN[:3] or path.startswith("/v1/models"):
        problems |= _NOT_READY
    if "{model}" in path:
        problems["404"] = "no such model"
    if path == "/favicon.ico":
        return {"summary": _READS[path], "responses": {"204": answer, **_problems(problems, body=body)}}
    operation: _Json = {"summary": _READS[path], "responses": {"200": answer, **_problems(problems, body=body)}}
    if body:
        answer["content"] = {kind: {"schema": schema}}
    if body and path == "/":
        answer["content"]["text/html"] = {"schema": {"type": "string"}}
    if path in _OPEN:
        operation["security"] = []
        if body and "503" in problems:
            operation["responses"]["503"]["content"]["application/json"]["schema"] = ref("NotReady")
    if "{model}" in path:
        operation["parameters"] = [{"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}]
    return operation


def _reset() -> _Json:
    path = "/reset_prefix_cache"
    answer = {"description": "Done.", "headers": _headers(), "content": {"application/json": {"schema": ref(_ANSWER_OF[path])}}}
    return {"summary": _SUMMARIES[path], "responses": {"200": answer, **_problems(_HEAD_PROBLEMS | _NOT_READY)}}


def _problems(meanings: Mapping[str, str], *, body: bool = True) -> _Json:
    return {status: _problem(status, meaning, body) for status, meaning in meanings.items()}


def _problem(status: str, meaning: str, body: bool) -> _Json:
    more = {"401": ("www-authenticate",), "429": ("retry-after",), "503": ("retry-after",)}.get(status, ())
    answer: _Json = {"description": meaning, "headers": _headers(*more)}
    return answer | {"content": {"application/json": {"schema": ref("Error")}}} if body else answer


def _headers(*names: str) -> _Json:
    return {name: _HEADERS[name] for name in ("x-request-id", *names)}


_HEADERS: Mapping[str, _Json] = {
    "x-request-id": {
        "required": True,
        "schema": {"type": "string", "pattern": "^[0-9a-f]{32}$"},
        "description": "The request's name in the log.",
    },
    "x-jaxpaged-ignored-fields": {
        "schema": {"type": "string"},
        "description": "Fields of the body that had no effect because nobody defines them.",
    },
    "retry-after": {"required": True, "schema": {"type": "integer", "minimum": 1}, "description": "Seconds to wait."},
    "www-authenticate": {"required": True, "schema": {"type": "string"}},
}
_ANSWER_OF: Mapping[str, str] = {
    "/v1/chat/completions": "ChatCompletion",
    "/v1/completions": "Completion",
    "/tokenize": "Tokens",
    "/detokenize": "Text",
    "/reset_prefix_cache": "Reset",
    "/v1/models": "ModelList",
    "/v1/models/{model}": "Model",
    "/health": "Ready",
    "/readyz": "Ready",
    "/ping": "Ready",
    "/livez": "Alive",
    "/version": "Version",
    "/load": "Load",
    "/openapi.json": "Document",
    "/": "FrontPage",
}
