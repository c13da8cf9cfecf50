"""`fewstep push`: what lies on the hub afterwards, that it is the same student, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from fewstep.assets import asset
from fewstep.cli import main
from fewstep.student.card import CARD
from hub_server import READER, WRITER, HubServer

FEWSTEP = Path(sys.executable).parent / "fewstep"
SAMPLE = """
import sys, torch
from fewstep.student import FewStepPipeline
for name in sys.argv[1:]:
    pipe = FewStepPipeline.from_pretrained(name)
    image = pipe("owl, noto style", num_inference_steps=1, output_type="latent").images
    torch.save(image, "first.pt") if name == sys.argv[1] else None
    assert torch.equal(image, torch.load("first.pt")), name
"""


@pytest.fixture
def student(tmp_path: Path) -> Path:
    """The folder of a student as a distillation leaves it, and what else may lie there."""
    folder = tmp_path / "student"
    shutil.copytree(asset("emoji_student"), folder)
    shutil.copy(Path(__file__).parents[2] / "docs/samples.png", folder / "comparison.png")
    (folder / "notes.txt").write_text("secret")
    change(folder, lambda card: card["recipe"]["tracking"].update(uri="http://me:password@mlflow"))
    return folder


def change(folder: Path, how: Any) -> None:
    card = json.loads((folder / CARD).read_text())
    how(card)
    (folder / CARD).write_text(json.dumps(card))


def started(
    hub: HubServer, home: Path, *command: str, token: str | None = WRITER, **more: str
) -> subprocess.CompletedProcess[str]:
    """A process whose hub is the one on this machine."""
    without = {
        name: value for name, value in os.environ.items() if name not in ("HF_TOKEN", "HF_HUB_OFFLINE")
    }
    environment = without | hub.environment(home / "hf", token) | more
    return subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, timeout=300)


def push(hub: HubServer, home: Path, *options: str, **how: Any) -> subprocess.CompletedProcess[str]:
    return started(hub, home, str(FEWSTEP), "push", *options, **how)


def test_a_student_that_was_pushed_is_found_by_its_hub_id_and_samples_the_same(
    hub_server: HubServer, student: Path, tmp_path: Path
) -> None:
    done = push(hub_server, tmp_path, "--model", str(student), "--repo", "team/emoji", "--private")
    assert done.returncode == 0, done.stderr
    assert (
        done.stdout.strip()
        == f"{hub_server.url}/team/emoji/commit/{hub_server.branches['team/emoji']['main']}"
    )
    assert hub_server.private == {"team/emoji"}
    files = hub_server.files("team/emoji")
    weights = "diffusion_pytorch_model.safetensors"
    assert set(files) == {"README.md", "comparison.png", "config.json", CARD, weights}
    assert files[weights] == (student / weights).read_bytes()
    assert not any(b"password" in content or b"secret" in content for content in files.values())

    card, metrics = (
        ModelCard(files["README.md"].decode()),
        json.loads((student / CARD).read_text())["metrics"],
    )
    assert (card.data.library_name, card.data.pipeline_tag) == ("fewstep", "text-to-image")
    assert (card.data.base_model, card.data.license) == (None, None), "neither is known of a bundled teacher"
    assert card.data.model_name == "team/emoji"
    stated = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert stated == {
        figure: round(metrics[f"eval/student_4/{figure}"], 4)
        for figure in ("kid_teacher", "kid_real", "paired_distance", "pixel_rmse", "diversity")
    }
    assert (
        "| student, 4 evaluations | 4 | 1.09 [-0.15, 2.33] | 96.92 [84.00, 109.85] | 8.26 | 0.0646 | 30.65 |"
        in card.text
    )
    assert "On 512 held-out captions of emoji16" in card.text
    assert "(comparison.png)" in card.text
    assert 'FewStepPipeline.from_pretrained("team/emoji")' in card.text
    assert "fewstep export --model team/emoji" in card.text
    assert "| recipe | emoji_qwen_4nfe_full |" in card.text

    # Again, to a branch of its own: what is there already is not sent again.
    change(student, lambda own: own.update(metrics={}))
    sent = len(hub_server.requests)
    branch = push(hub_server, tmp_path, "--model", str(student), "--repo", "team/emoji", "--revision", "v2/b")
    assert branch.returncode == 0, branch.stderr
    assert not [one for one in hub_server.requests[sent:] if one.startswith("PUT")]
    assert hub_server.files("team/emoji") == files
    second = ModelCard(hub_server.files("team/emoji", "v2/b")["README.md"].decode())
    assert second.data.eval_results is None
    assert "This student has not been evaluated." in second.text
    assert 'from_pretrained("team/emoji@v2/b")' in second.text

    done = started(
        hub_server, tmp_path, sys.executable, "-c", SAMPLE, str(student), "team/emoji", "team/emoji@v2/b"
    )
    assert done.returncode == 0, done.stderr


def test_a_dry_run_prints_the_card_and_needs_no_hub(
    hub_server: HubServer, student: Path, tmp_path: Path
) -> None:
    done = push(
        hub_server, tmp_path, "--model", str(student), "--repo", "team/emoji", "--dry-run", token=None
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("---\n")
    assert done.stdout.endswith(
        "files  README.md, comparison.png, config.json, diffusion_pytorch_model.safetensors, fewstep.json\n"
    )
    assert hub_server.requests == []


@pytest.mark.parametrize("revision", ["", "a b", "v1@v2"])
def test_a_branch_that_no_hub_id_can_name_is_refused(
    revision: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["push", "--repo", "team/new", "--dry-run", "--revision", revision]) == 2
    assert capsys.readouterr().err == (
        f"error: --revision: {revision!r} is no name of a branch: give one without spaces and @.\n"
    )


@pytest.mark.parametrize(
    ("repository", "how", "message"),
    [
        ("team/new", {"token": None}, "nobody is logged in to push to 'team/new': run `hf auth login`"),
        ("team/new", {"token": "hf_wrong"}, "the hub does not take the token for 'team/new'"),
        ("team/new", {"token": READER}, "the token may not write to the hub's 'team/new'"),
        ("team/there", {"token": READER}, "the token may not write to the hub's 'team/there'"),
        ("team/new", {"HF_ENDPOINT": "http://127.0.0.1:9"}, "nothing was pushed to the hub's 'team/new' ("),
        ("team/new", {"HF_HUB_OFFLINE": "1"}, "nothing was pushed to the hub's 'team/new' ("),
        ("new", {}, "'new' is no name of a hub repository: give owner/name."),
        ("team/new@v2", {}, "'team/new@v2' is no name of a hub repository ("),
        ("team/new/inner", {}, "'team/new/inner' is no name of a hub repository ("),
        ("team/a--b", {}, "'team/a--b' is no name of a hub repository ("),
    ],
)
def test_what_can_t_be_pushed_is_one_sentence_and_status_2(
    hub_server: HubServer, tmp_path: Path, repository: str, how: dict[str, Any], message: str
) -> None:
    hub_server.put("team/there", {})
    there = dict(hub_server.branches)
    done = push(hub_server, tmp_path, "--repo", repository, **how)
    assert done.returncode == 2, done.stderr
    [line] = done.stderr.strip().splitlines()
    assert line.startswith(f"error: {message}")
    assert done.stdout == ""
    assert hub_server.branches == there
