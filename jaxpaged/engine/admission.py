"""From a prompt and sampling parameters to a ``Request``: every bound that needs the model to be known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jaxpaged.engine.status import EngineInfo
from jaxpaged.scheduling.request import Request, SamplingParams


def make_params(values: Mapping[str, Any], info: EngineInfo) -> SamplingParams:
    """Makes sampling parameters from the fields a request gave; generation_config.json supplies defaults of the others.

    ``max_tokens`` absent or None means the rest of the context.

    Raises:
        RequestError: A value does not fit.
    """
    raise NotImplementedError


def make_request(
    prompt_token_ids: Sequence[int], params: SamplingParams, info: EngineInfo, *, request_id: str, prompt_param: str = "prompt", truncate: bool = False
) -> Request:
    """Checks a request against the model and completes it.

    Args:
        prompt_token_ids: At least one id, each in the model's vocabulary.
        params: As the client gave them; ``max_tokens`` None becomes the rest of the context.
        info: Of the loaded engine.
        request_id: Unique; made by the server, never by the client.
        prompt_param: The field to name in errors about the prompt (``messages`` for chat).

    Raises:
        RequestError: With code ``context_length_exceeded`` and both numbers, or naming the field whose ids are outside the
            vocabulary, or that bans every token, or that asks for too many log-probabilities.
    """
    raise NotImplementedError
