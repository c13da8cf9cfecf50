"""On a closed network nothing is looked for outside: no hub for what lies here, no telemetry, no scripts of others."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WATCH = """
import socket, sys

def watched(host, *rest, **options):
    if host not in (None, "", "localhost", "127.0.0.1", "::1"):
        print("looks for", host, flush=True)
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
    return known(host, *rest, **options)

known, socket.getaddrinfo = socket.getaddrinfo, watched
"""
ACTIONS = {
    "generate": """
from fewstep.student import FewStepPipeline
pipeline = FewStepPipeline.from_pretrained("emoji-student")
pipeline("owl, noto style", num_inference_steps=1)
pipeline.sample_teacher(__import__("torch").zeros(1, *pipeline.card.latent_shape), pipeline.encode(["owl"]), 1)
""",
    "exported for diffusers": """
import diffusers
from pathlib import Path
from fewstep.student import FewStepPipeline
from fewstep.student.diffusers import save_diffusers
save_diffusers(FewStepPipeline.from_pretrained("emoji-student"), Path("student"))
diffusers.DiffusionPipeline.from_pretrained("student", trust_remote_code=True)
""",
    "local encoder and autoencoder": """
import diffusers
from fewstep.encoders import load_autoencoder, load_encoder
from fewstep.encoders.text import _minilm_folder
load_encoder(str(_minilm_folder()), max_tokens=16, device="cpu")
diffusers.AutoencoderKL(block_out_channels=(32,)).save_pretrained("autoencoder")
load_autoencoder("autoencoder", device="cpu")
""",
    "track": """
import time
from fewstep.tracking.address import connect
client = connect("sqlite:///mlflow.db")
client.create_run(client.create_experiment("x"))
time.sleep(2)  # telemetry goes out in the background
""",
}


@pytest.mark.parametrize("what", ACTIONS)
def test_what_lies_here_is_used_without_a_look_outside(what: str, tmp_path: Path) -> None:
    # MLflow reports nothing where it believes itself to be tested.
    unset = {
        "HF_HUB_OFFLINE",
        "TRANSFORMERS_OFFLINE",
        "MLFLOW_DISABLE_TELEMETRY",
        "CI",
        "PYTEST_CURRENT_TEST",
    }
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    done = subprocess.run(
        [sys.executable, "-c", WATCH + ACTIONS[what]], cwd=tmp_path, env=environment, capture_output=True, text=True
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "looks for" not in done.stdout


def test_pages_of_the_service_name_no_other_server() -> None:
    page = ROOT / "serve/fewstep_serve/page"
    files = [file for file in page.rglob("*") if file.suffix in (".html", ".css", ".js")]
    assert files
    for file in files:
        assert not re.findall(
            r"(?:https?:)?//[\w.-]+\.\w+", re.sub(r"^\s*//.*$", "", file.read_text(), flags=re.M)
        ), file
