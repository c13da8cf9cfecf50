"""Names of models that mean nothing are refused in a sentence."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from fewstep.encoders import load_autoencoder, load_encoder
from fewstep.errors import UserError
from fewstep.models.family_code import FamilyCode
from fewstep.models.teacher import locate
from fewstep.student import resolve_student
from fewstep.student.resolve import current_version


@pytest.mark.parametrize(
    "find", [resolve_student, current_version, locate, load_encoder, load_autoencoder, FamilyCode.read]
)
def test_the_home_of_nobody_is_refused_in_a_sentence(find: Callable[[str], object]) -> None:
    with pytest.raises(
        UserError, match=r"^'~nouser-here/x': there is no home folder '~nouser-here'; give"
    ) as caught:
        find("~nouser-here/x")
    assert "\n" not in str(caught.value)


def test_a_home_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "teacher").mkdir()
    assert locate("~/teacher") == str(tmp_path / "teacher")
