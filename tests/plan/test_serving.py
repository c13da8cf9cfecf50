"""Plans of services: what is planned is what a pipeline holds and computes with, and nothing of it need be there."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fewstep.cli import main
from fewstep.config import PRECISIONS, Precision
from fewstep.encoders import load_autoencoder, load_encoder
from fewstep.errors import UserError
from fewstep.models.conditioning import TextConditioning
from fewstep.models.precision import held_bytes, pipeline_arguments
from fewstep.plan import GPU, Served, ServingPlan, plan_serving, serving_table
from fewstep.plan.parts import text_encoder_bytes
from fewstep.plan.serving import NO_FIT
from fewstep.student import FewStepPipeline, read_student_card, resolve_student, write_student_card
from fewstep.student.weights import student_on_meta
from fewstep.train.recipe import DistillRecipe, load_recipe

pytestmark = pytest.mark.usefixtures("emulated_bfloat16")

STUDENT = resolve_student("emoji-student").folder
ON_CPU = GPU(1, on_cpu=True)


def recipe_plans(name: str, gpu: GPU, *overrides: str, **settings: object) -> list[ServingPlan]:
    served = Served.recipe(load_recipe(DistillRecipe, name, overrides))
    return plan_serving(served, gpu, side=16, tokens=8, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", ["emoji-student", "fashion-student"])
def test_a_students_weights_are_known_before_they_are_read(name: str, precision: Precision) -> None:
    pipe = FewStepPipeline.from_pretrained(name, **pipeline_arguments(precision))
    exact = precision in ("float32", "bfloat16")
    # Layers of small students have short rows: scales take more there than `bytes_of` says of large ones.
    planned = student_on_meta(resolve_student(name).folder, precision).nbytes
    assert planned == pytest.approx(held_bytes(pipe.network), rel=0 if exact else 0.05)


def test_a_plan_needs_no_weights_of_teacher_and_adapter(tmp_path: Path) -> None:
    """The teacher's configuration is enough, and of the adapter's file the head."""
    card, teacher, student = read_student_card(STUDENT), tmp_path / "teacher", tmp_path / "student"
    teacher.mkdir()
    bundled = STUDENT.parent / "emoji_teacher"
    (teacher / "config.json").write_bytes((bundled / "config.json").read_bytes())
    shutil.copytree(STUDENT, student)
    write_student_card(card.model_copy(update={"teacher": replace(card.teacher, path=str(teacher))}), student)
    weights = student / "diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    begin = 8 + int.from_bytes(content[:8], "little")
    content[begin:] = b"\xff" * (len(content) - begin)  # as float16, not a number anywhere
    weights.write_bytes(content)
    assert student_on_meta(student, "bfloat16").nbytes == student_on_meta(STUDENT, "bfloat16").nbytes
    with pytest.raises(UserError, match="there is no folder"):
        student_on_meta(STUDENT, "bfloat16", teacher="/no/such/folder")


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_planned_evaluation_takes_what_a_pipelines_does(precision: Precision) -> None:
    """Against the CPU allocator's own record."""
    side = 64
    [plan] = plan_serving(
        Served.student(STUDENT), ON_CPU, side=side, batch=4, tokens=24, precisions=[precision]
    )
    pipe = FewStepPipeline.from_pretrained(STUDENT, **pipeline_arguments(precision))
    text = TextConditioning(torch.randn(4, 24, 384), torch.ones(4, 24, dtype=torch.bool))
    sampler = pipe.card.sampler.override(1)
    pipe.sample(torch.randn(4, 3, side, side), text, sampler)  # compiles
    with torch.profiler.profile(profile_memory=True) as profile:
        pipe.sample(torch.randn(4, 3, side, side), text, sampler)
    given = text.states.nbytes
    assert plan.memory.evaluation == pytest.approx(peak(profile) + given, rel=0.1)


def peak(profile: torch.profiler.profile) -> int:
    """The most bytes that were alive at a time."""
    alive = most = 0
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        most = max(most, alive)
    return most


@pytest.mark.parametrize("tiled", [False, True])
def test_planned_decoding_takes_what_an_autoencoder_does(tmp_path: Path, tiled: bool) -> None:
    from diffusers import AutoencoderKL

    kinds = {"down_block_types": ["DownEncoderBlock2D"] * 3, "up_block_types": ["UpDecoderBlock2D"] * 3}
    model = AutoencoderKL(**kinds, block_out_channels=[8, 16, 16], norm_num_groups=4, latent_channels=3)
    model.save_pretrained(tmp_path)
    served = replace(Served.student(STUDENT), autoencoder=str(tmp_path))
    [plan] = plan_serving(served, ON_CPU, side=192, batch=2, precisions=["bfloat16"])
    real = load_autoencoder(str(tmp_path), tiling=tiled)
    latents = torch.randn(2, 3, 192, 192)  # 768×768 pixels, which are decoded one by one
    real.decode(latents)
    with torch.profiler.profile(profile_memory=True) as profile:
        real.decode(latents)
    planned = plan.memory.tiled if tiled else plan.memory.decoding
    assert planned <= peak(profile) <= 1.5 * planned, "convolutions need some memory to work in"
    assert plan.memory.autoencoder == sum(p.nbytes for p in model.parameters())
    assert plan.memory.tiled < plan.memory.decoding / 2


def test_a_text_encoder_is_counted_in_its_precision() -> None:
    for precision in ("float32", "bfloat16", "int8", "int4"):
        real = load_encoder("minilm", precision=precision)
        assert text_encoder_bytes("minilm", precision) == pytest.approx(real.nbytes, rel=0.02)
    assert text_encoder_bytes("labels:emoji", "float32") == 0
    [plan] = plan_serving(Served.student(STUDENT), ON_CPU, encoder_precision="int8", precisions=["int4"])
    assert plan.memory.text_encoder == text_encoder_bytes("minilm", "int8")


@pytest.mark.parametrize(
    ("source", "overrides", "encoder", "autoencoder"),
    [
        ("qwen_image_4nfe", [], 7.75e9, 127e6),
        ("flux_4nfe", [], 4.76e9 + 0.123e9, 84e6),
        (
            "flux_4nfe",
            ["teacher.path=black-forest-labs/FLUX.2-dev", "teacher.family=flux2"],
            23.5e9,
            84e6,
        ),
        ("flux2_klein_4nfe", [], 4.02e9, 84e6),
        ("flux2_edit_4nfe", [], 23.5e9, 84e6),
        ("flux2_klein_edit_4nfe", [], 4.02e9, 84e6),
        ("sd35_4nfe", [], 4.76e9 + 0.123e9 + 0.695e9, 84e6),
        ("longcat_4nfe", [], 7.62e9, 84e6),
        ("z_image_4nfe", [], 4.02e9, 84e6),
    ],
)
def test_known_pipelines_are_planned_whole_without_a_connection(
    source: str, overrides: list[str], encoder: float, autoencoder: float
) -> None:
    [plan] = recipe_plans(source, GPU(80), *overrides, encoder_precision="bfloat16", precisions=["bfloat16"])
    assert plan.memory.text_encoder == pytest.approx(2 * encoder, rel=0.03)
    assert plan.memory.autoencoder == pytest.approx(4 * autoencoder, rel=0.03)
    assert plan.memory.decoding > 0


def test_parts_whose_configuration_is_not_here_are_said_not_to_be_counted() -> None:
    served = replace(Served.student(STUDENT), text_encoder="no-such/encoder", autoencoder="no-such/vae")
    plans = plan_serving(served, GPU(80), precisions=["bfloat16"])
    assert (plans[0].memory.text_encoder, plans[0].memory.autoencoder) == (None, None)
    assert "not counted, as no configuration is found here: text encoder and autoencoder" in serving_table(
        plans
    )
    assert plans[0].memory.total == plans[0].memory.weights + plans[0].memory.evaluation
    overrides = ["teacher.path=facebook/DiT-XL-2-256"]
    [plan] = recipe_plans("imagenet_1nfe", GPU(80), *overrides, precisions=["bfloat16"])
    assert (plan.memory.text_encoder, plan.memory.autoencoder) == (0, None), (
        "classes, and latents of some kind"
    )


def test_a_precision_that_fits_is_told_from_one_that_does_not() -> None:
    plans = recipe_plans("qwen_image_4nfe", GPU(30), encoder_precision="int4")
    assert [plan.verdict for plan in plans] == [NO_FIT, NO_FIT, "fits", "fits"]
    parts = plans[-1].memory
    whole = replace(parts, text_encoder=10**9, decoding=20 * 10**9, tiled=10**9)

    def at(memory_gb: float) -> str:
        return replace(plans[-1], memory=whole, gpu=GPU(memory_gb)).verdict

    least = (whole.weights + whole.autoencoder) / 1e9
    assert at(least + 22) == "fits"
    assert at(least + 2.5) == "fits, decoding in tiles"
    assert at(least + 1.5) == "fits, with the text encoder on the host between batches"
    assert at(least + 0.5) == NO_FIT
    assert "fits in no precision: " in serving_table([replace(plans[-1], gpu=GPU(1))])


def test_time_is_that_of_computing_or_of_reading_the_weights() -> None:
    [plan] = recipe_plans("qwen_image_4nfe", GPU(80), precisions=["bfloat16"])
    reading = 4 * plan.memory.weights / 3.35e12
    assert plan.seconds == pytest.approx(reading), "64 tokens are computed faster than the weights are read"
    [large] = recipe_plans("qwen_image_4nfe", GPU(80), precisions=["bfloat16"], batch=64)
    assert large.seconds == pytest.approx(4 * large.operations / (989e12 * 0.4) / 64)


def test_commands_plan_without_weights(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["generate", "--dry-run", "--recipe", "qwen_image_4nfe", "--latent-size", "16"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("qwen_image_4nfe on a GPU of 80 GB: 1 image at a time, latents 16x16x16")
    assert [line.split()[0] for line in printed.splitlines()[3:7]] == list(PRECISIONS)
    config = tmp_path / "config.yaml"
    models = [{"name": name, "source": name} for name in ("emoji-student", "fashion-student")]
    deployment = {"name": "Generator", "user_config": {"models": models}}
    ours = {"name": "a", "import_path": "fewstep_serve.app:build"}
    config.write_text(json.dumps({"applications": [{**ours, "deployments": [deployment]}]}))
    assert main(["serve", "--dry-run", "--config", str(config), "--cpu", "--batch", "2"]) == 0
    printed = capsys.readouterr().out
    assert "emoji-student on a CPU: 2 images at a time" in printed
    assert "fashion-student on a CPU: 2 images at a time" in printed
    config.write_text(json.dumps({"applications": [{"name": "a", "import_path": "other:app"}]}))
    assert main(["serve", "--dry-run", "--config", str(config)]) == 2
    assert "has no application of fewstep_serve to plan" in capsys.readouterr().err


def test_a_service_is_planned_as_it_is_configured(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    engine = {"precision": "int8", "parts": {"text_encoder_precision": "bfloat16"}}
    offer = {"models": [{"name": "a", "source": "emoji-student"}], "batching": {"max_batch_size": 4}}
    application = {
        "import_path": "fewstep_serve.app:build",
        "args": {"engine": engine},
        "deployments": [{"name": "Generator", "user_config": offer}],
    }
    config.write_text(json.dumps({"applications": [application]}))
    assert main(["serve", "--dry-run", "--config", str(config)]) == 0
    printed = capsys.readouterr().out
    assert "4 images at a time" in printed
    assert "text encoder in bfloat16, autoencoder in float32" in printed
    [marked] = [line.split()[0] for line in printed.splitlines() if "(chosen)" in line]
    assert marked == "int8"


def test_sizes_that_cannot_be_cut_are_refused() -> None:
    with pytest.raises(UserError, match="--latent-size 15 can't be cut into the network's 2-cell patches"):
        plan_serving(Served.student(STUDENT), GPU(80), side=15)
