"""Which version of a registered model is served: its alias moves to a new one only for a reason."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fewstep.errors import UserError
from fewstep.tracking.address import absolute_uri, connect, mlflow_settings, readable
from fewstep.tracking.aliases import CHALLENGER, alias_fault
from fewstep.tracking.registry import REGISTRY_SECONDS, ModelVersionInfo, look_up

if TYPE_CHECKING:
    from mlflow import MlflowClient

REASON = "promotion.reason"
"""Tag of a version: why it got its alias, in one sentence."""

REFUSED = "promotion.refused"
"""Tag of a challenger: the alias that it did not get."""

_LOGGED_MODEL = re.compile(r"(?:^|/)(m-[0-9a-f]{32})(?:/|$)")


@dataclass(frozen=True)
class Promotion:
    """The alias that a version got."""

    version: ModelVersionInfo
    """Which version."""
    alias: str
    """Which alias."""
    reason: str
    """Why, in one sentence without its full stop."""

    @property
    def address(self) -> str:
        """`models:/name@alias`."""
        return f"models:/{self.version.name}@{self.alias}"


def give_alias(version: ModelVersionInfo, uri: str, alias: str, unmet: Sequence[str] | None) -> Promotion:
    """Give a new version the alias that is served, if it is good enough or the first to have it, or else `CHALLENGER`.

    The version has to be complete: the alias is the last thing that it gets, so that a process that is killed before
    leaves the alias where it was.

    Args:
        version: as `register` returned it.
        uri: tracking address.
        alias: that is served.
        unmet: what the version does not keep of what is asked of it, in words; empty if it keeps all; None if nothing
            is asked of it.

    Raises:
        UserError: MLflow does not take the alias.
    """
    client, name = connect(uri := absolute_uri(uri)), _name(version)
    try:
        with mlflow_settings(REGISTRY_SECONDS, retries=2):
            served = client.get_registered_model(name).aliases.get(alias)
            if unmet and served is not None:
                kept = f"{alias} stays at version {served}, as version {version.version} "
                given = Promotion(version, CHALLENGER, kept + "; ".join(unmet))
            else:
                why = (
                    f"it is the first version that {alias} can point at, although it " + "; ".join(unmet)
                    if unmet
                    else "every version gets it (tracking.promote: always)"
                    if unmet is None
                    else "it keeps all acceptance criteria"
                )
                given = Promotion(version, alias, f"version {version.version} got {alias}: {why}")
            _set(client, given)
            if given.alias == CHALLENGER:
                client.set_model_version_tag(name, str(version.version), REFUSED, alias)
    except Exception as error:  # MLflow's, requests': every store has its own
        raise UserError(
            f"MLflow at {uri} did not give models:/{name}/{version.version} its alias ({readable(error)}): the version "
            f"is registered, give it the alias with `fewstep promote {name} {version.version}`."
        ) from error
    return given


def promote(name: str, version: str, uri: str, alias: str = "champion") -> Promotion:
    """Give the alias that is served to a version of the user's choice.

    Args:
        name: of the registered model.
        version: its number, or "latest".
        uri: tracking address.
        alias: that is served.

    Raises:
        UserError: there is no such model or version, its files are not complete, MLflow can't be reached, or takes no
            such alias.
    """
    if (fault := alias_fault(alias)) is not None:
        raise UserError(f"{fault}: choose another.")
    chosen = look_up(f"models:/{name}/{version}", uri)
    client = connect(uri := absolute_uri(uri))
    try:
        with mlflow_settings(REGISTRY_SECONDS, retries=2):
            before = client.get_registered_model(name).aliases.get(alias)
            complete = _is_complete(client, chosen)
            instead = f"instead of version {before}" if before is not None else "which no version had"
            given = Promotion(chosen, alias, f"version {chosen.version} got {alias} by hand, {instead}")
            if complete:
                _set(client, given)
    except Exception as error:
        raise UserError(
            f"MLflow at {uri} did not move {alias} of {name!r} ({readable(error)}): correct the address or start the "
            "server."
        ) from error
    if not complete:
        raise UserError(
            f"models:/{name}/{chosen.version} is not complete, as its registration was interrupted: promote another "
            f"version, {alias} stays where it was."
        )
    return given


def _set(client: MlflowClient, given: Promotion) -> None:
    name, number = _name(given.version), str(given.version.version)
    # The reason first: whoever sees the alias can read why.
    client.set_model_version_tag(name, number, REASON, given.reason)
    client.set_registered_model_alias(name, given.alias, number)
    is_challenger = str(client.get_registered_model(name).aliases.get(CHALLENGER)) == number
    if is_challenger and client.get_model_version(name, number).tags.get(REFUSED) == given.alias:
        client.delete_registered_model_alias(name, CHALLENGER)


def _is_complete(client: MlflowClient, version: ModelVersionInfo) -> bool:
    """Whether all files of a version were stored; versions that others registered are taken as they are."""
    found = client.get_model_version(_name(version), str(version.version))
    if found.status != "READY":
        return False
    # A part of the files' address, as MLflow's databases keep it nowhere else.
    if (model := _LOGGED_MODEL.search(found.source or "")) is None:
        return True
    # Its status is set after the last of its files.
    return str(client.get_logged_model(model[1]).status) == "READY"


def _name(version: ModelVersionInfo) -> str:
    assert version.name is not None, "a registered version has a name"
    return version.name
