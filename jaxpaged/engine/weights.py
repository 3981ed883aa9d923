"""A checkpoint directory becomes a model's parameters: safetensors are read tensor by tensor, straight into JAX arrays.

Names and shapes of all tensors are compared with the model before any data is read, so that a checkpoint that does not fit
fails at once. What no parameter needs is left alone, whatever it is (a buffer of the rotary embedding, a counter), unless it is a
float: a weight that the model does not use would mean other answers. Only safetensors are read: files that would have to be unpickled
are named in an error and never opened.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath

import jax
import jax.numpy as jnp
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
_HEAD = "lm_head.weight"
_BUFFERS = "rotary_emb"
"""Module whose tensors are computed from config.json, wherever it stands in a name and whatever it holds."""

_TIED_ROWS = 4096
"""Rows of two tied tables that are compared at once."""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What lies in a directory, unread.

    Attributes:
        directory: For messages.
        tensors: Name -> the tensors of that name, one in a sound checkpoint.
        weight_map: Name -> the file that an index says it is in; empty without an index.
    """

    directory: Path
    tensors: Mapping[str, Sequence[Tensor]]
    weight_map: Mapping[str, str]

    def take(self, name: str) -> Tensor:
        """Returns a tensor that somebody needs.

        Raises:
            CheckpointError: It is missing, there twice, not where the index says, or of a dtype that no weight has.
        """
        found, file = self.tensors.get(name, ()), self.weight_map.get(name)
        if len(found) > 1:
            raise CheckpointError(f"{found[1].path}: tensor {name!r} is also in {found[0].path.name}")
        if file is not None and (not found or found[0].path.name != file):
            raise CheckpointError(f"{self.directory / _INDEX}: tensor {name!r} should be in {file}, which does not hold it")
        if not found:
            raise CheckpointError(f"{self.directory}: tensor {name!r} is missing")
        found[0].check()
        return found[0]


def load_params(model: Model, plan: Mapping[str, Sequence[Tensor]], progress: Progress | None = None) -> Params:
    """Reads a model's parameters.

    Args:
        model: Says of which dtypes they are to be.
        plan: As ``match`` returns it.
        progress: Called before the first tensor and after each parameter.
    """
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


def match(model: Model, checkpoint: Checkpoint) -> dict[str, list[Tensor]]:
    """Returns for each parameter the tensors whose rows it holds, in order.

    Raises:
        CheckpointError: One is missing, there twice, mis-shaped or of a dtype that no weight has, or a float is left over.
    """
    table = family_of(model.config.architecture).weights
    plan, used = {}, {_HEAD} if model.config.tie_word_embeddings else set()
    for name, spec in model.specs.items():
        layer = next((part for part in name.split(".") if part.isdigit()), "")
        sources = [source.replace("*", layer) for source in table[name.replace(f".{layer}.", ".*.") if layer else name]]
        plan[name] = [checkpoint.take(source) for source in sources]
        used.update(sources)
        for tensor, rows in zip(plan[name], spec.parts, strict=True):
            if tensor.shape != (rows, *spec.shape[1:]):
                shape = [rows, *spec.shape[1:]]
                raise CheckpointError(f"{tensor.path}: tensor {tensor.name!r} has shape {list(tensor.shape)}, config.json asks for {shape}")
    if model.config.tie_word_embeddings and _HEAD in checkpoint.tensors:
        _check_tied(checkpoint.take(_HEAD), plan["embed.weight"][0])
    for name, found in checkpoint.tensors.items():
        if name not in used and found[0].is_float and _BUFFERS not in name.split("."):
            raise CheckpointError(
                f"{found[0].path}: tensor {name!r} belongs to nothing in a {model.config.architecture} of this config.json"
            )
    return plan


def open_checkpoint(directory: Path) -> Checkpoint:
    """Returns what is in ``model.safetensors``, or in the shards that an index names.

    Raises:
        CheckpointError: A file is missing or damaged.
    """
    index = directory / _INDEX
    weight_map = _read_index(index) if index.exists() else {}
    tensors: dict[str, list[Tensor]] = {}
    for path in _files(directory, weight_map.values()):
        for name, tensor in read_header(path).items():
            tensors.setdefault(name, []).append(tensor)
    return Checkpoint(directory, tensors, weight_map)


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


def _check_tied(head: Tensor, embedding: Tensor) -> None:
    """Verifies that a head is the embedding's table, as far as the coarser of their dtypes can tell."""
    same = head.shape == embedding.shape
    if same:
        coarser = min(head.dtype, embedding.dtype, key=lambda dtype: jnp.finfo(dtype).nmant)  # type: ignore[no-untyped-call]
        one, other = head.read(), embedding.read()
        for start in range(0, len(one), _TIED_ROWS):
            rows = slice(start, start + _TIED_ROWS)
            same = same and _bits(one[rows], coarser) == _bits(other[rows], coarser)
    if not same:
        raise CheckpointError(f"{head.path}: tensor {head.name!r} is not {embedding.name!r}, but config.json says tie_word_embeddings")


def _bits(values: npt.NDArray, dtype: np.dtype) -> bytes:
    return values.astype(dtype, copy=False).tobytes()


def _joined(tensors: Sequence[Tensor], dtype: np.dtype) -> npt.NDArray:
    parts = [_cast(tensor.read(), dtype) for tensor in tensors]
    return np.concatenate(parts) if len(parts) > 1 else np.array(parts[0])


def _cast(values: npt.NDArray, dtype: np.dtype) -> npt.NDArray:
    if values.dtype == ml_dtypes.bfloat16 and dtype == np.float32:  # shifting bits is several times faster than a cast
        return (values.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return values.astype(dtype, copy=False)
