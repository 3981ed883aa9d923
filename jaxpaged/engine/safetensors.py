"""Reading safetensors files without trusting them: every header is checked in full before a byte of data is looked at.

Checked is what makes a file whole. Whether a tensor can be used is asked when somebody wants it: many files hold some that nobody does.

The format is an 8-byte length, that many bytes of JSON (name -> dtype, shape, offsets), then the data. Files are mapped into
memory, so that a tensor costs nothing until it is read. Errors name the file and the tensor.

Source: the format section of the safetensors documentation.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import math
from pathlib import Path
from typing import Any, TypeGuard

import ml_dtypes
import numpy as np
import numpy.typing as npt

from jaxpaged.errors import CheckpointError

_DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
_MAX_HEADER_BYTES = 100_000_000
_MAX_AXES = 8
_SUPPORTED = ", ".join(_DTYPES)


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a file, not read yet.

    Attributes:
        stored: The format's name of its dtype, perhaps one that is not known here.
        start: Offset of its first byte in the file.
        num_bytes: Bytes of its data.
    """

    name: str
    path: Path
    stored: str
    shape: tuple[int, ...]
    start: int
    num_bytes: int

    @property
    def is_float(self) -> bool:
        """Whether it holds floating-point numbers, of a dtype that is supported or not."""
        return self.stored.startswith(("F", "BF"))

    @property
    def dtype(self) -> np.dtype:
        """The dtype of its values, of a tensor that passes ``check``."""
        return _DTYPES[self.stored]

    def check(self) -> None:
        """Verifies that its values can be read.

        Raises:
            CheckpointError: They are of a dtype that no weight has.
        """
        if self.stored not in _DTYPES:
            raise CheckpointError(f"{self.path}: tensor {self.name!r}: dtype {self.stored!r} is not supported; supported are {_SUPPORTED}")

    def read(self) -> npt.NDArray:
        """Returns its values as a view of the mapped file."""
        if self.num_bytes == 0:
            return np.zeros(self.shape, self.dtype)
        data = np.memmap(self.path, np.uint8, "r", offset=self.start, shape=(self.num_bytes,))
        return data.view(self.dtype).reshape(self.shape)


def read_header(path: Path) -> dict[str, Tensor]:
    """Returns the tensors of a file.

    Raises:
        CheckpointError: The file is not a whole and valid safetensors file.
    """
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            start = file.read(8)
            length = int.from_bytes(start, "little")
            if len(start) < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
                what = f"its header claims {length} bytes" if len(start) == 8 else "it ends within the first 8 bytes"
                raise CheckpointError(f"{path}: truncated or not a safetensors file ({what}; the file has {size})")
            header = _parse(path, file.read(length))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error
    tensors = [_tensor(path, name, entry, 8 + length) for name, entry in header.items() if name != "__metadata__"]
    _check_layout(path, tensors, 8 + length, size)
    return {tensor.name: tensor for tensor in tensors}


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(items)
        if len(content) != len(items):
            twice = next(name for name, count in collections.Counter(name for name, _ in items).items() if count > 1)
            raise CheckpointError(f"{path}: {twice!r} appears twice in the header")
        return content

    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=pairs)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the header is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: the header is not a JSON object")
    return header


def _tensor(path: Path, name: str, entry: object, base: int) -> Tensor:
    def damaged(why: str) -> CheckpointError:
        return CheckpointError(f"{path}: tensor {name!r}: {why}")

    if not isinstance(entry, dict):
        raise damaged("its entry in the header is not an object")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str):
        raise damaged(f"dtype must be a name; got {dtype!r:.60}")
    if not _counts(shape) or len(shape) > _MAX_AXES:
        raise damaged(f"shape must be a list of at most {_MAX_AXES} sizes")
    if not _counts(offsets) or len(offsets) != 2:
        raise damaged("data_offsets must be two byte offsets")
    given = offsets[1] - offsets[0]
    taken = math.prod(shape) * _DTYPES[dtype].itemsize if dtype in _DTYPES else max(0, given)
    if given != taken:
        raise damaged(f"{dtype} of shape {list(shape)} takes {taken} bytes, its offsets give {given}")
    return Tensor(name, path, dtype, tuple(shape), base + offsets[0], given)


def _counts(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value)


def _check_layout(path: Path, tensors: list[Tensor], start: int, size: int) -> None:
    """Checks that the data is one run of tensors without holes or overlaps that ends where the file ends."""
    position = start
    for tensor in sorted(tensors, key=lambda tensor: (tensor.start, tensor.num_bytes)):
        end = tensor.start + tensor.num_bytes
        if end > size:
            raise CheckpointError(f"{path}: tensor {tensor.name!r}: truncated (ends at byte {end}, the file has {size})")
        if tensor.start != position:
            what = "overlaps the one before" if tensor.start < position else "leaves a hole before it"
            raise CheckpointError(f"{path}: tensor {tensor.name!r} {what} (starts at byte {tensor.start}, expected {position})")
        position = end
    if position != size:
        raise CheckpointError(f"{path}: {size - position} bytes after the last tensor belong to none")
