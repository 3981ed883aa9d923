"""Reading the JSON files of a model directory without trusting them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jaxpaged.errors import CheckpointError

_MAX_BYTES = 64 * 2**20


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object from a file of a model directory.

    Raises:
        CheckpointError: It cannot be read, is too large, or is not a JSON object.
    """
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise CheckpointError(f"{path}: larger than {_MAX_BYTES} bytes")
        content = json.loads(path.read_bytes().decode("utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not JSON ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: not a JSON object")
    return content
