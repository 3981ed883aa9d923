"""One small real engine for all tests of this folder."""

import pytest
from engine_fakes import Small, load_small


@pytest.fixture(scope="session")
def small() -> Small:
    return load_small()
