"""The API keys: from the options and from a file, checked before anything is served."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from jaxpaged.config import ServerConfig
from jaxpaged.errors import ConfigError

_NOT_IN_A_KEY = re.compile(r"[\s\x00-\x1f\x7f]")


@dataclasses.dataclass(frozen=True, repr=False)
class Keys:
    """Every key that is valid; true if there is any. They are never shown.

    Attributes:
        plain: Keys of clients; the requests of each are a tenant of their own.
        admin: Keys that may also do what concerns all tenants.
    """

    plain: tuple[str, ...] = ()
    admin: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.plain or self.admin)


def read_keys(config: ServerConfig) -> Keys:
    """Returns the keys that the options name, those of the file included.

    Raises:
        ConfigError: A key is empty or has a blank in it, the file cannot be read or has none, or a key is both plain and an admin's.
    """
    own = _checked("api_key", config.api_key)
    from_file = () if config.api_key_file is None else _checked(f"api_key_file {config.api_key_file}", _lines(config.api_key_file))
    admin = _checked("admin_api_key", config.admin_api_key)
    if not set(admin).isdisjoint((*own, *from_file)):
        raise ConfigError("one key is given as admin_api_key and as api_key; give each client a key of its own")
    return Keys((*own, *from_file), admin)


def _lines(path: str) -> tuple[str, ...]:
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"api_key_file {path} cannot be read: {getattr(error, 'strerror', None) or 'it is not UTF-8'}") from error
    keys = tuple(line for line in lines if line and not line.startswith("#"))
    if not keys:
        raise ConfigError(
            f"api_key_file {path} has no key: it takes one on each line; blank lines and those that begin with # are left out"
        )
    return keys


def _checked(source: str, keys: tuple[str, ...]) -> tuple[str, ...]:
    for number, key in enumerate(keys, 1):
        if not key:
            raise ConfigError(f"{source} must not be empty; leave it out to serve without a key")
        if _NOT_IN_A_KEY.search(key):
            raise ConfigError(f"{source}: key {number} has a blank or a control character in it, which no client can send")
    return keys
