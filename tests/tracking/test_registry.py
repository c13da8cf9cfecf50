"""An exported student goes into the registry and comes out as it was."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
from PIL import Image

from fewstep.engine.source import ModelSource
from fewstep.errors import UserError
from fewstep.student.resolve import resolve_student
from fewstep.tracking.address import connect
from fewstep.tracking.registry import ModelVersionInfo, look_up, register, resolve
from fewstep.tracking.run import Tracker

REGISTER_SECONDS = 15  # 0.3 s on an idle machine; a subprocess for requirements would take longer than this

TOY_SCRIPT = '''
"""Serves a toy export: every picture has the colour that the folder holds."""

import io
from pathlib import Path

import pandas as pd
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel
from PIL import Image


class Toy(PythonModel):
    def load_context(self, context):
        self.colour = (Path(context.artifacts["student"]) / "deep" / "colour.txt").read_text()

    def predict(self, context, model_input: pd.DataFrame, params=None):
        pictures = []
        for _ in model_input.iloc[:, 0]:
            buffer = io.BytesIO()
            Image.new("RGB", (4 + params["steps"], 4), self.colour).save(buffer, format="PNG")
            pictures.append(buffer.getvalue())
        return pd.DataFrame({"prompt": model_input.iloc[:, 0], "png": pictures})


set_model(Toy())
'''


@pytest.fixture
def toy_script(tmp_path: Path) -> Path:
    path = tmp_path / "toy_model.py"
    path.write_text(TOY_SCRIPT)
    return path


@pytest.fixture
def export(tmp_path: Path) -> Path:
    folder = tmp_path / "student"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "colour.txt").write_text("red")
    return folder


def finished_run(uri: str, spool: Path) -> str:
    with Tracker.start(uri, "distil", "registering", {"nfe": 4}, {}, spool) as tracker:
        tracker.log_text("plain file", "export/card.md")
    return tracker.run_id


@pytest.fixture(params=["server", "database"])
def uri(request: pytest.FixtureRequest) -> str:
    found = request.getfixturevalue(request.param)
    return found if isinstance(found, str) else found.uri


def test_a_registered_student_comes_back_and_generates(uri, export, toy_script, tmp_path, monkeypatch, capfd):
    run_id = finished_run(uri, tmp_path / "spool")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        began = time.perf_counter()
        info = register(export, "toy", uri, run_id, metrics={"kid": -0.14}, script=toy_script)
        assert time.perf_counter() - began < REGISTER_SECONDS
    assert "Downloading" not in capfd.readouterr().err

    folder, found = resolve("models:/toy@champion", uri, into=tmp_path / "fetched")
    assert found == info == ModelVersionInfo("toy", info.version, run_id)
    assert (folder / "deep" / "colour.txt").read_text() == "red"
    assert resolve(found.uri, uri)[1] == found
    version = connect(uri).get_model_version("toy", str(info.version))
    assert version.run_id == run_id
    assert version.tags["metric.kid"] == "-0.14"
    assert "| kid | -0.14 |" in version.description
    (made,) = connect(uri).get_run(run_id).outputs.model_outputs
    logged = connect(uri).get_logged_model(made.model_id)
    assert (logged.source_run_id, logged.artifact_location) == (run_id, version.source)

    import mlflow

    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    model = mlflow.pyfunc.load_model("models:/toy@champion")
    table = model.predict(["a red heart, noto style"], params={"steps": 2})
    picture = Image.open(io.BytesIO(table["png"][0]))
    assert (picture.size, picture.getpixel((0, 0))) == ((6, 4), (255, 0, 0))
    assert model.predict(["a", "b"])["prompt"].tolist() == ["a", "b"]


def test_a_model_finds_the_code_that_it_carries(database, export, toy_script, tmp_path):
    """In a process that knows nothing of that code."""

    def packages(scratch: Path) -> list[Path]:
        (scratch / "painter").mkdir()
        (scratch / "painter" / "__init__.py").write_text("COLOUR = 'blue'\n")
        return [scratch / "painter"]

    toy_script.write_text(TOY_SCRIPT.replace("import pandas as pd", "import painter\nimport pandas as pd").replace(
        "self.colour = (", "self.colour = painter.COLOUR or ("
    ))  # fmt: skip
    run_id = finished_run(database, tmp_path / "spool")
    sys.path.insert(
        0, str(packages(tmp_path)[0].parent)
    )  # MLflow runs the script once while it saves the model
    try:
        register(
            export, "carrying", database, run_id, script=toy_script, code=packages, requirements=["pillow"]
        )
    finally:
        sys.path.pop(0)
    program = (
        "import io, mlflow; from PIL import Image; model = mlflow.pyfunc.load_model('models:/carrying/1'); "
        "png = model.predict(['x'], params={'steps': 0})['png'][0]; print(Image.open(io.BytesIO(png)).getpixel((0, 0)))"
    )
    environment = os.environ | {"MLFLOW_TRACKING_URI": database}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment, cwd="/"
    )
    assert done.stdout.strip() == "(0, 0, 255)", done.stderr
    folder, _ = resolve("models:/carrying/1", database)
    assert (folder.parents[1] / "requirements.txt").read_text().split()[-1] == "pillow"


def test_the_alias_moves_to_the_new_version_and_others_stay(database, export, toy_script, tmp_path):
    run_id = finished_run(database, tmp_path / "spool")
    first = register(export, "moving", database, run_id, script=toy_script)
    second = register(export, "moving", database, run_id, alias=None, script=toy_script)
    assert resolve("models:/moving@champion", database)[1] == first
    third = register(export, "moving", database, run_id, alias="candidate", script=toy_script)
    assert resolve("models:/moving@champion", database)[1] == first
    fourth = register(export, "moving", database, run_id, script=toy_script)
    assert resolve("models:/moving@champion", database)[1] == fourth
    assert [one.version for one in (first, second, third, fourth)] == [1, 2, 3, 4]


@pytest.mark.parametrize("latest", ["latest", "Latest"])
def test_latest_is_the_newest_version_whatever_the_aliases_say(uri, export, toy_script, tmp_path, latest):
    name = f"newest-{latest}"
    run_id = finished_run(uri, tmp_path / "spool")
    client = connect(uri)
    client.create_registered_model(name)
    for _ in range(10):  # as text, 9 is more than 10
        client.create_model_version(name, source=client.get_run(run_id).info.artifact_uri, run_id=run_id)
    newest = register(export, name, uri, run_id, alias=None, script=toy_script)
    client.set_registered_model_alias(name, "champion", "2")
    assert newest.version == 11
    folder, found = resolve(f"models:/{name}/{latest}", uri)
    assert (folder / "deep" / "colour.txt").is_file()
    assert found == newest == look_up(f"models:/{name}/{latest}", uri)
    assert ModelSource(name="m", source=f"models:/{name}/{latest}").follows_alias, "a newer one may come"


def test_latest_of_nothing_says_what_exists(database, export, toy_script, tmp_path):
    with pytest.raises(UserError, match="no registered model 'absent': use one that exists"):
        resolve("models:/absent/latest", database)
    connect(database).create_registered_model("hollow")
    for asked in ("/latest", "/1", f"/{2**80}", "@champion"):
        with pytest.raises(UserError, match="'hollow' has no versions at all: register its first"):
            look_up(f"models:/hollow{asked}", database)


def test_a_model_without_aliases_is_not_said_to_have_some(database):
    (client := connect(database)).create_registered_model("plain")
    client.create_model_version("plain", source="s3://models/plain")
    with pytest.raises(UserError, match=r"'plain' has no alias 'best': use one of the versions 1$"):
        look_up("models:/plain@best", database)


def test_an_empty_registry_lists_no_models(tmp_path):
    with pytest.raises(UserError, match="no registered model 'absent': register it, or correct the address"):
        look_up("models:/absent/1", f"sqlite:///{tmp_path}/empty.db")


@pytest.mark.parametrize("version", [2**31 - 1, 2**31, 2**63, 99999999999999999999, "9" * 5000, "0"])
def test_a_version_larger_than_any_is_one_that_does_not_exist(version, uri):
    name = f"few-{str(version)[:25]}-{len(str(version))}"
    (client := connect(uri)).create_registered_model(name)
    client.create_model_version(name, source="s3://models/few")
    with pytest.raises(UserError, match=rf"has no version {version}: use one of the versions 1$"):
        look_up(f"models:/{name}/{version}", uri)
    with pytest.raises(UserError, match="no registered model 'none-of-them'"):
        look_up(f"models:/none-of-them/{version}", uri)
    assert look_up(f"models:/{name}/{'0' * 30}1", uri).version == 1


@pytest.mark.parametrize("name", ["my runs", "a%20b", "a+b", "what?x=1#2", "é"])
def test_a_folder_s_name_is_no_part_of_an_address(name, toy_script, tmp_path, monkeypatch):
    (home := tmp_path / name).mkdir()
    (home / "student" / "deep").mkdir(parents=True)
    (home / "student" / "deep" / "colour.txt").write_text("red")
    monkeypatch.chdir(home)
    run_id = finished_run("sqlite:///mlflow.db", Path("spool"))
    register(home / "student", "toy", "sqlite:///mlflow.db", run_id, script=toy_script)
    folder, _ = resolve("models:/toy@champion", "sqlite:///mlflow.db")
    assert (folder / "deep" / "colour.txt").read_text() == "red"
    assert folder.is_relative_to(home / "mlartifacts"), "in place, without a download"
    assert resolve(f"runs:/{run_id}/export", "sqlite:///mlflow.db")[0].joinpath("card.md").is_file()
    assert (home / "mlflow.db").is_file()


def test_an_unknown_name_alias_or_version_lists_what_exists(database, export, toy_script, tmp_path):
    run_id = finished_run(database, tmp_path / "spool")
    register(export, "listed", database, run_id, script=toy_script)
    with pytest.raises(UserError, match=r"no registered model 'listad': use one that exists .*listed"):
        resolve("models:/listad@champion", database)
    known = r"versions 1, or of the aliases champion \(version 1\)"
    with pytest.raises(UserError, match=f"has no alias 'best': use one of the {known}"):
        resolve("models:/listed@best", database)
    with pytest.raises(UserError, match=f"has no version 7: use one of the {known}"):
        resolve("models:/listed/7", database)
    with pytest.raises(UserError, match="is of no known form"):
        resolve("models:/listed", database)


def test_among_hundreds_of_models_and_versions_messages_name_what_is_missing_and_list_few(uri):
    client = connect(uri)
    # The last of them in the order of MLflow's pages, which hold 100 names by default.
    for name in [*(f"many-{index:03d}" for index in range(120)), "zebra-student"]:
        client.create_registered_model(name)
    for _ in range(7):
        version = client.create_model_version("zebra-student", source="s3://models/zebra")
    for alias in ("a", "b", "c", "d", "e", "f"):
        client.set_registered_model_alias("zebra-student", alias, version.version)
    asked = {
        "zebra-student@best": r"'zebra-student' has no alias 'best': use one of the versions 3, 4, 5, 6, 7 and 2 more, "
        r"or of the aliases a \(version 7\), b .*, e \(version 7\) and 1 more$",
        "zebra-student/99": "'zebra-student' has no version 99: use one of the versions 3, 4, 5, 6, 7 and 2 more",
        "zebra-studnet/1": r"no registered model 'zebra-studnet': use one that exists .*zebra-student.* and \d+ more\)",
    }
    for address, message in asked.items():
        for find in (resolve, look_up):
            with pytest.raises(UserError, match=message) as caught:
                find(f"models:/{address}", uri)
            assert len(str(caught.value)) < 400 + len(uri)
    with pytest.raises(UserError, match="'zebra-student' has no version 99"):
        resolve_student("models:/zebra-student/99", tracking_uri=uri)


def test_a_runs_files_and_a_plain_folder_resolve_too(database, export, tmp_path):
    run_id = finished_run(database, tmp_path / "spool")
    folder, info = resolve(f"runs:/{run_id}/export", database)
    assert ((folder / "card.md").read_text(), info) == ("plain file", ModelVersionInfo(run_id=run_id))
    assert resolve(str(export), database) == (export, ModelVersionInfo())
    with pytest.raises(UserError, match="can't be fetched"):
        resolve(f"runs:/{run_id}/nothing", database)
    with pytest.raises(UserError, match="does not exist: give an exported folder or a registered model"):
        resolve(str(tmp_path / "nowhere"), database)


def test_registering_names_what_is_wrong(database, export, toy_script, tmp_path):
    with pytest.raises(UserError, match="is not a folder: export the student first"):
        register(tmp_path / "nothing", "toy", database, "run", script=toy_script)
    with pytest.raises(UserError, match=r"did not register .* the folder is unharmed"):
        register(export, "toy", database, "no-such-run", script=toy_script)
