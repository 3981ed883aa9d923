"""From a prompt and sampling parameters to a ``Request``: every bound that needs the model to be known."""

from __future__ import annotations

import dataclasses
import hashlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

from jaxpaged.engine.status import EngineInfo
from jaxpaged.errors import RequestError
from jaxpaged.scheduling.fields import SAMPLING_FIELDS
from jaxpaged.scheduling.request import Request, SamplingParams

_OF_SAMPLES = frozenset(field.name for field in SAMPLING_FIELDS if field.goes_with == "samples")


def make_params(values: Mapping[str, Any], info: EngineInfo) -> SamplingParams:
    """Makes sampling parameters from the fields that a request gave; generation_config.json supplies defaults of the others.

    Its sampling values say nothing about a beam search and are left out of one.

    Args:
        values: Fields by name; None counts as not given. ``max_tokens`` left out means the rest of the context.
        info: Of the loaded engine.

    Raises:
        RequestError: A value does not fit.
    """
    given = {name: value for name, value in values.items() if value is not None}
    searching = given.get("use_beam_search")
    defaults = {name: value for name, value in info.default_sampling.items() if not (searching and name in _OF_SAMPLES)}
    return SamplingParams(**{"max_tokens": None, **defaults, **given})


def make_request(
    prompt_token_ids: Sequence[int],
    params: SamplingParams,
    info: EngineInfo,
    *,
    request_id: str,
    prompt_param: str = "prompt",
    tenant: str = "",
) -> Request:
    """Checks a request against the model and completes it.

    Args:
        prompt_token_ids: At least one id, each in the model's vocabulary.
        params: As the client gave them; ``max_tokens`` None becomes the rest of the context, or for several sequences what the
            pool holds of them together if that is less.
        info: Of the loaded engine.
        request_id: Unique; made by the server, never by the client.
        prompt_param: The field to name in errors about the prompt (``messages`` for chat).
        tenant: Whose request it is, see ``Request``; made by the server, never by the client.

    Raises:
        RequestError: With code ``context_length_exceeded`` and both numbers, or naming the field whose ids are outside the
            vocabulary, or that bans every token, or that asks for too many log-probabilities or for more sequences than a batch holds.
    """
    if len(prompt_token_ids) == 0:
        raise RequestError(f"{prompt_param} must hold at least one token", param=prompt_param)
    params = dataclasses.replace(params, max_tokens=_resolve_max_tokens(len(prompt_token_ids), params, info, prompt_param))
    _check_vocabulary(prompt_param, prompt_token_ids, info)
    _check_masks(params, info)
    _check_num_sequences(params, info)
    for name in ("logprobs", "prompt_logprobs"):
        if (getattr(params, name) or 0) > info.max_logprobs:
            raise RequestError(f"{name} must be at most {info.max_logprobs} here; got {getattr(params, name)}", param=name)
    seed = params.seed if params.seed is not None else _draw_seed(info.seed, request_id)
    eos = tuple(token_id for token_id in info.eos_token_ids if token_id < info.model_config.vocab_size)
    prompt = tuple(int(token_id) for token_id in prompt_token_ids)
    return Request(id=request_id, prompt=prompt, params=params, eos_token_ids=eos, seed=seed, arrival_s=time.monotonic(), tenant=tenant)


def _resolve_max_tokens(num_prompt: int, params: SamplingParams, info: EngineInfo, prompt_param: str) -> int:
    limit, source = info.max_request_tokens, "the model's context length"
    if limit < info.max_model_len:
        source = "the longest request that the page pool holds"
    rest = limit - num_prompt
    if rest < 1:
        message = f"{prompt_param} has {num_prompt} tokens, but {source} is {limit} tokens, of which at least one is for the output"
        raise RequestError(message, param=prompt_param, code="context_length_exceeded")
    if params.max_tokens is None:
        if params.min_tokens > rest:
            message = f"min_tokens {params.min_tokens} and a prompt of {num_prompt} tokens are more than {source} ({limit} tokens)"
            raise RequestError(message, param="min_tokens", code="context_length_exceeded")
        return max(1, params.min_tokens, min(rest, _rest_of_pool(num_prompt, params.num_sequences, info)))
    if params.max_tokens > rest:
        total = num_prompt + params.max_tokens
        message = (
            f"{source} is {limit} tokens, but {total} were asked for: {num_prompt} in {prompt_param} and {params.max_tokens} for "
            f"the output; lower max_tokens to {rest} or shorten the prompt"
        )
        raise RequestError(message, param="max_tokens", code="context_length_exceeded")
    return params.max_tokens


def _rest_of_pool(num_prompt: int, num_sequences: int, info: EngineInfo) -> int:
    """Returns how many tokens each sequence can grow by in a pool of its own: full pages of the prompt are shared, the others are not."""
    shared = (num_prompt - 1) // info.page_size
    pages_each = shared + (info.num_pages - 1 - shared) // num_sequences
    return pages_each * info.page_size - num_prompt


def _check_vocabulary(param: str, token_ids: Sequence[int], info: EngineInfo) -> None:
    vocab = info.model_config.vocab_size
    for position, token_id in enumerate(token_ids):
        if isinstance(token_id, bool) or not isinstance(token_id, int) or not 0 <= token_id < vocab:
            message = f"{param} must hold token ids in [0, {vocab - 1}]; got {token_id!r} at position {position}"
            raise RequestError(message[:300], param=param, code="invalid_token_id")


def _check_masks(params: SamplingParams, info: EngineInfo) -> None:
    """Refuses ids outside the vocabulary, and masks that leave no token to choose."""
    vocab = info.model_config.vocab_size
    for name in ("logit_bias", "allowed_token_ids", "bad_token_ids", "stop_token_ids"):
        _check_vocabulary(name, tuple(getattr(params, name) or ()), info)
    bad = set(params.bad_token_ids or ())
    allowed = None if params.allowed_token_ids is None else set(params.allowed_token_ids)
    if len(bad) >= vocab or (allowed is not None and allowed <= bad):
        name = "bad_token_ids" if allowed is None else "allowed_token_ids"
        raise RequestError(f"{name} leaves no token that may be generated", param=name)


def _check_num_sequences(params: SamplingParams, info: EngineInfo) -> None:
    """Refuses a request whose sequences, which run together, can never be in one batch."""
    if params.num_sequences > info.max_num_seqs:
        name = params.counting_field
        message = f"{name} must be at most {info.max_num_seqs} here, the sequences of a batch (max_num_seqs); got {params.num_sequences}"
        raise RequestError(message, param=name)


def _draw_seed(engine_seed: int, request_id: str) -> int:
    """Returns a seed for a request that brings none: the same engine seed and request id give the same one."""
    digest = hashlib.blake2b(f"{engine_seed}/{request_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
