"""What to say to somebody who asks for a route that there is not: which one was probably meant, or what to use instead."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence

_BASE = "/v1"
_CHAT = "use /v1/chat/completions"
_TEXT_ONLY = "its models generate text"

ELSEWHERE: Mapping[str, str] = {
    "/responses": _CHAT,
    "/messages": _CHAT,
    "/messages/count_tokens": "use /tokenize",
    "/embeddings": _TEXT_ONLY,
    "/rerank": _TEXT_ONLY,
    "/score": _TEXT_ONLY,
    "/pooling": _TEXT_ONLY,
    "/classify": _TEXT_ONLY,
    "/moderations": _TEXT_ONLY,
    "/images/generations": _TEXT_ONLY,
    "/audio/speech": _TEXT_ONLY,
    "/audio/transcriptions": _TEXT_ONLY,
    "/audio/translations": _TEXT_ONLY,
    "/realtime": _CHAT,
    "/assistants": _CHAT,
    "/threads": _CHAT,
    "/files": _CHAT,
    "/batches": _CHAT,
    "/fine_tuning/jobs": _CHAT,
    "/tokenizer_info": "use /tokenize and /detokenize",
    "/edits": _CHAT,
    "/generate": "use /v1/completions",
    "/generate_stream": 'use /v1/completions with "stream": true',
    "/invocations": _CHAT,
    "/api/generate": "use /v1/completions",
    "/api/chat": _CHAT,
    "/api/tags": "use /v1/models",
    "/server_info": "use /version and /metrics",
    "/docs": "see /openapi.json",
    "/redoc": "see /openapi.json",
}
"""Routes of other servers, without ``/v1``, and what there is instead."""


def explain_missing(path: str, routes: Sequence[str]) -> str:
    """Says that there is no such route, and what was probably meant.

    Args:
        path: As the client wrote it, decoded.
        routes: Every path that there is.
    """
    shown = path[:100] if path.isprintable() else repr(path[:100])
    plain = re.sub(r"/{2,}", "/", path).rstrip("/")
    bare = re.sub(rf"^(?:{_BASE})+(?=/|$)", "", plain.lower())
    if bare in ELSEWHERE and plain not in routes:
        return f"{shown} is not supported by this server; {ELSEWHERE[bare]}"
    if not bare:
        return f"{shown} is the base URL of clients; GET /v1/models lists the models, GET /openapi.json the routes"
    if plain.lower() == bare and _BASE + bare in routes:
        return f"there is no {shown}; the base URL of clients ends in {_BASE}: use {_BASE}{bare}"
    nearest = max((route for route in routes if len(route) > 1 and plain.lower().endswith(route)), key=len, default=None)
    if nearest is None:
        nearest = next(iter(difflib.get_close_matches(plain.lower(), routes, n=1, cutoff=0.7)), None)
    return f"there is no {shown}; " + (f"did you mean {nearest}?" if nearest else "GET /openapi.json lists the routes")
