"""What has the form of a hub id, and what its parts are."""

from __future__ import annotations

import pytest

from fewstep.hub import HubId, is_hub_id, parse_hub_id


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("owner/name", ("owner/name", "", None)),
        ("black-forest-labs/FLUX.1-dev", ("black-forest-labs/FLUX.1-dev", "", None)),
        ("owner/name@v1", ("owner/name", "", "v1")),
        ("owner/name@refs/pr/1", ("owner/name", "", "refs/pr/1")),
        ("owner/name/folder", ("owner/name", "folder", None)),
        ("owner/name/folder/inner_8.step@v1/b", ("owner/name", "folder/inner_8.step", "v1/b")),
    ],
)
def test_a_hub_id_has_a_repository_and_may_have_a_folder_and_a_revision(
    text: str, parts: tuple[str, str, str | None]
) -> None:
    assert is_hub_id(text)
    assert parse_hub_id(text) == HubId(*parts)


@pytest.mark.parametrize(
    "text",
    [
        "", "name", "name@v1", "/owner/name", "./owner/name", "../owner/name", ".runs/models/x", "~/owner/name",
        "owner/", "owner//name", "owner/name/", "owner/name@", "owner/name@a@b", "owner/name@a b", "owner/my name",
        "s3://bucket/folder", "models:/name@alias", "owner/name\n",
    ],
)  # fmt: skip
def test_paths_and_other_addresses_are_none(text: str) -> None:
    assert not is_hub_id(text)
    with pytest.raises(ValueError, match="is no hub id: give owner/name"):
        parse_hub_id(text)
