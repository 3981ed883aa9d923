"""``jaxpaged collect-env``: versions and devices, for a bug report. Prints no paths, keys or environment values."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Sequence

import jax

from jaxpaged.flags import Parser

PACKAGES = (
    "jaxpaged",
    "jax",
    "jaxlib",
    "flax",
    "numpy",
    "transformers",
    "tokenizers",
    "safetensors",
    "fastapi",
    "uvicorn",
    "libtpu",
    "jax-cuda13-plugin",
    "jax-cuda12-plugin",
)


def run(argv: Sequence[str]) -> int:
    """Prints one ``name: value`` line each."""
    Parser(prog="jaxpaged collect-env", description=__doc__).parse(argv)
    print(f"python: {platform.python_version()}\nsystem: {platform.system()} {platform.release()} {platform.machine()}")
    for package in PACKAGES:
        try:
            print(f"{package}: {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            print(f"{package}: not installed")
    for device in jax.devices():
        stats = device.memory_stats() or {}
        memory = f", {stats['bytes_limit'] / 2**30:.1f} GiB" if "bytes_limit" in stats else ""
        print(f"device {device.id}: {device.platform} {device.device_kind}{memory}")
    return 0
