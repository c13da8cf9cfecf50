"""Jobs as a user meets them: help pages, refusals, and the main job through Ray's job API."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
JOBS = sorted(path.name for path in (ROOT / "jobs").glob("*.py"))


def run(
    *command: str, cwd: Path = ROOT, timeout: float = 300, **environment: str
) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, timeout=timeout,
        env=os.environ | {"PATH": path} | environment,
    )  # fmt: skip


@pytest.mark.parametrize("job", JOBS)
def test_every_job_is_executable_and_its_help_page_has_examples(
    job: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = ROOT / "jobs" / job
    assert os.access(script, os.X_OK)
    assert script.read_text().startswith("#!/usr/bin/env python\n")
    # In this process, which has loaded what each of twenty others would have to load again.
    monkeypatch.setattr(sys, "argv", [f"jobs/{job}", "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(script), run_name="__main__")
    assert end.value.code == 0
    page = capsys.readouterr().out
    assert "examples" in page
    assert f"jobs/{job}" in page


def test_the_help_page_of_the_main_job_documents_every_recipe_field() -> None:
    from fewstep.config import document
    from fewstep.train.recipe import DistillRecipe

    done = run("jobs/distill_qwen.py", "--help")
    assert done.returncode == 0, done.stderr
    page = done.stdout
    for key, default, text in document(DistillRecipe):
        assert f"{key} = {default}" in page
        assert text.split("\n")[0][:60] in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "train.stepz=1"], "did you mean 'train.steps'"),
        (["--recipe", "nothing"], "there is no recipe 'nothing'"),
    ],
)
def test_a_wrong_recipe_is_one_line_and_status_2(arguments: list[str], message: str) -> None:
    done = run("jobs/distill_qwen.py", *arguments)
    assert done.returncode == 2
    [line] = done.stderr.strip().splitlines()
    assert line.startswith("error: ")
    assert message in line


def test_a_missing_model_is_one_line_and_status_2(tmp_path: Path) -> None:
    done = run("jobs/generate.py", "--prompt", "x", "--model", str(tmp_path), FEWSTEP_HOME=str(tmp_path))
    assert done.returncode == 2
    assert "is no exported student" in done.stderr


@pytest.fixture(scope="module")
def submitted(ray_cluster: str, tmp_path_factory: pytest.TempPathFactory):
    """`ray job submit jobs/distill_qwen.py`, as short as it gets."""
    home = tmp_path_factory.mktemp("home")
    short = [
        "train.steps=3", "train.threads=1", "train.cpus_per_worker=0.5", "train.sample_every=2", "data.batch_size=8",
        "student.lora.rank=2", "student.policy.components=2", "evaluation.captions=6", "evaluation.reference_steps=4",
        "evaluation.baseline_steps=[2, 4, 8]",
    ]  # fmt: skip
    flags = [part for override in short for part in ("--set", override)]
    environment = f'{{"env_vars": {{"FEWSTEP_HOME": "{home}"}}}}'
    done = run(
        "ray", "job", "submit", "--address", ray_cluster, "--runtime-env-json", environment, "--",
        "jobs/distill_qwen.py", *flags, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return home, done.stdout


def test_the_main_job_prepares_trains_measures_and_registers(submitted) -> None:
    home, output = submitted
    assert "preparing the bundled emoji set" in output
    assert "3/3" in output
    assert "KID teacher" in output
    assert "models:/emoji64-4step@champion" in output
    picture = Path(re.search(r"^picture\s+(\S+)", output, re.M).group(1))
    with Image.open(picture) as image:
        assert image.width > 700
        assert image.height > 300
    assert picture.is_relative_to(home)
    assert {"report.txt", "report.json", "report.html", "quality.png", "loss.png"} <= {
        p.name for p in picture.parent.iterdir()
    }


def test_the_run_keeps_figures_pictures_and_recipe(submitted) -> None:
    from fewstep.tracking.address import connect

    home, _ = submitted
    client = connect(f"sqlite:///{home / 'mlflow.db'}")
    [run_] = client.search_runs([e.experiment_id for e in client.search_experiments()])
    assert run_.info.status == "FINISHED"
    for row in ("teacher_4", "student_4", "euler_2", "euler_4", "euler_8"):
        for figure in ("kid_teacher", "kid_real", "paired_distance", "pixel_rmse", "diversity", "passes"):
            assert f"eval/{row}/{figure}" in run_.data.metrics
    assert run_.data.metrics["eval/student_4/passes"] == 4
    assert run_.data.metrics["eval/euler_4/passes"] == 8
    assert {item.path for item in client.list_artifacts(run_.info.run_id)} >= {
        "recipe.json",
        "results",
        "samples",
    }


def test_the_registered_model_generates(submitted) -> None:
    home, _ = submitted
    picture = home / "one.png"
    done = run(
        "jobs/generate.py", "--model", "models:/emoji64-4step@champion", "--prompt", "red heart, noto style",
        "--steps", "4", "--seed", "0", "--out", str(picture), FEWSTEP_HOME=str(home),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    with Image.open(picture) as image:
        assert len(image.getcolors(1 << 16)) > 10


def test_the_registered_model_is_a_pyfunc_model(submitted, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow

    home, _ = submitted
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{home / 'mlflow.db'}")
    images = mlflow.pyfunc.load_model("models:/emoji64-4step@champion").predict(["owl, fluent style"])
    assert len(images) == 1


def test_secrets_of_the_environment_are_in_no_file_of_a_run(submitted) -> None:
    import ray

    home, output = submitted
    session = Path(ray._private.worker._global_node.get_session_dir_path())
    assert "planted-" not in output
    files = [file for folder in (home, session / "logs") for file in folder.rglob("*") if file.is_file()]
    assert {"mlflow.db", "recipe.json", "state.json"} <= {file.name for file in files}
    assert any(file.name.startswith("worker-") for file in files)
    assert not [file for file in files if b"planted-" in file.read_bytes()]
