"""From the name of a model to the model: find its directory, read config.json, build it, read or make its weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from jaxpaged.config import ModelConfig
from jaxpaged.engine.host_cpu import multiplies_bfloat16
from jaxpaged.engine.hub import model_directory
from jaxpaged.engine.json_files import read_json
from jaxpaged.engine.weights import Progress, load_params, match, open_checkpoint
from jaxpaged.errors import CheckpointError, ConfigError
from jaxpaged.models.hf_config import bad
from jaxpaged.models.model import Model, Params
from jaxpaged.models.registry import family_of

DTYPES = ("float32", "bfloat16", "float16")


def load_model(
    model: str | Path,
    *,
    dtype: str = "auto",
    load_format: str = "auto",
    revision: str | None = None,
    hf_overrides: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    seed: int = 0,
) -> tuple[Model, Params]:
    """Loads a model.

    Args:
        model: A local directory in Hugging Face layout, or a hub id.
        dtype: Of weights and computation; ``auto`` is the checkpoint's on GPU and TPU, and float32 on a CPU. There, matrices of
            a bfloat16 checkpoint stay in bfloat16 where that is faster: the same values, and as exact (``layers.linear``).
        load_format: ``auto`` and ``safetensors`` read the weights, ``dummy`` makes random ones and needs only config.json.
        revision: Branch, tag or commit of a hub id.
        hf_overrides: Values that replace those of config.json, objects key by key.
        progress: Called with bytes read and bytes in all.
        seed: Of dummy weights.

    Returns:
        The model, and its weights.

    Raises:
        ConfigError: The model is not found or not supported.
        CheckpointError: Its files are damaged, or do not fit each other.
    """
    dummy = load_format == "dummy"
    directory = model_directory(str(model), revision, weights=not dummy)
    config = read_config(directory, dtype=dtype, hf_overrides=hf_overrides)
    if dummy:
        built = Model.build(config)
        return built, built.init(seed)
    built = Model.build(config)
    plan = match(built, open_checkpoint(directory))
    matrices = {tensor.dtype.name for tensors in plan.values() for tensor in tensors if len(tensor.shape) == 2}
    if config.dtype == "float32" and matrices == {"bfloat16"} and jax.default_backend() == "cpu" and multiplies_bfloat16():
        built = Model.build(dataclasses.replace(config, weight_dtype="bfloat16"))
    return built, load_params(built, plan, progress)


def read_config(directory: Path, *, dtype: str = "auto", hf_overrides: Mapping[str, Any] | None = None) -> ModelConfig:
    """Reads a model's shape from its config.json.

    Raises:
        CheckpointError: The file is missing or damaged.
        ConfigError: The architecture or a value is not supported.
    """
    hf = read_hf_config(directory, hf_overrides)
    names = hf.get("architectures")
    config = family_of(names[0] if isinstance(names, list) and names else names).config_from_hf(hf)
    return dataclasses.replace(config, dtype=_resolve_dtype(dtype, hf))


def read_hf_config(directory: Path, hf_overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Returns what config.json says with the overrides in it; nothing of the engine reads the file but through here.

    Objects are overridden key by key. An override counts whichever of two spellings it and the file use for the same thing.

    Raises:
        CheckpointError: The file is missing or damaged.
    """
    path = directory / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{path}: missing; a model directory in Hugging Face layout has one")
    content = read_json(path)
    return _merged(_in_one_spelling(content), _in_one_spelling(hf_overrides)) if hf_overrides else content


def _in_one_spelling(content: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the same with one key for each thing that has two, of which the same one counts as where both are read."""
    content = dict(content)
    for old, new in (("torch_dtype", "dtype"), ("rope_parameters", "rope_scaling")):
        if old in content:
            value = content.pop(old)
            content[new] = content.get(new) or value
    if isinstance(content.get("rope_scaling"), Mapping):
        scaling = dict(content["rope_scaling"])
        if (base := scaling.pop("rope_theta", None)) is not None:
            content["rope_theta"] = base
        if (kind := scaling.pop("type", None)) is not None and scaling.get("rope_type") is None:
            scaling["rope_type"] = kind
        if (trained := content.pop("original_max_position_embeddings", None)) is not None:
            scaling["original_max_position_embeddings"] = trained
        content["rope_scaling"] = scaling
    return content


def _resolve_dtype(dtype: str, hf: Mapping[str, Any]) -> str:
    if dtype != "auto":
        if dtype not in DTYPES:
            raise ConfigError(f"dtype must be one of auto, {', '.join(DTYPES)}; got {dtype!r}")
        return dtype
    stored = hf.get("dtype") or hf.get("torch_dtype") or "float32"
    if stored not in DTYPES:
        raise bad("dtype", stored, f"one of {', '.join(DTYPES)}")
    return "float32" if jax.default_backend() == "cpu" else str(stored)


def _merged(content: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(content)
    for key, value in overrides.items():
        old = merged.get(key)
        merged[key] = _merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged
