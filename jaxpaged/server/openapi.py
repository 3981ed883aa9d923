"""/openapi.json, made from the same table as the parser: only routes that exist, only answers that are given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxpaged.server.fields import ENDPOINTS, BodyField

_ERROR = {"$ref": "#/components/schemas/Error"}
_BODY_PROBLEMS = {
    "400": "a field does not fit; the body names it",
    "404": "no such model",
    "408": "the body did not arrive in time",
    "413": "the body is too large",
    "415": "not JSON, or compressed",
    "503": "starting or shutting down",
}
_GENERATION_PROBLEMS = {
    **_BODY_PROBLEMS,
    "429": "too many requests are waiting",
    "500": "a fault of the server",
    "504": "the operator's time limit passed",
}
_PLAIN_ROUTES: Mapping[str, str] = {
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
_RESET = "/reset_prefix_cache"
_SUMMARIES = {
    "/v1/chat/completions": "Answer a conversation.",
    "/v1/completions": "Complete a text.",
    "/tokenize": "Turn text or a conversation into token ids.",
    "/detokenize": "Turn token ids into text.",
}


def describe_api(*, version: str, needs_key: bool, root_path: str = "") -> dict[str, Any]:
    """Returns the OpenAPI 3.1 document.

    Args:
        version: Of this program.
        needs_key: Whether the server wants a bearer token.
        root_path: Prefix under which a proxy serves it.
    """
    paths: dict[str, Any] = {path: {"post": _post(path, fields)} for path, fields in ENDPOINTS.items()}
    paths |= {path: {"get": _plain(path, meaning)} for path, meaning in _PLAIN_ROUTES.items()}
    paths[_RESET] = {
        "post": _plain(_RESET, "Forget the keys and values of earlier prompts with the same API key; of all, with an admin's.")
    }
    document: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "jaxpaged", "version": version, "description": "OpenAI's API over a paged KV pool."},
        "paths": paths,
        "components": {"schemas": {"Error": _error_schema()}},
    }
    if root_path:
        document["servers"] = [{"url": root_path}]
    if needs_key:
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"key": []}]
    return document


def body_schema(fields: tuple[BodyField, ...]) -> dict[str, Any]:
    """Returns the JSON schema of an endpoint's body; fields that are refused are left out, others than these are ignored."""
    known = [field for field in fields if field.status != "unsupported"]
    return {
        "type": "object",
        "required": [field.name for field in known if field.required],
        "properties": {field.name: _property(field) for field in known},
    }


def _property(field: BodyField) -> dict[str, Any]:
    note = " No effect." if field.status == "no effect" else ""
    shown: dict[str, Any] = {**field.schema, "description": field.meaning + note}
    if field.default is not None:
        shown["default"] = field.default
    return shown


def _post(path: str, fields: tuple[BodyField, ...]) -> dict[str, Any]:
    generation = path.startswith("/v1/")
    content: dict[str, Any] = {"application/json": {"schema": {"type": "object"}}}
    if generation:
        content["text/event-stream"] = {"schema": {"type": "string"}}
    return {
        "summary": _SUMMARIES[path],
        "requestBody": {"required": True, "content": {"application/json": {"schema": body_schema(fields)}}},
        "responses": {
            "200": {"description": "The answer.", "content": content},
            **_problems(_GENERATION_PROBLEMS if generation else _BODY_PROBLEMS),
        },
    }


def _plain(path: str, meaning: str) -> dict[str, Any]:
    text = path == "/metrics"
    schema = {"type": "string" if text else "object"}
    operation: dict[str, Any] = {
        "summary": meaning,
        "responses": {"200": {"description": meaning, "content": {"text/plain" if text else "application/json": {"schema": schema}}}},
    }
    if path == "/":
        operation["responses"]["200"]["content"]["text/html"] = {"schema": {"type": "string"}}
    if path == "/favicon.ico":
        operation["responses"] = {"204": {"description": meaning}}
    if path in ("/health", "/readyz", "/ping"):
        operation["responses"] |= _problems({"503": "not ready; says why"})
        operation["security"] = []
    if path == "/livez":
        operation["security"] = []
    if path.startswith("/v1/models") or path == _RESET:
        operation["responses"] |= _problems({"503": "starting"})
    if "{model}" in path:
        operation["parameters"] = [{"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}]
        operation["responses"] |= _problems({"404": "no such model"})
    return operation


def _problems(meanings: Mapping[str, str]) -> dict[str, Any]:
    return {status: {"description": meaning, "content": {"application/json": {"schema": _ERROR}}} for status, meaning in meanings.items()}


def _error_schema() -> dict[str, Any]:
    nullable = {"type": ["string", "null"]}
    return {
        "type": "object",
        "required": ["error"],
        "properties": {
            "error": {
                "type": "object",
                "required": ["message", "type"],
                "properties": {
                    "message": {"type": "string"},
                    "type": {"type": "string"},
                    "param": nullable,
                    "code": {"type": ["string", "integer", "null"]},
                },
            }
        },
    }
