"""The directory of compiled programs, which later starts read instead of compiling. Private: what lies in it is executed."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
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


_ENTRIES = "*-cache"
_SEAL = ".sha256"


@dataclasses.dataclass(frozen=True)
class CompileCache:
    """A directory of compiled programs that JAX reads and writes.

    JAX neither replaces an entry that it cannot read nor sees that one is another program's. So each entry gets a seal, a file beside it
    with the digest of its content, once it is known to be written to the end; at the next start what does not match its seal is removed.

    Attributes:
        path: Where, without symbolic links: the path is part of what JAX finds entries by.
        is_ours: Whether its entries get seals; not in a directory that JAX was told of by somebody else.
    """

    path: Path
    is_ours: bool

    def seal(self) -> None:
        """Seals what was compiled since the last time."""
        if self.is_ours:
            with contextlib.suppress(OSError):  # read-only, full, or emptied meanwhile: costs only time
                for entry in self.path.glob(_ENTRIES):
                    if not _seal_of(entry).exists():
                        _seal_of(entry).write_text(_digest(entry), encoding="ascii")

    def drop_damaged(self) -> None:
        """Removes entries without a matching seal, and seals without an entry."""
        entries = list(self.path.glob(_ENTRIES))
        damaged = [entry for entry in entries if not _is_whole(entry)]
        orphans = [seal for seal in self.path.glob(_ENTRIES + _SEAL) if not seal.with_name(seal.name.removesuffix(_SEAL)).exists()]
        try:
            for file in (*damaged, *map(_seal_of, damaged), *orphans):
                file.unlink(missing_ok=True)
        except OSError as error:
            logger.warning("compile cache %s: damaged programs cannot be removed: %s", self.path, error)
        if damaged:
            message = "compile cache %s: %d of %d programs were damaged, exchanged or not written to the end, and are compiled anew"
            logger.warning(message, self.path, len(damaged), len(entries))


def enable_compile_cache(directory: str | None) -> CompileCache | None:
    """Makes JAX keep compiled programs.

    A directory that cannot be made or written to costs only time: a warning says so.

    Args:
        directory: Where; None for ``~/.cache/jaxpaged/xla``, unless JAX was told of a directory of its own; empty for no cache.

    Returns:
        The cache in use, or None.

    Raises:
        ConfigError: The directory belongs to, or is open to, somebody else.
    """
    own = getattr(jax.config, "jax_compilation_cache_dir")  # noqa: B009 - typed by nobody
    if directory is None and own:
        return CompileCache(Path(own), any(Path(own).glob(_ENTRIES + _SEAL)))
    if directory == "":
        return None
    path = Path(directory).expanduser() if directory else cache_home() / "jaxpaged" / "xla"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir(mode=0o700, exist_ok=True)
        path = path.resolve()
        found = path.stat()
    except OSError as error:
        logger.warning("compiled programs are not kept: %s", error)
        return None
    _check_private(path, found)
    cache = CompileCache(path, is_ours=True)
    if os.access(path, os.W_OK):
        cache.drop_damaged()
    else:
        logger.warning("compiled programs are not kept: %s is read-only", path)
    _set("jax_compilation_cache_dir", str(path))
    _set("jax_persistent_cache_min_compile_time_secs", 0.0)  # a CPU's programs compile in less than JAX's second
    _set("jax_persistent_cache_min_entry_size_bytes", -1)
    compilation_cache.reset_cache()  # JAX decides once, at its first compilation, whether there is a cache
    return cache


def _seal_of(entry: Path) -> Path:
    return entry.with_name(entry.name + _SEAL)


def _digest(entry: Path) -> str:
    with entry.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_whole(entry: Path) -> bool:
    try:
        return _seal_of(entry).read_text(encoding="ascii") == _digest(entry)
    except (OSError, UnicodeDecodeError):
        return False


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
