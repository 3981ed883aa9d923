"""Which version is installed."""

from __future__ import annotations

import importlib.metadata


def installed_version() -> str:
    """Returns the version, or ``unknown`` where the source is run without having been installed."""
    try:
        return importlib.metadata.version("jaxpaged")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
