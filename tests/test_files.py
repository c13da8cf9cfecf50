"""Files of weights: readable as other files are, and written through links."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fewstep.errors import UserError
from fewstep.files import save_weights, shared_weights


def with_function(file: Path, value: float) -> None:
    save_weights({"weight": torch.full((2,), value)}, file, metadata={"format": "pt"})


def within_context(file: Path, value: float) -> None:
    with shared_weights(file.parents[1]):  # as a library does it, in a folder of its own
        file.parent.mkdir(exist_ok=True)
        save_file({"weight": torch.full((2,), value)}, file, metadata={"format": "pt"})


@pytest.fixture(params=[0o022, 0o027, 0o077, 0o002])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@pytest.mark.parametrize("write", [with_function, within_context])
def test_weights_are_readable_as_other_files_are(
    write: Callable[[Path, float], None], umask: int, tmp_path: Path
) -> None:
    (folder := tmp_path / "inner").mkdir()
    for value in (1.0, 2.0):  # new, and replaced
        write(folder / "model.safetensors", value)
        (folder / "config.json").write_text("{}")
        modes = {file.name: file.stat().st_mode for file in folder.iterdir()}
        assert modes.keys() == {"model.safetensors", "config.json"}, "nothing is left beside them"
        assert modes["model.safetensors"] == modes["config.json"]
        assert load_file(folder / "model.safetensors")["weight"].tolist() == [value] * 2


@pytest.mark.parametrize("write", [with_function, within_context])
def test_a_link_stays_and_its_target_is_written(write: Callable[[Path, float], None], tmp_path: Path) -> None:
    (folder := tmp_path / "inner").mkdir()
    (tmp_path / "store").mkdir()
    target, link = tmp_path / "store" / "weights.bin", folder / "model.safetensors"
    link.symlink_to("../store/weights.bin")
    for value in (1.0, 2.0):  # its target is missing at first
        write(link, value)
        assert str(link.readlink()) == "../store/weights.bin"
        assert load_file(target)["weight"].tolist() == [value] * 2
        assert target.stat().st_mode & 0o777 == 0o666 & ~current_umask()


LINKS = {
    "store/missing/weights.bin": "leads to .*store/missing/weights.bin, whose folder does not exist",
    "store/file/weights.bin": "leads to .*store/file/weights.bin, whose folder does not exist",
    "store": "leads to the folder .*store",
    "inner/model.safetensors": "leads in a circle",
}
"""Target of a link → why it can't be written."""


@pytest.mark.parametrize("write", [with_function, within_context])
@pytest.mark.parametrize(("target", "why"), LINKS.items(), ids=LINKS)
def test_a_link_that_leads_nowhere_is_named(
    write: Callable[[Path, float], None], target: str, why: str, tmp_path: Path
) -> None:
    (folder := tmp_path / "inner").mkdir()
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "file").write_text("")
    (link := folder / "model.safetensors").symlink_to(tmp_path / target)
    with pytest.raises(UserError, match=f"can't be written to .*model.safetensors, a link that {why}"):
        write(link, 1.0)
    assert link.readlink() == tmp_path / target
    assert sorted(os.listdir(tmp_path / "store")) == ["file"], "no folder is made on what may be another disk"


def test_files_that_were_not_written_keep_their_permissions(tmp_path: Path) -> None:
    (folder := tmp_path / "inner").mkdir()
    with_function(secret := folder / "secret.safetensors", 1.0)
    secret.chmod(0o600)
    within_context(folder / "model.safetensors", 1.0)
    assert secret.stat().st_mode & 0o777 == 0o600


def current_umask() -> int:
    os.umask(mask := os.umask(0))
    return mask
