"""The engine's whole step over the Hopper kernels, in jax's interpreter: metadata, work list, padded heads, writes, both kernels."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest
from attention_cases import SUBJECTS, _interpreter
from transformers import AutoTokenizer

from jaxpaged import StepInputs, forward_step, load_model
from jaxpaged.attention import make_pool
from jaxpaged.config import TINY_MODEL
from pallas_kernels.paged_attention import mosaic_gpu

NO_INTERPRETER = SUBJECTS["mosaic_gpu"].no_interpreter()
PAGE_SIZE = 64


def two_steps(model, params, prompts, attention):
    """Returns tokens and log-probabilities of a step of a single token and a prompt, and of the step after it."""
    pool = make_pool(model.config, 6, PAGE_SIZE, None, implementation=attention)
    step = jax.jit(functools.partial(forward_step, model, attention=attention))
    sequences, computed, said = prompts, [0, 0], []
    for num_tokens in (32, 2):
        sizes = {"page_ids": [[3], [5]], "page_size": PAGE_SIZE, "num_rows": 2, "num_tokens": num_tokens, "table_width": 2}
        output, pool = step(params, pool, StepInputs.pack(sequences, num_computed=computed, logprobs=True, **sizes))[:2]
        said.append((output.tokens.tolist(), np.asarray(output.logprobs)))
        computed = [len(sequence) for sequence in sequences]
        sequences = [[*sequence, token] for sequence, token in zip(sequences, output.tokens.tolist(), strict=True)]
    return said


@pytest.mark.skipif(NO_INTERPRETER is not None, reason=NO_INTERPRETER or "")
def test_two_steps_say_what_they_say_over_the_xla_path(monkeypatch):
    interpretable = functools.partial(mosaic_gpu.ragged_paged_attention, tiling=mosaic_gpu.INTERPRETABLE)
    monkeypatch.setattr(mosaic_gpu, "ragged_paged_attention", interpretable)
    model, params = load_model(TINY_MODEL, dtype="bfloat16")
    question = [{"role": "user", "content": "What is paged attention?"}]
    prompt = AutoTokenizer.from_pretrained(TINY_MODEL).apply_chat_template(question, add_generation_prompt=True, return_dict=False)
    prompts = [prompt[:1], prompt]
    want = two_steps(model, params, prompts, "xla")
    with _interpreter("mosaic_gpu"):
        got = two_steps(model, params, prompts, "mosaic_gpu")
    for (tokens, logprobs), (want_tokens, want_logprobs) in zip(got, want, strict=True):
        assert tokens == want_tokens
        np.testing.assert_allclose(logprobs, want_logprobs, atol=0.05)
