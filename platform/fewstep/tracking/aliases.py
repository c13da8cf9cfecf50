"""Names of aliases of registered models."""

from __future__ import annotations

import re

CHALLENGER = "challenger"
"""Alias of the newest version that did not get the alias that is served."""

_ALIAS = re.compile(r"(?!latest$|v\d+$)[\w-]+", re.IGNORECASE)


def alias_fault(alias: str) -> str | None:
    """Why MLflow takes no such alias, as the end of a sentence; None if it does."""
    if _ALIAS.fullmatch(alias):
        return None
    return f"alias {alias!r} must be of letters, digits, _ and -, not 'latest' nor 'v1' (MLflow's rule)"
