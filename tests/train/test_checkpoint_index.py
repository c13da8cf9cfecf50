"""The list of tensors in a checkpoint is read as data: what a changed one would run is refused."""

from __future__ import annotations

import pickle
from pathlib import Path, PosixPath
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from fewstep.errors import UserError
from fewstep.train.checkpoint import load_tensors
from fewstep.train.checkpoint_index import INDEX, read_index

TENSORS = {
    "head": {"weight": torch.arange(12.0).reshape(3, 4), "low": torch.ones(5, dtype=torch.bfloat16)},
    "counts": torch.arange(7, dtype=torch.uint8),
    "step": torch.tensor(3),
}


class Touches:
    """An object whose unpickling writes a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.file,)


def pickle_of_call(module: str, name: str) -> bytes:
    """The pickle of a call of MODULE.NAME without arguments.

    Written opcode by opcode, since other tests of the process may have put another function in its place, which
    `pickle.dumps` refuses.
    """
    return pickle.GLOBAL + f"{module}\n{name}\n".encode() + pickle.EMPTY_TUPLE + pickle.REDUCE + pickle.STOP


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    dcp.save(TENSORS, checkpoint_id=tmp_path / "step", no_dist=True)
    return tmp_path / "step"


def empty() -> dict[str, Any]:
    return {
        "head": {"weight": torch.zeros(3, 4), "low": torch.zeros(5, dtype=torch.bfloat16)},
        "counts": torch.zeros(7, dtype=torch.uint8),
        "step": torch.tensor(0),
    }


def test_tensors_of_a_checkpoint_are_read(saved: Path) -> None:
    tensors = empty()
    load_tensors(tensors, saved)
    assert torch.equal(tensors["head"]["weight"], TENSORS["head"]["weight"])
    assert torch.equal(tensors["head"]["low"], TENSORS["head"]["low"])
    assert torch.equal(tensors["counts"], TENSORS["counts"])
    assert tensors["step"] == 3


def test_what_a_changed_list_would_run_is_not_run(saved: Path, tmp_path: Path) -> None:
    listed = read_index((saved / INDEX).read_bytes())
    listed.planner_data = Touches(tmp_path / "ran")
    (saved / INDEX).write_bytes(pickle.dumps(listed))
    with pytest.raises(UserError, match="which no list of tensors needs: somebody has changed it"):
        load_tensors(empty(), saved)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("torch", "load"),
        ("torch", "manual_seed"),
        ("torch.distributed.checkpoint", "load"),
        ("pickle", "loads"),
        ("builtins", "print"),
        ("pathlib", "Path.cwd"),
    ],
)
def test_functions_are_refused_whatever_their_module(module: str, name: str) -> None:
    with pytest.raises(UserError, match="no list of tensors needs"):
        read_index(pickle_of_call(module, name))


def test_an_opcode_that_would_change_a_class_is_refused() -> None:
    attribute = pickle.MARK + pickle.UNICODE + b"write_bytes\n" + pickle.INT + b"1\n" + pickle.DICT
    content = (
        pickle.GLOBAL
        + b"pathlib\nPosixPath\n"
        + pickle.NONE
        + attribute
        + pickle.TUPLE2
        + pickle.BUILD
        + pickle.STOP
    )
    with pytest.raises(UserError, match="changes PosixPath: somebody has changed it"):
        read_index(content)
    assert Path.write_bytes is PosixPath.write_bytes


@pytest.mark.parametrize(
    "content", [b"", b"no pickle", pickle.dumps(None), pickle.dumps({"a": 1}), b"\x80\x04N."]
)
def test_what_is_no_list_is_said_to_be_none(content: bytes) -> None:
    with pytest.raises(UserError, match="is no list of tensors"):
        read_index(content)


def test_torch_is_not_left_to_look_for_another_list(saved: Path, tmp_path: Path) -> None:
    (saved / INDEX).write_bytes(pickle.dumps(None))
    (saved / f"__0{INDEX}").write_bytes(pickle.dumps(Touches(tmp_path / "ran")))
    with pytest.raises(UserError, match="is no list of tensors"):
        load_tensors(empty(), saved)
    assert not (tmp_path / "ran").exists()


def test_what_would_be_unpickled_as_it_is_is_refused(saved: Path, tmp_path: Path) -> None:
    listed = read_index((saved / INDEX).read_bytes())
    listed.state_dict_metadata["step"] = BytesStorageMetadata()
    (saved / INDEX).write_bytes(pickle.dumps(listed))
    with pytest.raises(UserError, match="lists what are no tensors in files beside it"):
        load_tensors(empty(), saved)


@pytest.mark.parametrize("place", ["../elsewhere.distcp", "/tmp/elsewhere.distcp", "a/b.distcp"])
def test_files_elsewhere_are_not_read(saved: Path, place: str) -> None:
    listed = read_index((saved / INDEX).read_bytes())
    for part in listed.storage_data.values():
        part.relative_path = place
    (saved / INDEX).write_bytes(pickle.dumps(listed))
    with pytest.raises(UserError, match="lists what are no tensors in files beside it"):
        load_tensors(empty(), saved)
