"""Shapes and workloads: what is read, what is made up, and what is refused."""

from __future__ import annotations

import json
import statistics

import pytest

from jaxpaged.config import TINY_MODEL
from jaxpaged.errors import ConfigError
from jaxpaged.memory.arrivals import drop_long
from jaxpaged.memory.shapes import PRESETS, read_shape, shape_from_hf
from jaxpaged.memory.workloads import STOP_TOKEN, WORKLOADS, Call, Workload, load_workload

HF = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 64, "max_position_embeddings": 128, "torch_dtype": "float16"}

_TRAINED = "original_max_position_embeddings"


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "bfloat16", "float16", "float32", "fp8", "int8"])
def test_bytes_of_a_token_are_those_of_the_pool(kv_cache_dtype):
    """The tool loads no JAX; the engine's own count is the judge."""
    from jaxpaged.attention import page_bytes
    from jaxpaged.models.registry import family_of

    hf = json.loads((TINY_MODEL / "config.json").read_text())
    config = family_of(hf["architectures"][0]).config_from_hf(hf)
    dtype = {"auto": "bfloat16", "fp8": "float8_e4m3fn"}.get(kv_cache_dtype, kv_cache_dtype)
    theirs = page_bytes(config, 16, dtype, implementation="xla")
    assert read_shape(str(TINY_MODEL)).token_bytes(kv_cache_dtype) * 16 == theirs


def test_known_sizes():
    assert PRESETS["opt-13b"].token_bytes() == 800 * 1024, "the PagedAttention paper's 800 KB"
    assert PRESETS["llama-3-8b"].token_bytes() == 128 * 1024
    assert PRESETS["llama-3-8b"].token_bytes("int8") == 32 * 2 * 8 * (128 + 4)


def test_a_config_json_is_read_by_path_and_by_directory(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(HF))
    shape = read_shape(str(path))
    assert shape == read_shape(str(tmp_path))
    assert (shape.num_layers, shape.num_kv_heads, shape.head_dim, shape.max_model_len, shape.dtype) == (2, 4, 16, 128, "float16")


def test_shapes_of_other_families():
    gpt2 = shape_from_hf({"n_layer": 12, "n_head": 12, "n_embd": 768, "n_positions": 1024}, name="gpt2")
    assert (gpt2.num_layers, gpt2.num_kv_heads, gpt2.head_dim, gpt2.max_model_len) == (12, 12, 64, 1024)
    inside = shape_from_hf({"text_config": {**HF, "num_key_value_heads": 2, "head_dim": 32, "dtype": "float32"}}, name="inside")
    assert (inside.num_kv_heads, inside.head_dim, inside.dtype) == (2, 32, "float32")


@pytest.mark.parametrize(
    ("changes", "length"),
    [
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, 512),
        ({"rope_scaling": None, "rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, 256),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}, _TRAINED: 32}, 128),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4, _TRAINED: 256}, _TRAINED: None}, 1024),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, 128),
        ({"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0}}}, 128),
        ({"text_config": {"rope_scaling": {"rope_type": "linear", "factor": 2}, "max_position_embeddings": None}}, 256),
    ],
)  # fmt: skip
def test_the_longest_context_is_the_engines(changes, length):
    assert shape_from_hf({**HF, **changes}, name="x").max_model_len == length


@pytest.mark.parametrize(
    ("changes", "window"),
    [
        ({}, None),
        ({"sliding_window": 32, "model_type": "mistral"}, 32),
        ({"sliding_window": None, "model_type": "mistral"}, None),
        ({"sliding_window": 32, "use_sliding_window": False}, None),
        ({"sliding_window": 32, "use_sliding_window": True, "max_window_layers": 0}, 32),
        ({"sliding_window": 32, "use_sliding_window": True, "max_window_layers": 1}, None),
        ({"sliding_window": 32, "layer_types": ["sliding_attention", "full_attention"]}, None),
        ({"sliding_window": 32, "layer_types": ["sliding_attention"] * 2}, 32),
    ],
)
def test_a_window_counts_if_every_layer_has_it(changes, window):
    assert shape_from_hf({**HF, **changes}, name="x").window == window


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 0}, "num_hidden_layers or n_layer must be an integer from 1"),
        ({"num_attention_heads": "4"}, "num_attention_heads or n_head .* got '4'"),
        ({"max_position_embeddings": None}, "max_position_embeddings or n_positions"),
        ({"torch_dtype": "int4"}, "dtype must be float32, bfloat16 or float16; got 'int4'"),
        ({"kv_lora_rank": 512}, "latent attention"),
    ],
)
def test_a_bad_config_names_the_key(changes, message):
    with pytest.raises(ConfigError, match=message):
        shape_from_hf({**HF, **changes}, name="x")


def test_an_unknown_model_gets_the_nearest_name():
    with pytest.raises(ConfigError, match="did you mean 'llama-3-8b'"):
        read_shape("llama3-8b")


@pytest.mark.parametrize("name", WORKLOADS)
def test_workloads_are_reproducible_and_fit(name):
    made = load_workload(name, num_requests=60, seed=7, max_model_len=512)
    assert made == load_workload(name, num_requests=60, seed=7, max_model_len=512)
    assert made != load_workload(name, num_requests=60, seed=8, max_model_len=512)
    assert len(made.calls) == 60
    for call in made.calls:
        assert len(call.prompt) + len(call.output) <= 512
        assert call.output[-1] == STOP_TOKEN
        assert STOP_TOKEN not in call.prompt + call.output[:-1]


@pytest.mark.parametrize(("name", "prompt", "output"), [("alpaca", 19.31, 58.45), ("sharegpt", 161.31, 337.99)])
def test_the_papers_means_are_met(name, prompt, output):
    calls = load_workload(name, num_requests=200, seed=1, max_model_len=2048).calls
    assert statistics.fmean(len(call.prompt) for call in calls) == pytest.approx(prompt, abs=0.05)
    assert statistics.fmean(len(call.output) for call in calls) == pytest.approx(output, abs=0.05)


def test_a_turn_repeats_what_was_said():
    calls = load_workload("multi-turn", num_requests=50, seed=0, max_model_len=2048).calls
    later = [call for call in calls if call.after is not None]
    assert len(later) == 40
    for call in later:
        before = calls[call.after]
        said = before.prompt + before.output[:-1]
        assert call.prompt[: len(said)] == said
        assert len(call.prompt) > len(said)


def test_repeated_tokens_by_hand():
    calls = (
        Call((1, 2, 3, 4), (9, 0)),
        Call((1, 2, 5), (8, 0)),  # 1 2
        Call((1, 2, 3, 4, 9, 7), (6, 0)),  # 1 2 3 4 9
        Call((2, 3), (1, 0)),  # nothing: 2 does not begin a text
        Call((1, 2, 5), (8, 0)),  # 1 2: the last token of a prompt is always computed
    )
    assert Workload("by hand", calls).repeated_tokens() == 9


def test_what_is_too_long_is_left_out_with_what_follows_it():
    calls = [
        Call((1,) * 5, (0,)),
        Call((1,) * 9, (0,)),
        Call((1,), (0,), after=1),
        Call((1,) * 6, (0,), after=0),
        Call((1,), (0,), after=3),
    ]
    assert drop_long(calls, 8) == (calls[0], Call((1,) * 6, (0,), after=0), Call((1,), (0,), after=1))


def test_a_file_of_requests_is_read(tmp_path):
    path = tmp_path / "w.json"
    path.write_text(json.dumps({"name": "mine", "requests": [{"prompt_token_ids": [5, 6], "max_tokens": 3}]}))
    made = load_workload(str(path), num_requests=1, seed=0, max_model_len=10)
    assert made.name == "mine"
    assert made.calls[0].prompt == (5, 6)
    assert len(made.calls[0].output) == 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("no JSON", "cannot be read as JSON"),
        ("[]", "a list of requests"),
        ('{"requests": []}', "at least one"),
        ('{"requests": [7]}', r"requests\[0\] must be an object; got 7"),
        ('{"requests": [{"prompt_token_ids": [1, -2], "max_tokens": 3}]}', r"requests\[0\].prompt_token_ids .* got \[1, -2\]"),
        ('{"requests": [{"prompt_token_ids": [1], "max_tokens": true}]}', r"requests\[0\].max_tokens .* got True"),
    ],
)
def test_a_bad_file_names_the_request(tmp_path, content, message):
    path = tmp_path / "w.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        load_workload(str(path), num_requests=1, seed=0, max_model_len=10)


def test_an_unknown_workload_gets_the_nearest_name():
    with pytest.raises(ConfigError, match="did you mean 'alpaca'"):
        load_workload("alpacas", num_requests=1, seed=0, max_model_len=10)
