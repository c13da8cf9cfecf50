"""Passwords in addresses, as in https://user:password@host: addresses are written to recipes, runs and logs."""

from __future__ import annotations

import re

_SCHEME = re.compile(r"\s*[a-z][\w+.-]*://", re.IGNORECASE)
_AUTHORITY_END = re.compile(r"[/?#]")
_HTTP_HOST = re.compile(r"(?:\[[^\]/@]*\]|[^/@:]*)(?::\d+)?(?:[/?#]|$)")
_SECRET_IN_QUERY = re.compile(r"(?P<name>[?&][^=&#]*(?:passw|pwd|secret|token)[^=&#]*=)[^&#]*", re.IGNORECASE)


def has_password(address: str) -> bool:
    """Whether an address holds a password, or a secret key: before its host, or among its options."""
    return _host_begins(address) is not None or _SECRET_IN_QUERY.search(address) is not None


def without_password(address: str) -> str:
    """The address without user and password, and with `…` for a secret among its options."""
    scheme, begin = _SCHEME.match(address), _host_begins(address)
    if begin is not None:
        address = (scheme[0] if scheme else "") + address[begin:]
    return _SECRET_IN_QUERY.sub(r"\g<name>…", address)


def _host_begins(address: str) -> int | None:
    """Where the host begins, behind a user with a password; None where there is no password."""
    scheme = _SCHEME.match(address)
    begin = scheme.end() if scheme else 0
    authority = _AUTHORITY_END.split(address[begin:], maxsplit=1)[0]
    user, at, _ = authority.rpartition("@")
    if at:
        return begin + len(user) + 1 if ":" in user else None
    # A secret key may hold slashes, and a database's password too; of HTTP, what stands there may be a port.
    is_http = scheme is not None and scheme[0].strip().lower().startswith("http")
    if scheme is None or ":" not in authority or (is_http and _HTTP_HOST.match(address[begin:])):
        return None
    end = address.rfind("@")
    return end + 1 if end > begin else None
