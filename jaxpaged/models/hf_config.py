"""Reading Hugging Face's config.json: each value is checked, and an error names the key, the value and what is allowed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from jaxpaged.config import RopeScaling
from jaxpaged.errors import ConfigError
from jaxpaged.layers.rope import ROPE_KINDS

HFConfig = Mapping[str, Any]

_MOST = 2**28
_ACTIVATIONS = ("silu", "swish")
_NUMBER_KEYS = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor?", "attention_factor?", "beta_fast?", "beta_slow?", "mscale?", "mscale_all_dim?", "original_max_position_embeddings"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "longrope": ("factor?", "attention_factor?", "original_max_position_embeddings"),
    "proportional": ("factor?", "partial_rotary_factor?"),
}
_WITH_TRAINED_LENGTH = ("yarn", "llama3", "longrope")


def integer(hf: HFConfig, key: str, default: int, *, high: int = _MOST) -> int:
    """Returns a positive integer.

    Raises:
        ConfigError: The value is something else, or above ``high``.
    """
    value = hf.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= high:
        raise bad(key, value, f"an integer from 1 to {high}")
    return value


def optional_integer(hf: HFConfig, key: str, default: int | None) -> int | None:
    """Returns a positive integer, or None where the key holds null (or is absent and has no default)."""
    return None if hf.get(key, default) is None else integer(hf, key, default or 1)


def number(hf: HFConfig, key: str, default: float) -> float:
    """Returns a positive finite number."""
    value = hf.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise bad(key, value, "a positive number")
    return float(value)


def boolean(hf: HFConfig, key: str, default: bool) -> bool:
    """Returns true or false."""
    value = hf.get(key, default)
    if not isinstance(value, bool):
        raise bad(key, value, "true or false")
    return value


def shape(hf: HFConfig, **defaults: int | None) -> dict[str, Any]:
    """Returns the sizes that all families have, under ``ModelConfig``'s names, with the other keys they share.

    Args:
        hf: The content of config.json.
        **defaults: Default of each key of the family's Hugging Face class; ``num_key_value_heads`` and ``head_dim`` of None
            mean one K/V head per query head, and ``hidden_size // num_attention_heads``.

    Raises:
        ConfigError: A value is missing, out of range or not supported.
    """
    sizes = {key: integer(hf, key, int(defaults[key] or 1)) for key in ("vocab_size", "hidden_size", "intermediate_size")}
    num_layers = integer(hf, "num_hidden_layers", int(defaults["num_hidden_layers"] or 1), high=1024)
    num_heads = integer(hf, "num_attention_heads", int(defaults["num_attention_heads"] or 1), high=4096)
    num_kv_heads = optional_integer(hf, "num_key_value_heads", defaults["num_key_value_heads"]) or num_heads
    if num_heads % num_kv_heads:
        raise bad("num_key_value_heads", num_kv_heads, f"a divisor of num_attention_heads ({num_heads})")
    head_dim = optional_integer(hf, "head_dim", defaults.get("head_dim"))
    if head_dim is None:
        if sizes["hidden_size"] % num_heads:
            raise bad("hidden_size", sizes["hidden_size"], f"a multiple of num_attention_heads ({num_heads}), or head_dim given")
        head_dim = sizes["hidden_size"] // num_heads
    if head_dim % 2:
        raise bad("head_dim", head_dim, "an even number")
    if hf.get("hidden_act", "silu") not in _ACTIVATIONS:
        raise bad("hidden_act", hf.get("hidden_act"), f"one of {', '.join(_ACTIVATIONS)}")
    if hf.get("quantization_config") is not None:
        raise bad("quantization_config", "...", "absent: quantized checkpoints are not supported; use one in bfloat16, float16 or float32")
    max_position_embeddings = integer(hf, "max_position_embeddings", int(defaults["max_position_embeddings"] or 1))
    rope_theta, rope_scaling = rope(hf, max_position_embeddings, head_dim)
    return {
        **sizes,
        "num_layers": num_layers,
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": max_position_embeddings,
        "rms_norm_eps": number(hf, "rms_norm_eps", 1e-6),
        "rope_theta": rope_theta,
        "rope_scaling": rope_scaling,
        "tie_word_embeddings": boolean(hf, "tie_word_embeddings", False),
    }


def rope(hf: HFConfig, max_position_embeddings: int, head_dim: int) -> tuple[float, RopeScaling]:
    """Returns the base and the scaling of the rotary embedding.

    Both spellings are read: ``rope_parameters`` (transformers 5, where ``rope_theta`` may lie inside), and ``rope_scaling``
    with ``rope_theta`` beside it; where both are present ``rope_scaling`` counts, as in transformers.

    Raises:
        ConfigError: The kind is unknown, or a value is missing or out of range.
    """
    name = "rope_scaling" if hf.get("rope_scaling") else "rope_parameters"
    values = hf.get(name) or {}
    if not isinstance(values, Mapping):
        raise bad(name, values, "an object or null")
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items() if value is not None}
    kind = values.get("rope_type", values.get("type", "default"))
    if kind not in ROPE_KINDS:
        raise bad(f"{name}.rope_type", kind, f"one of {', '.join(ROPE_KINDS)}")
    if nested := [key for key, value in values.items() if isinstance(value, Mapping)]:
        raise bad(f"{name}.{nested[0]}", "an object", "a plain value (one rotary embedding for all layers)")
    theta = number({"rope_theta": _first(values.get("rope_theta"), hf.get("rope_theta"), 10000.0)}, "rope_theta", 10000.0)
    scaling = {key: value for key, value in values.items() if key not in ("rope_type", "type", "rope_theta")}
    if kind in _WITH_TRAINED_LENGTH:
        key = "original_max_position_embeddings"
        scaling[key] = _first(hf.get(key), scaling.get(key), max_position_embeddings)
    for key in _NUMBER_KEYS.get(kind, ()):
        if not (key.endswith("?") and key[:-1] not in scaling):
            number({f"{name}.{key.rstrip('?')}": scaling.get(key.rstrip("?"))}, f"{name}.{key.rstrip('?')}", 0)
    _check_scaling(name, kind, scaling, hf, head_dim)
    found = RopeScaling(kind=kind, values=tuple(sorted(scaling.items())))
    if found.context_length(max_position_embeddings) > _MOST:
        raise bad(f"{name}.factor", found.get("factor"), f"so small that the stretched context has at most {_MOST} tokens")
    return theta, found


def layer_windows(hf: HFConfig, num_layers: int) -> tuple[int | None, ...]:
    """Returns the sliding window of each layer, from the keys of Qwen2 and Qwen3."""
    window = optional_integer(hf, "sliding_window", 4096) if boolean(hf, "use_sliding_window", False) else None
    first = hf.get("max_window_layers", 28)
    if isinstance(first, bool) or not isinstance(first, int) or first < 0:
        raise bad("max_window_layers", first, "an integer, at least 0")
    kinds = hf.get("layer_types")
    if kinds is None:
        kinds = ["sliding_attention" if window is not None and layer >= first else "full_attention" for layer in range(num_layers)]
    if not isinstance(kinds, list) or len(kinds) != num_layers or set(kinds) - {"sliding_attention", "full_attention"}:
        raise bad("layer_types", kinds, f"{num_layers} entries, each sliding_attention or full_attention")
    if window is None and "sliding_attention" in kinds:
        raise bad("layer_types", "sliding_attention", "full_attention, as there is no sliding_window (or use_sliding_window is false)")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def bad(key: str, value: object, allowed: str) -> ConfigError:
    """Returns the error for a value of config.json that does not fit."""
    text = repr(value)
    return ConfigError(f"config.json: {key} must be {allowed}; got {text if len(text) <= 80 else text[:77] + '...'}")


def _first(*values: Any) -> Any:
    """Returns the first that is not None: where transformers takes null, it means what an absent key means."""
    return next(value for value in values if value is not None)


def _check_scaling(name: str, kind: str, scaling: dict[str, Any], hf: HFConfig, head_dim: int) -> None:
    partial = _first(scaling.get("partial_rotary_factor"), hf.get("partial_rotary_factor"), 1.0)
    if partial != 1.0 and kind != "proportional":
        raise bad("partial_rotary_factor", partial, "1.0 (these families rotate whole heads)")
    if kind == "dynamic" and head_dim == 2:
        raise bad("head_dim", head_dim, "at least 4 with dynamic RoPE scaling")
    if kind == "llama3" and scaling["high_freq_factor"] <= scaling["low_freq_factor"]:
        raise bad(f"{name}.high_freq_factor", scaling["high_freq_factor"], f"above low_freq_factor ({scaling['low_freq_factor']})")
    if kind == "longrope":
        for key in ("short_factor", "long_factor"):
            factors = scaling.get(key)
            numbers = isinstance(factors, tuple) and all(isinstance(v, int | float) and 0 < v < math.inf for v in factors)
            if not numbers or len(factors or ()) != head_dim // 2:
                raise bad(f"{name}.{key}", factors, f"a list of {head_dim // 2} positive numbers (half of head_dim)")
