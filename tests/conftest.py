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

_MOST_PROCESSES = 4  # each holds jax, compiled programs and a little engine: 2 to 3 GiB


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Gives the whole suite the cores that are there, each a file at a time; tests that are named run in one process, as with ``-n 0``."""
    whole = config.args_source is config.ArgsSource.TESTPATHS and not hasattr(config, "workerinput")
    asked = config.getoption("numprocesses", default=0)  # None: -n was not given; 0: pytest-xdist is not there
    if whole and asked is None and config.getoption("capture") != "no":
        config.option.numprocesses, config.option.maxprocesses, config.option.dist = "logical", _MOST_PROCESSES, "loadfile"


@pytest.fixture(autouse=True, scope="module")
def _forget_cache_directory() -> Iterator[None]:
    """Takes back the compile cache that a test gave JAX: an engine with none of its own would go on using it, and find nothing in it."""
    yield
    jax, given = sys.modules.get("jax"), os.environ.get("JAX_COMPILATION_CACHE_DIR")
    if jax is not None and jax.config.jax_compilation_cache_dir != given:
        from jax.experimental.compilation_cache import compilation_cache

        jax.config.update("jax_compilation_cache_dir", given)
        compilation_cache.reset_cache()
