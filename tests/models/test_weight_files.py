"""Which files of a teacher's folder are its weights, and which are refused."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fewstep.errors import UserError
from fewstep.models.pretrained import stream_weights, weight_files
from fewstep.models.registry import get_family
from fewstep.models.sharded import read_weights
from fewstep.models.teacher import (
    TeacherReference,
    checked_meanwhile,
    load_teacher,
    open_teacher,
    reference_to,
)

CONFIG = {
    "num_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 24,
    "axes_dims_rope": (4, 6, 6),
    "in_channels": 16,
    "out_channels": 4,
}
QUERY = "transformer_blocks.0.attn.to_q.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A network in two shards with an index."""
    torch.manual_seed(0)
    network = get_family("qwen_image").build(CONFIG)
    network.save_pretrained(
        tmp_path / "net", max_shard_size=sum(p.nbytes for p in network.parameters()) // 2 + 1
    )
    return tmp_path / "net"


def save(folder: Path, name: str, **changes: torch.Tensor) -> None:
    """A file of all the network's weights, some of them changed."""
    whole = {k: v for file in weight_files(folder) for k, v in load_file(file).items()}
    save_file(whole | changes, folder / name, metadata={"format": "pt"})


@pytest.mark.parametrize("leftover", ["a", "diffusion_pytorch_model-00001-of-00001", "z"])
def test_a_file_that_the_index_does_not_name_is_not_read(folder: Path, leftover: str) -> None:
    network, _, _ = load_teacher(str(folder), "qwen_image")  # diffusers' own reading
    query = network.get_parameter(QUERY)
    save(folder, f"{leftover}.safetensors", **{QUERY: torch.zeros_like(query)})
    _, _, weights = open_teacher(str(folder), "qwen_image")
    assert weights is not None
    assert torch.equal(dict(stream_weights(weights))[QUERY], query)
    sharded = torch.empty_like(query)
    read_weights({QUERY: sharded}, weights)
    assert torch.equal(sharded, query)


def test_the_whole_file_comes_before_others(folder: Path) -> None:
    save(folder, "diffusion_pytorch_model.safetensors")
    for index in folder.glob("*.index.json"):
        index.unlink()
    assert [file.name for file in weight_files(folder)] == ["diffusion_pytorch_model.safetensors"]


def test_a_weight_that_is_there_twice_is_refused(folder: Path) -> None:
    for index in folder.glob("*.index.json"):
        index.unlink()
    save(folder, "leftover.safetensors")
    with pytest.raises(UserError, match=r"is in .* and in .*: delete the file that is left over"):
        open_teacher(str(folder), "qwen_image")


def test_a_shard_that_the_index_names_is_missed(folder: Path) -> None:
    [index] = folder.glob("*.index.json")
    gone = sorted(set(json.loads(index.read_text())["weight_map"].values()))[0]
    (folder / gone).unlink()
    with pytest.raises(UserError, match=f"lacks {gone}"):
        open_teacher(str(folder), "qwen_image")


def test_quantised_weights_and_other_shapes_are_refused(folder: Path, tmp_path: Path) -> None:
    for name, change, message in (
        ("integers", torch.zeros(32, 32, dtype=torch.int8), "is held in I8, quantised already"),
        ("shape", torch.zeros(16, 32), r"has shape \(16, 32\), and its config.json says \(32, 32\)"),
    ):
        copy = shutil.copytree(folder, tmp_path / name)
        save(copy, "diffusion_pytorch_model.safetensors", **{QUERY: change})
        for file in [*copy.glob("*-of-*"), *copy.glob("*.index.json")]:
            file.unlink()
        with pytest.raises(UserError, match=message):
            open_teacher(str(copy), "qwen_image")


def test_a_teacher_without_safetensors_is_no_stand_in_for_one_with_a_hash(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = reference_to(str(folder), "qwen_image")
    network, _, _ = load_teacher(str(folder), "qwen_image")
    network.save_pretrained(tmp_path / "old" / "pickled", safe_serialization=False)
    monkeypatch.chdir(tmp_path)
    message = r"has no \*.safetensors, by which it could be told"
    for path in (str(tmp_path / "old" / "pickled"), "old/pickled"):  # the second has the form of a hub id
        with pytest.raises(UserError, match=message), checked_meanwhile(path, wanted):
            pass


def test_a_wrong_hash_in_the_cache_is_computed_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr("fewstep.models.weights_hash._SETTLED_SECONDS", 0)
    wanted = reference_to(str(folder), "qwen_image")
    [kept] = (tmp_path / "home" / ".cache" / "fewstep" / "hashes").iterdir()
    for wrong in (b"a" * 64, b"\xff\xfe\x80"):
        kept.write_bytes(wrong)
        with checked_meanwhile(str(folder), wanted):
            pass


def test_a_failed_load_does_not_wait_for_the_hash(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    def endless(location: str, *, remembered: bool = True, ended: Callable[[], bool]) -> None:
        while not ended():  # as between the pieces of a large file
            time.sleep(0.01)
        asked.append(True)

    monkeypatch.setattr("fewstep.models.teacher.weights_hash", endless)
    wanted = TeacherReference(str(folder), "qwen_image", "0" * 64)
    with pytest.raises(KeyError), checked_meanwhile(str(folder), wanted):
        raise KeyError
    assert asked
