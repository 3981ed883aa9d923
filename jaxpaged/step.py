"""One step of the engine: tokens in, tokens out, everything between them on the device.

``forward_step`` is pure and unjitted, for research; ``jit_step`` is the same with the pool and the sampling state donated, so
that they are updated in place. Neither knows of requests, of text, or of what runs beside them.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp

from jaxpaged.attention import copy_shared_pages
from jaxpaged.beam_candidates import beam_candidates
from jaxpaged.models.model import Model, Params
from jaxpaged.sampling import greedy, prompt_logprobs, sample, sampled_logprobs
from jaxpaged.state import TOP_LOGPROBS, PagePool, RowFlag, SamplingState, StepInputs, StepOutput, has_flag


def forward_step(
    model: Model,
    params: Params,
    pool: PagePool,
    inputs: StepInputs,
    sampling: SamplingState | None = None,
    *,
    attention: str = "auto",
    top_logprobs: int = TOP_LOGPROBS,
) -> tuple[StepOutput, PagePool, SamplingState | None]:
    """Runs the model over a step's tokens and samples the next token of each row that asks for one.

    Args:
        model: What to run; static under jit.
        params: Its weights.
        pool: Pages; every cell that the step writes, once its copies are made, belongs to one row (the host guarantees it).
        inputs: The step's work.
        sampling: What the slots remember; None for a step on its own: all its tokens are known, and it samples greedily.
        attention: Implementation of paged attention; static under jit.
        top_logprobs: W, the most likely tokens to name where log-probabilities are asked for, at least 20; static under jit.

    Returns:
        What was sampled, the pool with the step's keys and values, and the slots' state (None if none was given).
    """
    inputs = jax.tree.map(jnp.asarray, inputs)  # NumPy arrays, where nothing traces
    if sampling is not None:
        inputs = _with_feedback(inputs, sampling)
    pool = copy_shared_pages(pool, inputs)
    hidden, pool = model.hidden(params, pool, inputs, attention=attention)
    last = inputs.cu_q_lens[1:] - 1  # [S], the token that a row samples after
    logits = model.logits(params, hidden.at[last].get(mode="clip"))  # [S, V]
    if sampling is None:
        tokens = jnp.where(has_flag(inputs.flags, RowFlag.SAMPLES), greedy(logits), -1)
    else:
        tokens, sampling = sample(logits, inputs, sampling)
    of_samples = sampled_logprobs(logits, tokens, inputs, top_logprobs)
    of_prompts = prompt_logprobs(hidden, partial(model.logits, params), inputs, top_logprobs)
    of_beams = beam_candidates(of_samples.top_ids, of_samples.top_logprobs, inputs)
    return StepOutput(tokens, *of_samples, *of_prompts, *of_beams), pool, sampling


jit_step = jax.jit(forward_step, static_argnames=("model", "attention", "top_logprobs"), donate_argnames=("pool", "sampling"))
"""``forward_step``, compiled; the pool and the sampling state passed in are gone afterwards."""


def _with_feedback(inputs: StepInputs, sampling: SamplingState) -> StepInputs:
    """Returns the inputs with each token that the host does not know yet replaced by the one its slot sampled last."""
    tokens = jnp.arange(inputs.num_tokens)
    rows = jnp.searchsorted(inputs.cu_q_lens, tokens, side="right", method="compare_all") - 1  # [T]
    slots = inputs.slots.at[rows].get(mode="clip")
    known = jnp.where(inputs.tokens < 0, sampling.last_tokens.at[slots].get(mode="clip"), inputs.tokens)
    return dataclasses.replace(inputs, ints=jnp.concatenate([known, inputs.ints[inputs.num_tokens :]]))
