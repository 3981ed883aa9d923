"""A server that speaks OpenAI's chat API, for ``jaxpaged chat --url``. Loads nothing of a model, so the prompt is there at once."""

from __future__ import annotations

import contextlib
import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Generator, Iterator
from typing import Any

from jaxpaged.commands.talker import Message, Piece
from jaxpaged.errors import ConfigError, GenerationError, RequestError

_MODELS_S = 30.0
"""Seconds within which a server that lives lists its models."""


class RemoteModel:
    """One model of a server.

    Args:
        url: Of the server, with or without scheme and ``/v1``.
        api_key: Sent as a bearer token.
        model: Which of the server's models; None for its first.
        sampling: Request fields that hold for each answer.

    Raises:
        ConfigError: The server cannot be reached, does not list models, or has no model of that name.
    """

    def __init__(self, url: str, api_key: str | None, model: str | None, sampling: dict[str, Any]) -> None:
        self._url = (url if "://" in url else f"http://{url}").rstrip("/").removesuffix("/v1") + "/v1"
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {api_key}"} if api_key else {})
        self._sampling = sampling
        self._model, self._context = self._find(model)

    @property
    def introduction(self) -> str:
        """Name, server and context."""
        context = f", context {self._context} tokens" if self._context else ""
        return f"{self._model} at {self._url.removesuffix('/v1')}{context}"

    def answer(self, messages: list[Message]) -> Generator[Piece, None, None]:
        """Yields the answer piece by piece."""
        usage = {"stream_options": {"include_usage": True}}
        body = {"model": self._model, "messages": messages, "stream": True, **usage, **self._sampling}
        try:
            with contextlib.closing(self._open("/chat/completions", body)) as response:
                for line in response:
                    data = line.decode().removeprefix("data: ").strip()
                    if data == "[DONE]":
                        return
                    if line.startswith(b"data: "):
                        yield from _pieces(json.loads(data))
        except urllib.error.HTTPError as error:
            raise RequestError(_message(error)) from error
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise GenerationError(f"{self._url}: {getattr(error, 'reason', error)}") from error
        raise GenerationError(f"{self._url}: the answer broke off")

    def _find(self, model: str | None) -> tuple[str, int | None]:
        """Returns the model's name and its longest context, if the server tells."""
        try:
            with contextlib.closing(self._open("/models", timeout_s=_MODELS_S)) as response:
                models = {str(entry["id"]): entry.get("max_model_len") for entry in json.load(response)["data"]}
        except urllib.error.HTTPError as error:
            raise ConfigError(f"--url {self._url}: {_message(error)}") from error
        except (OSError, http.client.HTTPException) as error:
            raise ConfigError(f"--url {self._url}: {getattr(error, 'reason', error)}") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"--url {self._url}: it does not list models as OpenAI's API does") from error
        name = model or next(iter(models), None)
        if name is None or name not in models:
            raise ConfigError(f"--url {self._url}: its models are {', '.join(models) or 'none'}" + (f"; not {name}" if name else ""))
        return name, models[name]

    def _open(self, path: str, body: dict[str, Any] | None = None, timeout_s: float | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        return urllib.request.urlopen(urllib.request.Request(self._url + path, data=data, headers=self._headers), timeout=timeout_s)


def _pieces(chunk: dict[str, Any]) -> Iterator[Piece]:
    """Yields what one event of a stream brings."""
    if "error" in chunk:
        raise GenerationError(chunk["error"]["message"])
    for choice in chunk.get("choices") or ():
        yield Piece(choice["delta"].get("content") or "")
    if chunk.get("usage"):
        yield Piece(num_tokens=chunk["usage"]["completion_tokens"])


def _message(error: urllib.error.HTTPError) -> str:
    try:
        return f"{error.code}: {json.load(error)['error']['message']}"
    except (ValueError, KeyError, TypeError):
        return f"{error.code}: {error.reason}"
