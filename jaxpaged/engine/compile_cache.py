"""The directory of compiled programs, which later starts read instead of compiling. Private: what lies in it is executed."""

from __future__ import annotations

import logging
import os
import stat
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

from jaxpaged.config import cache_home
from jaxpaged.errors import ConfigError

logger = logging.getLogger(__name__)


def enable_compile_cache(directory: str | None) -> Path | None:
    """Makes JAX keep compiled programs.

    A directory that cannot be made or written to costs only time: a warning says so.

    Args:
        directory: Where; None for ``~/.cache/jaxpaged/xla``, unless JAX was told of a directory of its own; empty for no cache.

    Returns:
        The directory in use, or None.

    Raises:
        ConfigError: The directory belongs to, or is open to, somebody else.
    """
    own = getattr(jax.config, "jax_compilation_cache_dir")  # noqa: B009 - typed by nobody
    if directory is None and own:
        return Path(own)
    if directory == "":
        return None
    path = Path(directory).expanduser() if directory else cache_home() / "jaxpaged" / "xla"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir(mode=0o700, exist_ok=True)
        found = path.stat()
    except OSError as error:
        logger.warning("compiled programs are not kept: %s", error)
        return None
    _check_private(path, found)
    if not os.access(path, os.W_OK):
        logger.warning("compiled programs are not kept: %s is read-only", path)
    _set("jax_compilation_cache_dir", str(path))
    _set("jax_persistent_cache_min_compile_time_secs", 0.0)  # a CPU's programs compile in less than JAX's second
    _set("jax_persistent_cache_min_entry_size_bytes", -1)
    compilation_cache.reset_cache()  # JAX decides once, at its first compilation, whether there is a cache
    return path


def _set(name: str, value: Any) -> None:
    jax.config.update(name, value)  # type: ignore[no-untyped-call]


def _check_private(path: Path, found: os.stat_result) -> None:
    if not stat.S_ISDIR(found.st_mode):
        raise ConfigError(f"compilation_cache_dir: {path} is not a directory")
    if found.st_uid != os.getuid():
        raise ConfigError(f"compilation_cache_dir: {path} belongs to user {found.st_uid}, not to you; programs in it would be executed")
    if found.st_mode & 0o077:
        mode = stat.S_IMODE(found.st_mode)
        raise ConfigError(f"compilation_cache_dir: {path} is open to other users (mode {mode:04o}); run: chmod 700 {path}")
