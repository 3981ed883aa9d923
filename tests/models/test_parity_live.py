"""Parity with transformers, live: each family, 16 prompts, 64 greedy tokens over pages, float32. Needs torch."""

from pathlib import Path

import numpy as np
import pytest
from model_checkpoints import CASES, generate_paged, make_prompts, make_tensors, write_checkpoint

from jaxpaged.engine.loading import load_model

pytestmark = pytest.mark.slow
torch = pytest.importorskip("torch", reason="live parity compares with transformers on torch, which is not installed here")

LENGTHS = tuple(range(3, 51, 3))
NUM_TOKENS = 64
TOLERANCE = 1e-4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
def test_sixteen_prompts_decode_as_in_transformers(name, dtype, tmp_path, record_property):
    from models.make_goldens import generate_torch, load_torch

    hf = CASES[name]
    directory = write_checkpoint(tmp_path, hf, make_tensors(hf), dtype=dtype, shards=2)
    prompts = make_prompts(hf, LENGTHS)
    expected_of = load_torch(Path(directory))
    model, params = load_model(directory, dtype="float32")
    worst = 0.0
    for prompt, found in zip(prompts, generate_paged(model, params, prompts, NUM_TOKENS, chunk=7), strict=True):
        expected = generate_torch(expected_of, prompt, NUM_TOKENS)
        assert found.tokens == expected.tokens
        worst = max(worst, float(np.abs(found.logits - expected.logits).max()))
    record_property("max_logit_difference", worst)
    print(f"parity {name} {dtype} (weights kept in {model.config.matrix_dtype}): max |logit difference| {worst:.1e}")
    assert worst <= TOLERANCE
