"""config.json becomes a ModelConfig with the defaults of transformers' own classes; what does not fit is refused by name."""

import math

import numpy as np
import pytest
import transformers
from model_checkpoints import CASES

from jaxpaged.config import ModelConfig
from jaxpaged.errors import ConfigError
from jaxpaged.layers.rope import ROPE_KINDS, inverse_frequencies
from jaxpaged.models.registry import FAMILIES, family_of

THEIRS = {
    "LlamaForCausalLM": transformers.LlamaConfig,
    "MistralForCausalLM": transformers.MistralConfig,
    "Qwen2ForCausalLM": transformers.Qwen2Config,
    "Qwen3ForCausalLM": transformers.Qwen3Config,
}
NAMES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "max_position_embeddings": "max_position_embeddings",
    "rms_norm_eps": "rms_norm_eps",
    "tie_word_embeddings": "tie_word_embeddings",
}


def read(hf: dict, architecture: str = "LlamaForCausalLM") -> ModelConfig:
    return family_of(hf.get("architectures", [architecture])[0]).config_from_hf(hf)


@pytest.mark.parametrize("architecture", FAMILIES)
def test_absent_keys_have_the_defaults_of_transformers(architecture):
    ours, theirs = read({}, architecture), THEIRS[architecture]()
    assert {key: getattr(ours, name) for key, name in NAMES.items()} == {key: getattr(theirs, key) for key in NAMES}
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads)
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert ours.rope_scaling.kind == theirs.rope_parameters["rope_type"] == "default"
    biases = {"Qwen2ForCausalLM": True}.get(architecture, getattr(theirs, "attention_bias", False))
    assert (ours.qkv_bias, ours.output_bias) == (biases, getattr(theirs, "attention_bias", False))
    assert ours.mlp_bias == getattr(theirs, "mlp_bias", False)
    layer_types = (
        getattr(theirs, "layer_types", None) or ["sliding_attention" if architecture.startswith("Mistral") else ""] * ours.num_layers
    )
    assert ours.window == tuple(theirs.sliding_window if kind == "sliding_attention" else None for kind in layer_types)


@pytest.mark.parametrize("name", CASES)
def test_a_config_saved_by_transformers_reads_the_same(name):
    hf = CASES[name]
    saved = THEIRS[hf["architectures"][0]](**{key: value for key, value in hf.items() if key != "model_type"}).to_dict()
    ours, again = read(hf), read({**saved, "architectures": hf["architectures"]})
    assert ours.rope_scaling.kind == again.rope_scaling.kind
    np.testing.assert_array_equal(inverse_frequencies(ours), inverse_frequencies(again))
    assert {key: getattr(ours, name) for key, name in NAMES.items()} == {key: getattr(again, name) for key, name in NAMES.items()}
    assert (ours.window, ours.head_dim, ours.rope_theta) == (again.window, again.head_dim, again.rope_theta)


def test_an_unknown_architecture_lists_the_known_ones():
    for unknown in ("GPT2LMHeadModel", None, ["LlamaForCausalLM"], 3):
        with pytest.raises(ConfigError, match="LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM"):
            family_of(unknown)


LONGROPE = {"rope_type": "longrope", "short_factor": [1.0] * 64, "long_factor": [2.0] * 64, "original_max_position_embeddings": 1024}
LLAMA3 = {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 1024}
BAD = [
    ("vocab_size", 0),
    ("vocab_size", -5),
    ("vocab_size", "32000"),
    ("vocab_size", True),
    ("vocab_size", None),
    ("vocab_size", 2**40),
    ("hidden_size", 4096.0),
    ("hidden_size", 4095),
    ("intermediate_size", []),
    ("num_hidden_layers", 10**9),
    ("num_hidden_layers", 0),
    ("num_attention_heads", 0),
    ("num_key_value_heads", 5),
    ("head_dim", 127),
    ("head_dim", 0),
    ("max_position_embeddings", 0),
    ("rms_norm_eps", 0),
    ("rms_norm_eps", math.nan),
    ("rms_norm_eps", "small"),
    ("rope_theta", -1),
    ("rope_theta", math.inf),
    ("tie_word_embeddings", 1),
    ("attention_bias", "no"),
    ("mlp_bias", None),
    ("hidden_act", "gelu"),
    ("hidden_act", None),
    ("quantization_config", {"quant_method": "awq"}),
    ("partial_rotary_factor", 0.5),
    ("rope_scaling", "yarn"),
    ("rope_scaling", {"rope_type": "mrope"}),
    ("rope_scaling", {"rope_type": ["yarn"]}),
    ("rope_scaling", {"rope_type": "linear"}),
    ("rope_scaling", {"rope_type": "linear", "factor": 0}),
    ("rope_scaling", {"rope_type": "linear", "factor": "2"}),
    ("rope_scaling", {"rope_type": "dynamic", "factor": math.nan}),
    ("rope_scaling", {"rope_type": "yarn", "factor": 4.0, "beta_fast": -1}),
    ("rope_scaling", {**LLAMA3, "high_freq_factor": 1}),
    ("rope_scaling", {**LLAMA3, "low_freq_factor": None}),
    ("rope_scaling", {**LONGROPE, "long_factor": [2.0] * 63}),
    ("rope_scaling", {**LONGROPE, "short_factor": None}),
    ("rope_scaling", {**LONGROPE, "short_factor": [0.0] * 64}),
    ("rope_scaling", {**LONGROPE, "short_factor": ["1"] * 64}),
    ("rope_parameters", {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}),
]


@pytest.mark.parametrize(("key", "value"), BAD, ids=lambda part: str(part)[:40])
def test_a_value_that_does_not_fit_is_refused_by_name(key, value):
    with pytest.raises(ConfigError, match=rf"^config\.json: .*{key}") as caught:
        read({key: value})
    assert " must be " in str(caught.value)
    assert len(str(caught.value)) < 400
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"use_sliding_window": True, "sliding_window": 0}, "sliding_window"),
        ({"max_window_layers": -1}, "max_window_layers"),
        ({"layer_types": ["full_attention"]}, "layer_types"),
        ({"num_hidden_layers": 1, "layer_types": ["linear_attention"]}, "layer_types"),
        ({"num_hidden_layers": 1, "layer_types": ["sliding_attention"]}, "layer_types"),
    ],
)
@pytest.mark.parametrize("architecture", ["Qwen2ForCausalLM", "Qwen3ForCausalLM"])
def test_windows_that_do_not_fit_are_refused_by_name(architecture, values, key):
    with pytest.raises(ConfigError, match=rf"^config\.json: {key} must be "):
        read(values, architecture)


def test_windows_begin_at_max_window_layers():
    config = read({"num_hidden_layers": 4, "use_sliding_window": True, "sliding_window": 32, "max_window_layers": 3}, "Qwen2ForCausalLM")
    assert config.window == (None, None, None, 32)


def test_where_both_spellings_of_rope_are_present_the_old_one_counts():
    hf = {
        "rope_scaling": {"rope_type": "linear", "factor": 2.0},
        "rope_parameters": {"rope_type": "default", "rope_theta": 5.0},
        "rope_theta": 7.0,
    }
    config = read(hf)
    assert (config.rope_scaling.kind, config.rope_theta) == ("linear", 7.0)
    assert THEIRS["LlamaForCausalLM"](**hf).rope_parameters["rope_type"] == "linear"


def test_configurations_are_hashable_whatever_their_scaling():
    for name in CASES:
        assert hash(read(CASES[name])) == hash(read(dict(CASES[name])))
    assert {read(hf).rope_scaling.kind for hf in CASES.values()} == set(ROPE_KINDS)


# ------------------------------------------------------------------------------------------------- how long a text may become


YARN = {"rope_type": "yarn", "factor": 4.0}


@pytest.mark.parametrize(
    ("scaling", "length"),
    [
        (None, 512),
        ({"rope_type": "default"}, 512),
        ({"type": "linear", "factor": 4.0}, 2048),
        ({"rope_type": "linear", "factor": 2.5}, 1280),
        ({"rope_type": "linear", "factor": 1.001}, 512),
        ({"rope_type": "dynamic", "factor": 4}, 2048),
        ({"rope_type": "proportional"}, 512),
        ({"rope_type": "proportional", "factor": 8.0, "partial_rotary_factor": 0.5}, 4096),
        (YARN, 2048),
        ({**YARN, "original_max_position_embeddings": 128}, 512),  # as DeepSeek writes it
        ({**YARN, "original_max_position_embeddings": 512}, 2048),  # as Qwen does
        ({**YARN, "factor": None, "original_max_position_embeddings": 128}, 512),
        ({**LLAMA3, "original_max_position_embeddings": 64}, 512),
        ({**LONGROPE, "factor": 32.0, "original_max_position_embeddings": 64}, 512),
    ],
)
def test_the_context_is_what_the_scaling_makes_of_the_positions(scaling, length):
    """vLLM's rule (``_get_and_verify_max_len``), spelled out."""
    for key in ("rope_scaling", "rope_parameters"):
        config = read({"max_position_embeddings": 512, key: scaling})
        assert (config.context_length, config.max_position_embeddings) == (length, 512)


def test_a_context_beyond_all_bounds_is_refused():
    with pytest.raises(ConfigError, match=r"^config\.json: rope_scaling\.factor must be so small that .* got 1000000\.0"):
        read({"rope_scaling": {"rope_type": "linear", "factor": 1e6}})


@pytest.mark.parametrize(
    ("nulls", "same"),
    [
        (
            {"original_max_position_embeddings": None, "rope_scaling": {**YARN, "original_max_position_embeddings": 512}},
            {"rope_scaling": {**YARN, "original_max_position_embeddings": 512}},
        ),
        (
            {"original_max_position_embeddings": 512, "rope_scaling": {**YARN, "original_max_position_embeddings": None}},
            {"rope_scaling": {**YARN, "original_max_position_embeddings": 512}},
        ),
        ({"rope_scaling": {**YARN, "original_max_position_embeddings": None}}, {"rope_scaling": YARN}),
        ({"original_max_position_embeddings": None}, {}),
        ({"rope_theta": None}, {}),
        ({"rope_theta": None, "rope_parameters": {"rope_theta": 7.0, "rope_type": None}}, {"rope_theta": 7.0}),
        ({"rope_theta": 7.0, "rope_parameters": {"rope_theta": None}}, {"rope_theta": 7.0}),
        ({"rope_scaling": {"rope_type": None, "type": "linear", "factor": 2}}, {"rope_scaling": {"rope_type": "linear", "factor": 2}}),
        ({"rope_scaling": {**YARN, "truncate": None, "beta_fast": None, "mscale": None}}, {"rope_scaling": YARN}),
        ({"partial_rotary_factor": None, "rope_scaling": {**YARN, "partial_rotary_factor": None}}, {"rope_scaling": YARN}),
        ({"rope_scaling": None, "rope_parameters": None}, {}),
        ({"num_key_value_heads": None, "head_dim": None, "layer_types": None, "quantization_config": None}, {}),
    ],
    ids=str,
)
def test_null_means_what_an_absent_key_means_wherever_transformers_takes_it(nulls, same):
    """Where transformers refuses null (sizes, activation, biases), so do we: see ``BAD``."""
    assert read(nulls) == read(same)
    assert read({**nulls, "vocab_size": 77}) != read(same)
