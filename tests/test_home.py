"""Users without a home folder can work; what has to be kept there says so."""

from __future__ import annotations

from pathlib import Path

import pytest

from fewstep.data.datasets.emoji import default_cache
from fewstep.errors import UserError
from fewstep.home import cache_folder
from fewstep.models import family_code
from fewstep.models.family_code import FamilyCode, find_code, use_module
from fewstep.models.registry import get_family, registered
from fewstep.models.teacher import reference_to
from fewstep.models.teacher_folder import LoRAFile, teacher_folder

FAMILY = """
from fewstep.models.module_family import ModuleFamily
from fewstep.models.registry import register
register(ModuleFamily("of_the_homeless", dict, "out", 3, 8))
"""


@pytest.fixture
def _homeless(monkeypatch: pytest.MonkeyPatch) -> None:
    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")  # what pathlib raises

    monkeypatch.setattr(Path, "home", home)


def test_the_cache_lies_in_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder("hashes") == tmp_path / ".cache" / "fewstep" / "hashes"


@pytest.mark.usefixtures("_homeless")
def test_without_a_home_hashes_are_computed_each_time() -> None:
    assert cache_folder("hashes") is None
    assert reference_to("emoji", "qwen_image").sha256 is not None


@pytest.mark.usefixtures("_homeless")
def test_without_a_home_code_is_trusted_while_the_process_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(family_code, "_CODE", {})
    (tmp_path / "family.py").write_text(FAMILY)
    sha256 = FamilyCode.read(tmp_path / "family.py").sha256
    with pytest.raises(UserError, match="is code that came with it"):
        find_code("of_the_homeless", sha256, tmp_path)
    assert "of_the_homeless" not in registered()
    use_module(tmp_path / "family.py")
    find_code("of_the_homeless", sha256, tmp_path)
    assert "of_the_homeless" in registered()


@pytest.mark.usefixtures("_homeless")
def test_without_a_home_what_is_kept_there_says_where_it_can_be_kept() -> None:
    with pytest.raises(UserError, match=r"^there is no home folder .*: set HOME, or give --cache\.$"):
        default_cache()
    base = Path(__file__).parent / "conformance" / "adapters" / "qwen_base"
    lora = LoRAFile(path=str(base / "diffusion_pytorch_model.safetensors"))
    with pytest.raises(UserError, match=r"^there is no home folder .*: set HOME\.$"):
        teacher_folder(str(base), get_family("qwen_image"), [lora])
