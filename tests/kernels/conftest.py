"""Keeps the tests of this folder from using up their process's memory maps."""

from collections.abc import Iterator

import jax
import pytest


@pytest.fixture(autouse=True, scope="module")
def _forget_programs() -> Iterator[None]:
    """Drops compiled programs after each file: thousands of them are more maps than a process may have, and it crashes."""
    yield
    jax.clear_caches()
