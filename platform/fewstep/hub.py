"""Models on the Hugging Face hub: what their ids mean, and fetching and pushing their files."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from fewstep.errors import UserError, one_line

_ID = re.compile(
    r"(?P<repository>[\w.-]+/[\w.-]+)(/(?P<subfolder>[\w.-]+(/[\w.-]+)*))?(@(?P<revision>[^@\s]+))?"
)

HUB_ID = "owner/name, owner/name/folder or owner/name@revision"
"""The forms of a hub id, for messages."""


class HubId(NamedTuple):
    """A place on the hub: `owner/name`, `owner/name/folder`, and either with `@revision` behind it."""

    repository: str
    """Owner and name."""
    subfolder: str
    """A folder in the repository; "" for the whole of it."""
    revision: str | None
    """A branch, a tag or a commit; None for the main branch."""


def is_hub_id(path: str) -> bool:
    """Whether a text has the form of a hub id, and not that of a path that begins with `.`, `/` or `~`."""
    return not path.startswith(".") and _ID.fullmatch(path) is not None


def parse_hub_id(text: str) -> HubId:
    """The parts of a hub id.

    Raises:
        ValueError: the text has another form.
    """
    match = _ID.fullmatch(text)
    if match is None or not is_hub_id(text):
        raise ValueError(f"{text!r} is no hub id: give {HUB_ID}")
    return HubId(match["repository"], match["subfolder"] or "", match["revision"])


def hub_folder(hub_id: str, wanted: Sequence[str] = ("*",), unwanted: Sequence[str] = ()) -> Path:
    """The folder on this machine of a place on the hub, whose files are fetched into the hub's cache.

    Args:
        hub_id: as `parse_hub_id` reads it.
        wanted: patterns of the files' paths in the folder; others are not fetched.
        unwanted: patterns of files that are not fetched although wanted.

    Raises:
        OSError: the place is not there, or the hub can't be reached; the message says that there is no folder here
            either.
        ValueError: it is no hub id.
    """
    from huggingface_hub import snapshot_download

    place = parse_hub_id(hub_id)
    below = f"{place.subfolder}/" if place.subfolder else ""
    try:
        folder = Path(
            snapshot_download(
                place.repository,
                revision=place.revision,
                allow_patterns=[below + pattern for pattern in wanted],
                ignore_patterns=[below + pattern for pattern in unwanted],
            )
        )
    except Exception as error:  # of the hub's client and of its HTTP library: there is no common class
        raise _unfetched(hub_id, one_line(error)) from error
    if not (folder / place.subfolder).is_dir():
        raise _unfetched(hub_id, f"the repository {place.repository} has no folder {place.subfolder!r}")
    return folder / place.subfolder


def _unfetched(hub_id: str, reason: str) -> OSError:
    return OSError(f"there is no folder {hub_id!r}, and the hub's can't be fetched ({reason})")


def check_repository(name: str, *, writing: bool) -> None:
    """Check what can be checked of a push before anything is made for it.

    Args:
        name: of the repository.
        writing: whether somebody has to be logged in.

    Raises:
        UserError: it is no name of a repository, or nobody is logged in.
    """
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise UserError(
            f"{name!r} is no name of a hub repository ({one_line(error)}): give owner/name."
        ) from None
    if "/" not in name:
        raise UserError(f"{name!r} is no name of a hub repository: give owner/name.")
    if writing and get_token() is None:
        raise UserError(
            f"nobody is logged in to push to {name!r}: run `hf auth login`, or set HF_TOKEN to a token that may write."
        )


def push_files(
    repository: str, files: Mapping[str, bytes | Path], message: str, *, private: bool, branch: str | None
) -> str:
    """Push files to a repository of models in one commit; the repository is made if it is not there.

    Args:
        repository: owner/name.
        files: path in the repository → content, or the file that has it. Other files there stay.
        message: of the commit.
        private: whether a new repository is private; one that exists stays as it is.
        branch: where to commit, made if it is not there; None for the main branch.

    Returns:
        Address of the commit's page.

    Raises:
        UserError: there is no token that may write there, or the hub can't be reached.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi(library_name="fewstep")
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        if branch is not None:
            api.create_branch(repository, branch=branch, exist_ok=True)
        added = [
            CommitOperationAdd(name, content if isinstance(content, bytes) else str(content))
            for name, content in files.items()
        ]
        commit = api.create_commit(repository, added, commit_message=message, revision=branch)
    except HfHubHTTPError as error:
        raise UserError(_refusal(repository, error.response.status_code, one_line(error))) from error
    except Exception as error:  # of the hub's client and of its HTTP library: there is no common class
        raise UserError(
            f"nothing was pushed to the hub's {repository!r} ({one_line(error)}): check the name and the "
            "connection."
        ) from error
    return str(commit.commit_url)


def _refusal(repository: str, status: int, reason: str) -> str:
    """The message about an answer of the hub that is an error."""
    if status == 401:
        return (
            f"the hub does not take the token for {repository!r}: run `hf auth login`, or correct HF_TOKEN."
        )
    if status == 403:
        return (
            f"the token may not write to the hub's {repository!r}: use one with write access to it, or another owner's "
            "name."
        )
    return f"the hub refused the push to {repository!r} ({reason}): correct what it names, or try later."
