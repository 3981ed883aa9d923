"""Which architectures there are. A new family is one file and one line here."""

from __future__ import annotations

from jaxpaged.errors import ConfigError
from jaxpaged.models import llama, mistral, qwen2, qwen3
from jaxpaged.models.family import Family

FAMILIES: dict[str, Family] = {module.FAMILY.architecture: module.FAMILY for module in (llama, mistral, qwen2, qwen3)}


def family_of(architecture: object) -> Family:
    """Returns the family of a Hugging Face class name.

    Raises:
        ConfigError: There is none; lists those there are.
    """
    family = FAMILIES.get(architecture) if isinstance(architecture, str) else None
    if family is None:
        raise ConfigError(f"config.json: architecture {architecture!r} is not supported; supported are {', '.join(sorted(FAMILIES))}")
    return family
