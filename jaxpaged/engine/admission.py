"""From a prompt and sampling parameters to a ``Request``: every bound that needs the model to be known."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from jaxpaged.engine.status import EngineInfo
from jaxpaged.errors import RequestError
from jaxpaged.scheduling.fields import MAX_BEAM_WIDTH, SAMPLING_FIELDS, are_ints
from jaxpaged.scheduling.request import Request, SamplingParams

_BEAM_CANDIDATES = 2 * MAX_BEAM_WIDTH
"""Most likely tokens of each beam that a search looks at (``beam_candidates``)."""

_OF_SAMPLES = frozenset(field.name for field in SAMPLING_FIELDS if field.goes_with == "samples")


def make_params(values: Mapping[str, Any], info: EngineInfo) -> SamplingParams:
    """Makes sampling parameters from the fields that a request gave, and checks them against the model.

    generation_config.json supplies defaults of the others. Its sampling values say nothing about a beam search and are left out of
    one; its ``max_tokens`` is a bound and not a wish, so it is left to ``make_request``, which knows the room.

    Args:
        values: Fields by name; None counts as not given.
        info: Of the loaded engine.

    Raises:
        RequestError: A value does not fit.
    """
    given = {name: value for name, value in values.items() if value is not None}
    left_out = _OF_SAMPLES | {"max_tokens"} if given.get("use_beam_search") else {"max_tokens"}
    defaults = {name: value for name, value in info.default_sampling.items() if name not in left_out}
    params = SamplingParams(**{"max_tokens": None, **defaults, **given})
    check_params(params, info)
    return params


def check_params(params: SamplingParams, info: EngineInfo) -> None:
    """Checks sampling parameters against the model: all that does not depend on a prompt, so once for the prompts of a call.

    Raises:
        RequestError: Names the field whose ids are outside the vocabulary, or that leaves no token to generate, or that asks for too
            many log-probabilities or for more sequences than a batch holds.
    """
    _check_masks(params, info)
    _check_num_sequences(params, info)
    for name in ("logprobs", "prompt_logprobs"):
        if (getattr(params, name) or 0) > info.max_logprobs:
            raise RequestError(f"{name} must be at most {info.max_logprobs} here; got {getattr(params, name)}", param=name)


def make_request(
    prompt_token_ids: Sequence[int],
    params: SamplingParams,
    info: EngineInfo,
    *,
    request_id: str,
    prompt_param: str = "prompt",
    tenant: str = "",
    default_max_tokens: int | None = None,
    refuse_excess: bool = True,
) -> Request:
    """Checks a prompt against the model and makes a request of it. The parameters are shared, not copied.

    Args:
        prompt_token_ids: At least one id, each in the model's vocabulary; cut on the left if ``params.truncate_prompt_tokens`` says so.
        params: Checked by ``make_params`` or ``check_params``. ``max_tokens`` None becomes the default, but not more than the rest of
            the context, or for several sequences what the pool holds of them together, and not less than ``min_tokens``.
        info: Of the loaded engine.
        request_id: Unique; made by the server, never by the client.
        prompt_param: The field to name in errors about the prompt (``messages`` for chat).
        tenant: Whose request it is, see ``Request``; made by the server, never by the client.
        default_max_tokens: Most tokens where ``params`` do not say; default: generation_config.json's, or no bound of its own.
        refuse_excess: Whether ``max_tokens`` beyond the rest of the context is refused; else the output ends with the context.

    Raises:
        RequestError: With code ``context_length_exceeded`` and both numbers, or naming the prompt's field, whose ids are outside the
            vocabulary.
    """
    if len(prompt_token_ids) == 0:
        raise RequestError(f"{prompt_param} must hold at least one token", param=prompt_param)
    kept = _num_kept(params, info)
    prompt_token_ids = prompt_token_ids if kept is None else prompt_token_ids[-kept:]
    rest = _rest_of_context(len(prompt_token_ids), params, info, prompt_param, refuse_excess)
    if params.max_tokens is None:
        bound = default_max_tokens or info.default_sampling.get("max_tokens") or rest
        max_tokens = max(params.min_tokens, min(bound, rest, _rest_of_pool(len(prompt_token_ids), params.num_sequences, info)))
    else:
        max_tokens = min(params.max_tokens, rest)
    _check_vocabulary(prompt_param, prompt_token_ids, info)
    return Request(
        id=request_id,
        prompt=tuple(map(int, prompt_token_ids)),
        params=params,
        max_tokens=max(1, max_tokens),  # the token after a prompt that is wanted alone is dropped by ``OutputProcessor``
        eos_token_ids=_eos_token_ids(info),
        seed=params.seed if params.seed is not None else _draw_seed(info.seed, request_id),
        arrival_s=time.monotonic(),
        tenant=tenant,
    )


def _eos_token_ids(info: EngineInfo) -> tuple[int, ...]:
    """Returns the ids that end a sequence and that the model can generate."""
    return tuple(token_id for token_id in info.eos_token_ids if token_id < info.model_config.vocab_size)


def _num_kept(params: SamplingParams, info: EngineInfo) -> int | None:
    """Returns how many of a prompt's last tokens are kept, at least 1; None for all."""
    if params.truncate_prompt_tokens == -1:
        return max(1, info.max_request_tokens - max(1, params.max_tokens or params.min_tokens))
    return params.truncate_prompt_tokens


def _rest_of_context(num_prompt: int, params: SamplingParams, info: EngineInfo, prompt_param: str, refuse_excess: bool) -> int:
    """Returns how many tokens there is room for after a prompt.

    Raises:
        RequestError: None, or fewer than what was asked for.
    """
    limit, source = info.max_request_tokens, "the model's context length"
    if limit < info.max_model_len:
        source = "the longest request that the page pool holds"
    rest = limit - num_prompt
    if rest < 1:
        message = f"{prompt_param} has {num_prompt} tokens, but {source} is {limit} tokens, of which at least one is for the output"
        raise RequestError(message, param=prompt_param, code="context_length_exceeded")
    if params.min_tokens > rest and (params.max_tokens is None or not refuse_excess):
        message = f"min_tokens {params.min_tokens} and a prompt of {num_prompt} tokens are more than {source} ({limit} tokens)"
        raise RequestError(message, param="min_tokens", code="context_length_exceeded")
    if refuse_excess and params.max_tokens is not None and params.max_tokens > rest:
        total = num_prompt + params.max_tokens
        message = (
            f"{source} is {limit} tokens, but {total} were asked for: {num_prompt} in {prompt_param} and {params.max_tokens} for "
            f"the output; lower max_tokens to {rest} or shorten the prompt"
        )
        raise RequestError(message, param="max_tokens", code="context_length_exceeded")
    return rest


def _rest_of_pool(num_prompt: int, num_sequences: int, info: EngineInfo) -> int:
    """Returns how many tokens each sequence can grow by in a pool of its own: full pages of the prompt are shared, the others are not."""
    shared = (num_prompt - 1) // info.page_size
    pages_each = shared + (info.num_pages - 1 - shared) // num_sequences
    return pages_each * info.page_size - num_prompt


def _check_vocabulary(param: str, token_ids: Collection[int], info: EngineInfo) -> None:
    vocab = info.model_config.vocab_size
    if not token_ids or (are_ints(token_ids) and min(token_ids) >= 0 and max(token_ids) < vocab):
        return
    for position, token_id in enumerate(token_ids):
        if isinstance(token_id, bool) or not isinstance(token_id, int) or not 0 <= token_id < vocab:
            message = f"{param} must hold token ids in [0, {vocab - 1}]; got {token_id!r} at position {position}"
            raise RequestError(message[:300], param=param, code="invalid_token_id")


def _check_masks(params: SamplingParams, info: EngineInfo) -> None:
    """Refuses ids outside the vocabulary, and masks that leave no token to choose, with or without those that end the output.

    A bias is finite and so forbids nothing. A beam search chooses among the 20 most likely tokens, which must not all be forbidden.
    """
    vocab = info.model_config.vocab_size
    for name in ("logit_bias", "allowed_token_ids", "bad_token_ids", "stop_token_ids"):
        _check_vocabulary(name, getattr(params, name) or (), info)
    allowed = None if params.allowed_token_ids is None else set(params.allowed_token_ids)
    name = "allowed_token_ids" if allowed is not None else "bad_token_ids" if params.bad_token_ids else "stop_token_ids"
    forbidden = set(params.bad_token_ids or ())

    def none_left() -> bool:
        return len(forbidden) >= vocab if allowed is None else allowed <= forbidden

    if none_left():
        raise RequestError(f"{name} leaves no token that may be generated", param=name)
    if params.min_tokens:
        ends = {*(params.stop_token_ids or ()), *(() if params.ignore_eos else _eos_token_ids(info))}
        forbidden |= ends
        if none_left():
            message = f"{name} leaves only tokens that end the output, and none may before min_tokens ({params.min_tokens}) are generated"
            raise RequestError(message, param=name)
        if params.use_beam_search and len(ends) >= _BEAM_CANDIDATES:
            message = f"min_tokens with use_beam_search needs fewer than {_BEAM_CANDIDATES} tokens that end the output; got {len(ends)}"
            raise RequestError(message, param="stop_token_ids")


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
