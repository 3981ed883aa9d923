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
def _forget_programs() -> Iterator[None]:
    """Drops compiled programs after each file: thousands of them use up the memory maps that a process may have, and it crashes."""
    yield
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()
