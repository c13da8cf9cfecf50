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
from fewstep.student.resolve import current_version, fetch_lora


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


def test_a_lora_is_found_in_mlflow(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    (file := tmp_path / "style.safetensors").write_bytes(b"matrices")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    client = MlflowClient(uri, registry_uri=uri)
    experiment = client.create_experiment("styles", artifact_location=(tmp_path / "artifacts").as_uri())
    run = client.create_run(experiment).info
    client.log_artifact(run.run_id, str(file), "style")
    client.create_registered_model("ink")
    client.create_model_version("ink", f"{run.artifact_uri}/style", run.run_id)
    client.set_registered_model_alias("ink", "best", "1")
    for number, address in enumerate(("models:/ink@best", "models:/ink/1", f"runs:/{run.run_id}/style")):
        assert Path(fetch_lora(address, tmp_path / str(number), uri)).read_bytes() == b"matrices"
    with pytest.raises(UserError, match="ink"):
        fetch_lora("models:/ink@none", tmp_path / "none", uri)
