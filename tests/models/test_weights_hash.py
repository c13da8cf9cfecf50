"""A teacher's hash is remembered as long as its files stay as they are, and no longer."""

import hashlib
import os
from pathlib import Path

import pytest

from fewstep.models import weights_hash as module
from fewstep.models.weights_hash import weights_hash

FILES = {"a.safetensors": b"first", "b.safetensors": b"second"}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(module, "_SETTLED_SECONDS", 0)
    teacher = tmp_path / "teacher"
    teacher.mkdir()
    for name, content in FILES.items():
        (teacher / name).write_bytes(content)
    return teacher


def sha256(*contents: bytes) -> str:
    return hashlib.sha256(b"".join(contents)).hexdigest()


def remembered(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "home" / ".cache" / "fewstep" / "hashes").iterdir())


def test_hash_is_read_from_the_cache_while_files_are_unchanged(folder: Path, tmp_path: Path) -> None:
    assert weights_hash(str(folder)) == sha256(*FILES.values())
    [cached] = remembered(tmp_path)
    cached.write_text("0" * 64)  # can be told from the true one
    assert weights_hash(str(folder)) == "0" * 64


@pytest.mark.parametrize("way", ["written", "replaced", "shorter"])
def test_changed_file_is_hashed_again(folder: Path, way: str) -> None:
    weights_hash(str(folder))
    file = folder / "b.safetensors"
    before = file.stat()
    content = b"short" if way == "shorter" else b"SECOND"
    if way == "replaced":
        (other := folder / "other").write_bytes(content)
        os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
        other.replace(file)
    else:
        file.write_bytes(content)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert weights_hash(str(folder)) == sha256(b"first", content)


def test_file_added_is_hashed_too(folder: Path) -> None:
    weights_hash(str(folder))
    (folder / "c.safetensors").write_bytes(b"third")
    assert weights_hash(str(folder)) == sha256(*FILES.values(), b"third")


def test_recent_file_is_not_remembered(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SETTLED_SECONDS", 2)
    assert weights_hash(str(folder)) == sha256(*FILES.values())
    assert not (tmp_path / "home").exists()


def test_damaged_cache_is_not_believed(folder: Path, tmp_path: Path) -> None:
    weights_hash(str(folder))
    [cached] = remembered(tmp_path)
    cached.write_text("")
    assert weights_hash(str(folder)) == sha256(*FILES.values())


def test_no_cache_where_nothing_can_be_written(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "home").write_text("a file where the folder would be")
    assert weights_hash(str(folder)) == sha256(*FILES.values())
