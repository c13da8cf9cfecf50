"""The end of a distillation: figures, criteria and files are kept, and the student is registered in any case."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import tiny
from fewstep.student import read_student_card, resolve_student
from fewstep.tracking import Tracker, spool_folder
from fewstep.tracking.address import connect
from fewstep.tracking.registry import look_up
from fewstep.train.recipe import DistillRecipe, load_recipe
from fewstep.train.trainer import TrainedModel
from fewstep.workflow.distil import _example_of, evaluate_and_register


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One database for all tests: MLflow takes seconds to create its schema."""
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


@pytest.fixture
def recipe(data: Path, uri: str, request: pytest.FixtureRequest) -> DistillRecipe:
    settings = [f"data.path={data}", "evaluation.captions=8", f"tracking.uri={uri}"]
    return load_recipe(DistillRecipe, None, [*settings, f"tracking.model={request.node.name[:30]}"])


@pytest.fixture
def trained(recipe: DistillRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TrainedModel:
    """What a training leaves: the bundled student's folder, and an MLflow run with some losses."""
    monkeypatch.chdir(tmp_path)
    folder = Path(shutil.copytree(resolve_student("emoji-student").folder, tmp_path / "student"))
    with Tracker.start(recipe.tracking.uri, "fewstep", "a-run", {}, {}, spool_folder()) as tracker:
        for step in (1, 2):
            tracker.log_metrics({"train/loss": 1.0 / step}, step)
    return TrainedModel("a-run", folder, "", tracker.run_id, {})


def test_a_measured_student_is_registered_with_its_figures(recipe, trained, fake_images, uri, capfd) -> None:
    evaluate_and_register(recipe, trained)
    printed = capfd.readouterr().out
    model = recipe.tracking.model
    assert f"registered  models:/{model}/1, now models:/{model}@champion" in printed
    assert f"fewstep generate --model models:/{model}@champion --prompt 'red thing 0, noto style'" in printed
    assert "student, 4 evaluations" in printed

    client = connect(uri)
    run = client.get_run(trained.mlflow_run)
    assert run.info.status == "FINISHED"
    tags = {name: value for name, value in run.data.tags.items() if name.startswith("criterion.")}
    assert set(tags) == {
        f"criterion.{name}" for name in ("captions", "kid_teacher", "paired_distance", "diversity")
    }
    assert tags["criterion.captions"] == "missed"
    assert run.data.metrics["eval/captions"] == 8
    files = {Path(file.path).name for file in client.list_artifacts(trained.mlflow_run, "results/a-run")}
    assert files == {"comparison.png", "loss.png", "quality.png", "report.html", "report.json", "report.txt"}

    card = read_student_card(trained.folder)
    assert card.metrics["eval/captions"] == 8
    picture = Path("out/a-run/comparison.png").read_bytes()
    registered = resolve_student(f"models:/{model}@champion", tracking_uri=uri).folder
    assert (
        picture
        == (trained.folder / "comparison.png").read_bytes()
        == (registered / "comparison.png").read_bytes()
    )
    version = client.get_model_version(model, "1")
    assert float(version.tags["metric.eval/student_4/passes"]) == 4


def test_a_student_whose_evaluation_fails_is_registered_without_figures(
    recipe, trained, uri, monkeypatch, capfd
) -> None:
    def failing(*arguments: object, **named: object) -> None:
        raise RuntimeError("no image")

    monkeypatch.setattr("fewstep.workflow.distil.evaluate", failing)
    with pytest.raises(RuntimeError, match="no image"):
        evaluate_and_register(recipe, trained)
    assert look_up(f"models:/{recipe.tracking.model}@champion", uri).run_id == trained.mlflow_run
    assert "registered  models:/" in capfd.readouterr().out
    tags = connect(uri).get_model_version(recipe.tracking.model, "1").tags
    assert not [tag for tag in tags if tag.startswith("metric.")]


def test_nothing_is_measured_where_the_recipe_says_so(recipe, trained, uri, monkeypatch) -> None:
    monkeypatch.setattr("fewstep.workflow.distil.evaluate", None)  # a call would fail
    off = recipe.evaluation.model_copy(update={"enabled": False})
    evaluate_and_register(recipe.model_copy(update={"evaluation": off}), trained)
    assert look_up(f"models:/{recipe.tracking.model}@champion", uri).version == 1
    assert Path("out/a-run/loss.png").exists()


def test_the_served_alias_stays_where_a_later_student_misses_a_criterion(
    recipe, trained, fake_images, uri, capfd
) -> None:
    evaluate_and_register(recipe, trained)
    model, client = recipe.tracking.model, connect(uri)
    assert (
        "although it misses the criterion 'measured on at least"
        in (client.get_model_version(model, "1").tags["promotion.reason"])
    ), "8 captions are too few, but nothing else could be served"
    capfd.readouterr()
    evaluate_and_register(recipe, trained)
    printed = capfd.readouterr().out
    assert f"registered  models:/{model}/2, now models:/{model}@challenger" in printed
    assert (
        "not served  champion stays at version 1, as version 2 misses the criterion 'measured on" in printed
    )
    assert f"fewstep promote {model} 2" in printed
    assert f"--model models:/{model}@challenger --prompt" in printed
    always = recipe.model_copy(update={"tracking": recipe.tracking.model_copy(update={"promote": "always"})})
    evaluate_and_register(always, trained)
    aliases = client.get_registered_model(model).aliases
    assert {alias: int(version) for alias, version in aliases.items()} == {"champion": 3, "challenger": 2}


def test_what_was_not_measured_does_not_take_the_place_of_what_is_served(recipe, trained, uri) -> None:
    off = recipe.evaluation.model_copy(update={"enabled": False})
    for _ in range(2):
        evaluate_and_register(recipe.model_copy(update={"evaluation": off}), trained)
    model = recipe.tracking.model
    assert look_up(f"models:/{model}@champion", uri).version == 1
    reason = connect(uri).get_model_version(model, "2").tags["promotion.reason"]
    assert reason == "champion stays at version 1, as version 2 was not measured (evaluation.enabled: false)"


def test_the_command_that_is_told_names_a_file_for_each_reference(tiny_teacher: Path, tmp_path: Path) -> None:
    tiny.write_data(tmp_path, references=2)
    example = _example_of(tiny.recipe(tmp_path, tiny_teacher))
    assert example.startswith("--prompt ")
    assert example.endswith(" --image FILE --image FILE")
