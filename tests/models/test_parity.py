"""Logits and greedy tokens agree with transformers: with goldens in the tree here, live against torch in test_parity_live.py."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from model_checkpoints import CASES, generate_paged, make_prompts, make_tensors, write_checkpoint

from jaxpaged.engine.loading import read_config
from jaxpaged.engine.weights import load_params, match, open_checkpoint
from jaxpaged.layers.rope import attention_factor, inverse_frequencies
from jaxpaged.models.model import Model

GOLDENS = Path(__file__).parent / "goldens"
PROMPT_LENGTHS = (5, 18, 26)
NUM_TOKENS = 12
TOLERANCE = 1e-4


def load(directory: Path, name: str, **changes):
    write_checkpoint(directory, CASES[name], make_tensors(CASES[name]), dtype=changes.get("weight_dtype"), shards=3)
    model = Model.build(replace(read_config(directory, dtype="float32"), **changes))
    return model, load_params(model, match(model, open_checkpoint(directory)))


def worst_difference(name: str, generations) -> float:
    golden, worst = np.load(GOLDENS / f"{name}.npz"), 0.0
    for index, (generation, length) in enumerate(zip(generations, PROMPT_LENGTHS, strict=True)):
        assert generation.tokens == golden[f"tokens{index}"].tolist()
        worst = max(worst, float(np.abs(generation.logits[length - 1 :] - golden[f"logits{index}"]).max()))
    return worst


@pytest.mark.parametrize("name", CASES)
def test_logits_and_tokens_are_those_of_transformers(name, tmp_path):
    model, params = load(tmp_path, name)
    generations = generate_paged(model, params, make_prompts(CASES[name], PROMPT_LENGTHS), NUM_TOKENS)
    assert worst_difference(name, generations) <= TOLERANCE


@pytest.mark.parametrize("name", ["llama_tied_mha", "qwen3"])
def test_weights_kept_in_bfloat16_give_the_same_float32_logits(name, tmp_path):
    model, params = load(tmp_path, name, weight_dtype="bfloat16")
    assert params["layers.0.mlp.down.weight"].dtype == "bfloat16"
    assert params["layers.0.mlp_norm.weight"].dtype == "float32"
    generations = generate_paged(model, params, make_prompts(CASES[name], PROMPT_LENGTHS), NUM_TOKENS)
    assert worst_difference(name, generations) <= TOLERANCE


@pytest.mark.parametrize("name", ["llama_dynamic", "llama_longrope"])
def test_rotation_by_length_of_text_does_not_depend_on_chunks(name, tmp_path):
    model, params = load(tmp_path, name)
    generations = generate_paged(model, params, make_prompts(CASES[name], PROMPT_LENGTHS), NUM_TOKENS, chunk=26, page_size=8)
    assert worst_difference(name, generations) <= TOLERANCE


@pytest.mark.parametrize("name", CASES)
def test_inverse_frequencies_are_those_of_transformers(name, tmp_path):
    write_checkpoint(tmp_path, CASES[name], {})
    config = read_config(tmp_path)
    golden = np.load(GOLDENS / f"{name}.npz")
    np.testing.assert_allclose(inverse_frequencies(config), golden["inverse"], rtol=3e-7, atol=0)
    np.testing.assert_allclose(attention_factor(config), golden["factor"], rtol=1e-7)
