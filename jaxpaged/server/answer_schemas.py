"""What the routes answer, as JSON schemas; ``tests/server`` holds every kind of answer against them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_Json = dict[str, Any]

_TEXT: _Json = {"type": "string"}
_NUMBER: _Json = {"type": "number"}
_COUNT: _Json = {"type": "integer", "minimum": 0}
_INDEX = _COUNT
_POSITIVE: _Json = {"type": "integer", "minimum": 1}
_BYTES: _Json = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 255}}
_IDS: _Json = {"type": "array", "items": {"$ref": "#/components/schemas/TokenId"}}


def ref(name: str) -> dict[str, str]:
    """Returns a reference to a schema of the document."""
    return {"$ref": f"#/components/schemas/{name}"}


def _object(required: Mapping[str, Any], **optional: Any) -> _Json:
    """Returns the schema of an object with these properties and no others."""
    return {"type": "object", "required": list(required), "properties": {**required, **optional}, "additionalProperties": False}


def _list(items: Mapping[str, Any]) -> _Json:
    return {"type": "array", "items": items}


def _or_null(schema: Mapping[str, Any]) -> _Json:
    return {"anyOf": [schema, {"type": "null"}]}


_FINISH = {"enum": ["stop", "length"]}
_STOP = {"type": ["string", "integer", "null"]}
_LABEL = {"id": _TEXT, "created": _COUNT, "model": ref("ModelName"), "system_fingerprint": _TEXT}
_TOKEN = {"token": _TEXT, "logprob": _NUMBER, "bytes": _BYTES}
_POSITION = _object({"logprob": _NUMBER, "rank": _POSITIVE, "decoded_token": _TEXT})
_END = {"finish_reason": _FINISH, "stop_reason": _STOP}
_MAYBE_END = {"index": _INDEX, "finish_reason": _or_null(_FINISH)}
_STATE = {"status": _TEXT, "running": _COUNT, "waiting": _COUNT, "last_step_age_s": _or_null(_NUMBER)}

ANSWERS: Mapping[str, _Json] = {
    "Error": _object(
        {
            "error": _object(
                {"message": _TEXT, "type": _TEXT, "param": {"type": ["string", "null"]}, "code": {"type": "string"}},
            )
        }
    ),
    "NotReady": _object({"error": _object({"message": _TEXT, "type": _TEXT, "code": {"const": 503}}), **_STATE}),
    "Ready": _object(_STATE),
    "Alive": _object({"status": {"const": "ok"}}),
    "Reset": _object({"status": {"const": "ok"}, "reset": {"enum": ["own", "all"]}}),
    "Version": _object({"version": _TEXT}),
    "Load": _object({"server_load": _COUNT}),
    "FrontPage": _object(
        {
            "name": _TEXT,
            "version": _TEXT,
            "status": _TEXT,
            "models": _list(ref("ModelName")),
            "max_model_len": _or_null(_POSITIVE),
            "routes": {"type": "object", "additionalProperties": _TEXT},
        }
    ),
    "Document": {"type": "object", "required": ["openapi", "info", "paths", "components"]},
    "Model": _object(
        {
            "id": ref("ModelName"),
            "object": {"const": "model"},
            "created": _COUNT,
            "owned_by": _TEXT,
            "root": _TEXT,
            "parent": {"type": "null"},
            "max_model_len": _POSITIVE,
        }
    ),
    "ModelList": _object({"object": {"const": "list"}, "data": _list(ref("Model"))}),
    "Tokens": _object({"count": _COUNT, "max_model_len": _POSITIVE, "tokens": _IDS, "token_strs": _or_null(_list(_TEXT))}),
    "Text": _object({"prompt": _TEXT}),
    "Usage": _object(
        {
            "prompt_tokens": _COUNT,
            "completion_tokens": _COUNT,
            "total_tokens": _COUNT,
            "prompt_tokens_details": _object({"cached_tokens": _COUNT}),
        }
    ),
    "ChatLogprobs": _object({"content": _list(_object({**_TOKEN, "top_logprobs": _list(_object(_TOKEN))}))}),
    "TextLogprobs": _object(
        {
            "tokens": _list(_TEXT),
            "token_logprobs": _list(_or_null(_NUMBER)),
            "top_logprobs": _list(_or_null({"type": "object", "additionalProperties": _NUMBER})),
            "text_offset": _list(_COUNT),
        }
    ),
    "PromptLogprobs": _list(_or_null({"type": "object", "additionalProperties": _POSITION})),
    "ChatCompletion": _object(
        {
            **_LABEL,
            "object": {"const": "chat.completion"},
            "choices": _list(
                _object(
                    {
                        "index": _INDEX,
                        "message": _object({"role": {"const": "assistant"}, "content": _TEXT, "refusal": {"type": "null"}}),
                        "logprobs": _or_null(ref("ChatLogprobs")),
                        **_END,
                    },
                    token_ids=_IDS,
                )
            ),
            "usage": ref("Usage"),
        },
        prompt_logprobs=ref("PromptLogprobs"),
        prompt_token_ids=_IDS,
    ),
    "ChatCompletionChunk": _object(
        {
            **_LABEL,
            "object": {"const": "chat.completion.chunk"},
            "choices": _list(
                _object(
                    {
                        **_MAYBE_END,
                        "delta": _object({}, role={"const": "assistant"}, content=_TEXT),
                        "logprobs": _or_null(ref("ChatLogprobs")),
                    },
                    stop_reason=_STOP,
                    token_ids=_IDS,
                )
            ),
        },
        usage=_or_null(ref("Usage")),
        prompt_token_ids=_IDS,
    ),
    "Completion": _object(
        {
            **_LABEL,
            "object": {"const": "text_completion"},
            "choices": _list(
                _object(
                    {"index": _INDEX, "text": _TEXT, "logprobs": _or_null(ref("TextLogprobs")), **_END},
                    prompt_logprobs=ref("PromptLogprobs"),
                    prompt_token_ids=_IDS,
                    token_ids=_IDS,
                )
            ),
            "usage": ref("Usage"),
        }
    ),
    "CompletionChunk": _object(
        {
            **_LABEL,
            "object": {"const": "text_completion"},
            "choices": _list(
                _object(
                    {**_MAYBE_END, "text": _TEXT, "logprobs": _or_null(ref("TextLogprobs"))},
                    stop_reason=_STOP,
                    prompt_token_ids=_IDS,
                    token_ids=_IDS,
                )
            ),
        },
        usage=_or_null(ref("Usage")),
    ),
}
"""By name, as in the document's components; ``ModelName`` and ``TokenId`` are those of the running server."""
