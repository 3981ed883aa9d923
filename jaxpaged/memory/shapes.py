"""The shape of a model as its K/V cache sees it, read without weights and without JAX."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxpaged.config import RopeScaling, suggest
from jaxpaged.errors import ConfigError

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "fp8": 1, "fp8_e4m3": 1, "int8": 1}
_SCALE_BYTES = 4
_MOST = 2**24
_LENGTH_KEYS = ("factor", "original_max_position_embeddings")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelShape:
    """What decides the bytes of a token's keys and values.

    Attributes:
        max_model_len: Longest context, in tokens.
        dtype: The checkpoint's.
        window: Sliding window in tokens if every layer has one, else None.
    """

    name: str
    num_layers: int
    num_kv_heads: int
    head_dim: int
    max_model_len: int
    dtype: str
    window: int | None = None

    def token_bytes(self, kv_cache_dtype: str = "auto") -> int:
        """Returns the bytes of one token's keys and values in all layers, scales of int8 included, a backend's padding of heads not."""
        dtype = self.dtype if kv_cache_dtype == "auto" else kv_cache_dtype
        per_head = self.head_dim * _BYTES[dtype] + (_SCALE_BYTES if dtype == "int8" else 0)
        return self.num_layers * 2 * self.num_kv_heads * per_head


def _preset(name: str, layers: int, heads: int, head_dim: int, length: int, dtype: str, window: int | None = None) -> ModelShape:
    return ModelShape(name=name, num_layers=layers, num_kv_heads=heads, head_dim=head_dim, max_model_len=length, dtype=dtype, window=window)


PRESETS = {
    shape.name: shape
    for shape in (
        _preset("llama-13b", 40, 40, 128, 2048, "float16"),
        _preset("llama-3-8b", 32, 8, 128, 8192, "bfloat16"),
        _preset("llama-3-70b", 80, 8, 128, 8192, "bfloat16"),
        _preset("mistral-7b", 32, 8, 128, 32768, "bfloat16", 4096),
        _preset("opt-13b", 40, 40, 128, 2048, "float16"),
        _preset("qwen3-0.6b", 28, 8, 128, 40960, "bfloat16"),
        _preset("qwen3-8b", 36, 8, 128, 40960, "bfloat16"),
    )
}
"""Shapes of well-known checkpoints, from their config.json files."""


def read_shape(model: str) -> ModelShape:
    """Returns the shape of a model.

    Args:
        model: A directory with a config.json, the path of a config.json, or a key of ``PRESETS``.

    Raises:
        ConfigError: It is none of these, or the file does not tell the shape.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        path = path / "config.json"
    if not path.is_file():
        preset = PRESETS.get(model.lower())
        if preset is None:
            raise ConfigError(
                f"model: {model!r} is no directory with a config.json, no such file, and no shape known by name"
                f"{suggest(model.lower(), PRESETS)}; known are {', '.join(PRESETS)}"
            )
        return preset
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"model: {path} cannot be read as JSON ({error})") from error
    if not isinstance(content, dict):
        raise ConfigError(f"model: {path} must hold a JSON object; got {type(content).__name__}")
    return shape_from_hf(content, name=path.resolve().parent.name if path.name == "config.json" else path.stem)


def shape_from_hf(hf: Mapping[str, Any], *, name: str) -> ModelShape:
    """Returns the shape that a Hugging Face config.json describes, of any family with one K/V head size, known to the engine or not.

    Raises:
        ConfigError: A key is missing or not a positive integer, or attention is of a kind that stores something else.
    """
    text = hf.get("text_config")
    hf = {**hf, **{key: value for key, value in text.items() if value is not None}} if isinstance(text, Mapping) else hf
    if hf.get("kv_lora_rank"):
        raise ConfigError(
            "config.json: kv_lora_rank is set; latent attention stores no keys and values by head, and is not understood here"
        )
    num_layers = _integer(hf, "num_hidden_layers", "n_layer")
    num_heads = _integer(hf, "num_attention_heads", "n_head")
    num_kv_heads = _integer(hf, "num_key_value_heads", default=num_heads)
    positions = _integer(hf, "max_position_embeddings", "n_positions")
    hidden = _integer(hf, "hidden_size", "n_embd", default=0 if hf.get("head_dim") else None)
    return ModelShape(
        name=name,
        num_layers=num_layers,
        num_kv_heads=num_kv_heads,
        head_dim=_integer(hf, "head_dim", default=hidden // num_heads),
        max_model_len=_scaling(hf).context_length(positions),
        dtype=_dtype(hf.get("dtype") or hf.get("torch_dtype") or "bfloat16"),
        window=_window(hf, num_layers),
    )


def _integer(hf: Mapping[str, Any], *names: str, default: int | None = None) -> int:
    """Returns the first of these keys that is set."""
    name = next((name for name in names if hf.get(name) is not None), None)
    if name is None and default is not None:
        return default
    value = None if name is None else hf[name]
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _MOST:
        raise ConfigError(f"config.json: {' or '.join(names)} must be an integer from 1 to {_MOST}; got {value!r}")
    return value


def _scaling(hf: Mapping[str, Any]) -> RopeScaling:
    """Returns what of the RoPE scaling decides the longest context."""
    values = hf.get("rope_scaling") or hf.get("rope_parameters")
    values = {key: value for key, value in values.items() if value is not None} if isinstance(values, Mapping) else {}
    given = {key: values.get(key) if key == "factor" else hf.get(key) or values.get(key) for key in _LENGTH_KEYS}
    for key, value in given.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= _MOST):
            raise ConfigError(f"config.json: {key} of the RoPE scaling must be a number from 0 to {_MOST}; got {value!r}")
    numbers = tuple((key, value) for key, value in given.items() if value is not None)
    return RopeScaling(kind=str(values.get("rope_type", values.get("type", "default"))), values=numbers)


def _dtype(value: object) -> str:
    name = str(value).removeprefix("torch.")
    if name not in ("float32", "bfloat16", "float16"):
        raise ConfigError(f"config.json: dtype must be float32, bfloat16 or float16; got {value!r}")
    return name


def _window(hf: Mapping[str, Any], num_layers: int) -> int | None:
    """Returns the window if all layers have it: a page can be given back only if no layer reads it."""
    window = hf.get("sliding_window")
    if isinstance(window, bool) or not isinstance(window, int) or window < 1 or hf.get("use_sliding_window") is False:
        return None
    kinds = hf.get("layer_types")
    if isinstance(kinds, list):
        return window if kinds == ["sliding_attention"] * num_layers else None
    if hf.get("use_sliding_window"):
        return window if hf.get("max_window_layers") == 0 else None
    return window if hf.get("model_type") == "mistral" or hf.get("architectures") == ["MistralForCausalLM"] else None
