"""One small real engine for all tests of this folder."""

import pytest
from engine_fakes import Small, load_small
from leaks import check_idle_engines, watch

watch()


@pytest.fixture(scope="session")
def small() -> Small:
    return load_small()


@pytest.fixture(autouse=True)
def nothing_is_left():
    """Every engine that is idle after a test holds nothing."""
    yield
    check_idle_engines()
