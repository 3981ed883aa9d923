"""Which pages of a browser may call this server, under which name, and what their browser is told (CORS).

A browser lets any page send requests to any address and keeps back only what it may read; and a page whose own name is made to point here
(DNS rebinding) may read it too. A key stops both. Without one, a server on loopback believes a request only if it was sent to a name that
nobody else can own, and by a page that such a name serves or that the operator has allowed. Programs send neither ``Origin`` nor
``Sec-Fetch-Site`` and are not asked.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence

from starlette.responses import Response
from starlette.types import Scope

from jaxpaged.errors import ConfigError
from jaxpaged.server.answers import Problem

_ORIGIN = re.compile(r"(https?)://(\[[0-9a-f:.]{2,45}\]|[a-z0-9_](?:[a-z0-9._-]{0,252}))(?::([1-9][0-9]{0,4}))?")
"""What a browser sends for a page of the web: in lower case, without a path, without the scheme's own port."""

_OWN_PORTS = {"http": "80", "https": "443"}
_CONTAINER_NAMES = frozenset({"host.docker.internal", "host.containers.internal"})
"""What containers call the machine that they run on; nobody can register a name under ``internal``."""

_HEADER_NAMES = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~, \t-]*")
_EXPOSED = "x-request-id, x-jaxpaged-ignored-fields, retry-after"
_PREFLIGHT_S = 600


class Callers:
    """Who may call through a browser.

    Args:
        local_only: Whether the server listens on loopback without a key, so that where a request comes from is all that protects it.
        allowed_origins: Origins that may call, and read the answers; ``*`` for all.
        allowed_hosts: Names that the server may be called by, beside those of loopback; ``*`` for all. Without any, names are
            checked only where ``local_only``.

    Raises:
        ConfigError: An origin or a name is not written as browsers write it, and would never be met.
    """

    def __init__(self, *, local_only: bool = False, allowed_origins: Sequence[str] = (), allowed_hosts: Sequence[str] = ()) -> None:
        for origin in allowed_origins:
            _check_origin(origin)
        for name in allowed_hosts:
            if name != "*" and _plain_name(name) is None:
                raise ConfigError(f"allowed_hosts takes names or addresses without a port, or *; got {name!r}")
        self._local_only = local_only
        self._allowed_origins = frozenset(allowed_origins)
        self._allowed_hosts = frozenset(name if name == "*" else _plain_name(name) for name in allowed_hosts)
        self._any_origin = "*" in self._allowed_origins
        self._check_hosts = "*" not in self._allowed_hosts and (bool(self._allowed_hosts) or (local_only and not self._any_origin))

    def refuse(self, scope: Scope) -> Problem | None:
        """Returns why a request is not answered; its ``Host`` must have passed the gate's check of its shape."""
        hosts = _values(scope, b"host")
        if self._check_hosts and hosts and not self._is_own_name(_plain_name(_without_port(hosts[0]))):
            return Problem(
                403,
                f"{hosts[0]!r} is not a name of this server; call it by localhost or 127.0.0.1, or let the operator add --allowed-hosts",
                "host_not_allowed",
            )
        if not self._local_only or self._any_origin:
            return None
        origins = _values(scope, b"origin")
        believed = (len(origins) == 1 and self.may_call(origins[0])) if origins else not _is_from_another_site(scope)
        if believed:
            return None
        return Problem(403, "this origin may not call the server; the operator can allow it with --allowed-origins", "origin_not_allowed")

    def may_call(self, origin: str) -> bool:
        """Whether pages of an origin may call and read the answers."""
        if self._any_origin or origin in self._allowed_origins:
            return True
        match = _ORIGIN.fullmatch(origin)
        return self._local_only and match is not None and int(match[3] or 0) < 2**16 and _is_loopback(match[2].strip("[]"))

    def headers(self, origin: str | None) -> list[tuple[str, str]]:
        """Returns the headers that let a page of this origin read an answer; without an origin, what a cache must know."""
        vary = [("vary", "Origin")] if (self._local_only or self._allowed_origins) and not self._any_origin else []
        if origin is None or not self.may_call(origin):
            return vary
        return [("access-control-allow-origin", "*" if self._any_origin else origin), ("access-control-expose-headers", _EXPOSED), *vary]

    def preflight(self, scope: Scope) -> Response | None:
        """Returns the answer to a browser that asks whether a page may call; None if it is no such question, or the page may not.

        A page that may call may send what headers it likes: client libraries add their own to every request.
        """
        origin = origin_of(scope)
        if (
            scope["method"] != "OPTIONS"
            or origin is None
            or not _values(scope, b"access-control-request-method")
            or not self.may_call(origin)
        ):
            return None
        headers = {"access-control-allow-methods": "GET, HEAD, POST", "access-control-max-age": str(_PREFLIGHT_S)}
        asked = ", ".join(_values(scope, b"access-control-request-headers"))
        if asked and _HEADER_NAMES.fullmatch(asked):
            headers["access-control-allow-headers"] = asked
        if _values(scope, b"access-control-request-private-network") == ["true"]:
            headers["access-control-allow-private-network"] = "true"
        return Response(headers=headers | {"vary": "Access-Control-Request-Headers"})

    def _is_own_name(self, name: str | None) -> bool:
        return name is not None and (name in self._allowed_hosts or name in _CONTAINER_NAMES or _is_loopback(name))


def origin_of(scope: Scope) -> str | None:
    """Returns the one origin that a request names."""
    origins = _values(scope, b"origin")
    return origins[0] if len(origins) == 1 else None


def _values(scope: Scope, name: bytes) -> list[str]:
    return [value.decode("latin-1") for key, value in scope["headers"] if key == name]


def _is_from_another_site(scope: Scope) -> bool:
    """Whether a browser says that a page of another site made the request (an image, a script), and not somebody who followed a link."""
    if _values(scope, b"sec-fetch-site") != ["cross-site"]:
        return False
    return _values(scope, b"sec-fetch-mode") != ["navigate"] or _values(scope, b"sec-fetch-dest") != ["document"]


def _without_port(host: str) -> str:
    return host.rpartition(":")[0] if ":" in host and not host.endswith("]") else host


def _plain_name(host: str) -> str | None:
    """Returns a name or address in lower case, without brackets and the root's dot; None if it is none."""
    name = host.lower().removesuffix(".")
    if name.startswith("[") or ":" in name:
        try:
            return str(ipaddress.ip_address(name[1:-1] if name.startswith("[") and name.endswith("]") else name))
        except ValueError:
            return None
    return name if re.fullmatch(r"[a-z0-9_](?:[a-z0-9._-]{0,252})", name) else None


def _is_loopback(name: str) -> bool:
    """Whether a name means this machine to every browser: no name server is asked for it."""
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _check_origin(origin: str) -> None:
    """Raises ConfigError if no browser would ever send this."""
    if origin in ("*", "null"):
        return
    scheme, separator, rest = origin.partition("://")
    match = _ORIGIN.fullmatch(origin)
    if match is not None and match[3] == _OWN_PORTS[match[1]]:
        raise ConfigError(f"allowed_origins: browsers leave the port of {origin!r} out; write {origin.rpartition(':')[0]!r}")
    other_scheme = separator and scheme not in _OWN_PORTS and re.fullmatch(r"[a-z][a-z0-9+.-]*", scheme) and re.fullmatch(r"[^/\s]+", rest)
    if match is None and not other_scheme:
        raise ConfigError(
            f"allowed_origins takes origins as browsers send them, like http://localhost:3000 (no path), or *; got {origin!r}"
        )
