"""Finding the directory of a model: a local one, or a snapshot of a repository on the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

from jaxpaged.errors import ConfigError

_SIDE_FILES = ("*.json", "*.jinja", "tokenizer.model", "merges.txt")
_WEIGHTS = "*.safetensors"
_NOT_OURS = ("*/*", "consolidated*")
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def model_directory(model: str, revision: str | None = None, *, weights: bool = True) -> Path:
    """Returns the local directory of a model, downloading it from the hub if it is not there.

    Args:
        model: A directory, or a hub id (``owner/name``).
        revision: Branch, tag or commit of a hub id.
        weights: Whether the weights are needed; else only configuration and tokenizer files.

    Raises:
        ConfigError: There is no such directory, and it is no hub id or the hub does not give it.
    """
    path = Path(model).expanduser()
    if model and path.is_dir():
        return path
    advice = "pass a local directory, or omit MODEL for the packaged tiny model"
    if path.exists() or not _HUB_ID.fullmatch(model) or model.startswith("."):
        raise ConfigError(f"model: {model!r} is not a directory; {advice}")
    patterns = [*_SIDE_FILES, _WEIGHTS] if weights else list(_SIDE_FILES)
    try:
        return Path(huggingface_hub.snapshot_download(model, revision=revision, allow_patterns=patterns, ignore_patterns=list(_NOT_OURS)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, OSError, ValueError) as error:
        why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(f"model: {model!r} is no local directory, and the hub does not give it ({why}); {advice}") from error
