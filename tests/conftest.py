"""Test-wide settings: CPU only, no network, shared fakes importable as ``from fakes import ...``."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True, scope="module")
def _forget_cache_directory() -> Iterator[None]:
    """Takes back the compile cache that a test gave JAX: an engine with none of its own would go on using it, and find nothing in it."""
    yield
    jax, given = sys.modules.get("jax"), os.environ.get("JAX_COMPILATION_CACHE_DIR")
    if jax is not None and jax.config.jax_compilation_cache_dir != given:
        from jax.experimental.compilation_cache import compilation_cache

        jax.config.update("jax_compilation_cache_dir", given)
        compilation_cache.reset_cache()
