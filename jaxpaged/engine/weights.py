"""A checkpoint directory becomes a model's parameters: safetensors are read tensor by tensor, straight into JAX arrays.

Names and shapes of all tensors are compared with the model before any data is read, so that a checkpoint that does not fit
fails at once. Only safetensors are read: files that would have to be unpickled are named in an error and never opened.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath

import jax
import ml_dtypes
import numpy as np
import numpy.typing as npt

from jaxpaged.engine.json_files import read_json
from jaxpaged.engine.safetensors import Tensor, read_header
from jaxpaged.errors import CheckpointError
from jaxpaged.models.model import Model, Params
from jaxpaged.models.registry import family_of

Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in all."""

_INDEX = "model.safetensors.index.json"
_OTHER_FORMATS = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.h5", "*.msgpack", "*.gguf")
_IGNORED_SUFFIXES = (".rotary_emb.inv_freq",)


def load_params(model: Model, tensors: dict[str, Tensor], directory: Path, progress: Progress | None = None) -> Params:
    """Reads a model's parameters.

    Args:
        model: Says which parameters there are, their shapes and dtypes.
        tensors: As ``open_checkpoint`` returns them.
        directory: Where they lie, for messages.
        progress: Called before the first tensor and after each parameter.

    Raises:
        CheckpointError: A tensor is missing, mis-shaped, or belongs to nothing.
    """
    plan = match(model, tensors, directory)
    total, done = sum(tensor.num_bytes for sources in plan.values() for tensor in sources), 0
    params = {}
    for name, sources in plan.items():
        if progress is not None:
            progress(done, total)
        params[name] = jax.device_put(_joined(sources, np.dtype(model.specs[name].dtype)))
        done += sum(tensor.num_bytes for tensor in sources)
    if progress is not None:
        progress(done, total)
    return params


def match(model: Model, tensors: dict[str, Tensor], directory: Path) -> dict[str, list[Tensor]]:
    """Returns for each parameter the tensors whose rows it holds, in order.

    Raises:
        CheckpointError: They do not match, one to one.
    """
    table = family_of(model.config.architecture).weights
    left, plan = dict(tensors), {}
    for name, spec in model.specs.items():
        layer = next((part for part in name.split(".") if part.isdigit()), "")
        sources = table[name.replace(f".{layer}.", ".*.") if layer else name]
        plan[name] = [_take(left, source.replace("*", layer), directory) for source in sources]
        for tensor, rows in zip(plan[name], spec.parts, strict=True):
            if tensor.shape != (rows, *spec.shape[1:]):
                shape = [rows, *spec.shape[1:]]
                raise CheckpointError(f"{tensor.path}: tensor {tensor.name!r} has shape {list(tensor.shape)}, config.json asks for {shape}")
    if model.config.tie_word_embeddings:
        _check_tied(left.pop("lm_head.weight", None), plan["embed.weight"][0])
    for tensor in left.values():
        if not tensor.name.endswith(_IGNORED_SUFFIXES):
            raise CheckpointError(
                f"{tensor.path}: tensor {tensor.name!r} belongs to nothing in a {model.config.architecture} of this config.json"
            )
    return plan


def open_checkpoint(directory: Path) -> dict[str, Tensor]:
    """Returns all tensors of a directory by name, unread: of ``model.safetensors``, or of the shards that an index names.

    Raises:
        CheckpointError: A file is missing or damaged, the index disagrees with the shards, or a tensor is there twice.
    """
    index = directory / _INDEX
    weight_map = _read_index(index) if index.exists() else {}
    tensors: dict[str, Tensor] = {}
    for path in _files(directory, weight_map.values()):
        for name, tensor in read_header(path).items():
            if name in tensors:
                raise CheckpointError(f"{path}: tensor {name!r} is also in {tensors[name].path.name}")
            tensors[name] = tensor
    for name, file in weight_map.items():
        if name not in tensors or tensors[name].path.name != file:
            raise CheckpointError(f"{index}: tensor {name!r} should be in {file}, which does not hold it")
    return tensors


def _read_index(path: Path) -> dict[str, str]:
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: weight_map is missing or empty")
    for name, file in weight_map.items():
        if not isinstance(file, str) or PurePosixPath(file).name != file or "\\" in file or not file.endswith(".safetensors"):
            raise CheckpointError(f"{path}: tensor {name!r} lies in {file!r}; only .safetensors files beside the index are read")
    return weight_map


def _files(directory: Path, shards: Iterable[str]) -> list[Path]:
    paths = [directory / name for name in sorted(set(shards))]
    if not paths and (directory / "model.safetensors").exists():
        paths = [directory / "model.safetensors"]
    paths = paths or sorted(directory.glob("*.safetensors"))
    if not paths:
        others = sorted(path.name for pattern in _OTHER_FORMATS for path in directory.glob(pattern))
        found = f"; {others[0]} is not read, convert it to safetensors" if others else ""
        raise CheckpointError(f"{directory}: no .safetensors file{found}")
    for path in paths:
        if not path.is_file():
            raise CheckpointError(f"{path}: missing, but {_INDEX} names it")
    return paths


def _take(tensors: dict[str, Tensor], name: str, directory: Path) -> Tensor:
    if name not in tensors:
        raise CheckpointError(f"{directory}: tensor {name!r} is missing")
    return tensors.pop(name)


def _check_tied(head: Tensor | None, embedding: Tensor) -> None:
    if head is None:
        return
    same = head.shape == embedding.shape and head.dtype == embedding.dtype
    if not (same and np.array_equal(head.read().view(np.uint8), embedding.read().view(np.uint8))):
        raise CheckpointError(f"{head.path}: tensor {head.name!r} is not {embedding.name!r}, but config.json says tie_word_embeddings")


def _joined(tensors: list[Tensor], dtype: np.dtype) -> npt.NDArray:
    parts = [_cast(tensor.read(), dtype) for tensor in tensors]
    return np.concatenate(parts) if len(parts) > 1 else np.array(parts[0])


def _cast(values: npt.NDArray, dtype: np.dtype) -> npt.NDArray:
    if values.dtype == ml_dtypes.bfloat16 and dtype == np.float32:  # shifting bits is several times faster than a cast
        return (values.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return values.astype(dtype, copy=False)
