"""Plans: parameter counts that are public come out, and memory is what a real step takes."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import tiny
from fewstep.errors import UserError
from fewstep.models.architecture import NETWORKS, network_config
from fewstep.models.conditioning import TextConditioning
from fewstep.models.precision import held_bytes
from fewstep.plan.report import plan_table
from fewstep.plan.serving import GPU, Served, plan_serving
from fewstep.plan.training import Machine, Plan, count_parameters, make_plan, new_student
from fewstep.train.objectives import Distillation
from fewstep.train.parallel import BUCKET_BYTES
from fewstep.train.recipe import DistillRecipe, load_recipe


def recipe(*overrides: str, source: str | None = None) -> DistillRecipe:
    return load_recipe(DistillRecipe, source, overrides)


@pytest.mark.parametrize(
    ("hub_id", "billions", "settings"),
    [
        ("Qwen/Qwen-Image", 20.4, ["teacher.family=qwen_image"]),
        (
            "black-forest-labs/FLUX.1-dev",
            11.9,
            ["teacher.family=flux", "teacher.embedded_guidance_scale=3.5"],
        ),
        ("facebook/DiT-XL-2-256", 0.675, ["teacher.family=dit"]),
        ("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", 1.419, ["teacher.family=wan:21"]),
    ],
)
def test_published_parameter_counts_come_out(hub_id: str, billions: float, settings: list[str]) -> None:
    network = new_student(recipe(f"teacher.path={hub_id}", *settings))
    assert count_parameters(network) / 1e9 == pytest.approx(billions, rel=3e-3)


@pytest.mark.parametrize(
    "source",
    [
        "flux_4nfe",
        "imagenet_1nfe",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("qwen_image_4nfe", "wan_4nfe")),
    ],
)
def test_the_papers_recipes_can_be_planned(source: str) -> None:
    overrides = ["teacher.path=facebook/DiT-XL-2-256"] if source == "imagenet_1nfe" else []
    plan = make_plan(recipe(*overrides, source=source), Machine(gpus=8, memory_gb=80), side=32)
    assert plan.memory.total < 80e9
    assert plan.teacher_operations > plan.parameters, "the teacher was asked"


def test_the_students_own_weights_are_counted_apart() -> None:
    network = new_student(recipe(source="qwen_image_4nfe"))
    assert count_parameters(network) / 1e9 == pytest.approx(20.4, rel=3e-3)
    # Adapters of rank 256 on the FFNs: 60 image and 59 text streams × 2 layers × 256·(3072 + 12288).
    adapters = 119 * 2 * 256 * (3072 + 4 * 3072)
    own = sum(p.numel() for p in network.trainable().values())
    assert adapters < own < 1.05 * adapters


SMALL = [
    "data.batch_size=8", "student.lora={rank: 8, targets: [paper]}", "student.policy={type: gmflow, components: 3}",
]  # fmt: skip

STEP = """
import json, sys
import torch
from pathlib import Path
from fewstep.distill import PowerEMA
from fewstep.models.conditioning import TextConditioning
from fewstep.train.objectives import Distillation
from fewstep.train.recipe import DistillRecipe, load_recipe
from fewstep.train.optimizers import build_optimizers
from fewstep.draws import SampleGenerators
from fewstep.data.stream import Batch

recipe = load_recipe(DistillRecipe, None, json.loads(sys.argv[1]))
size, tokens, batch_size = 16, 24, recipe.data.batch_size
torch.set_num_threads(1)
with torch.profiler.profile(profile_memory=True) as profile:
    null = TextConditioning.collate([torch.randn(2, 384)])
    objective = Distillation(recipe, null, torch.device("cpu"))
    objective.read_weights(torch.device("cpu"))
    if recipe.train.activation_checkpointing:
        objective.transformer.enable_gradient_checkpointing()
    parameters = objective.parameters()
    blocks = objective.family.blocks(objective.transformer)
    optimizers = build_optimizers(parameters.values(), blocks, recipe.optimizer)
    average = PowerEMA(parameters, 7.0)
    text = TextConditioning.collate([torch.randn(tokens, 384)] * batch_size)
    batch = Batch(
        latent=torch.randn(batch_size, 3, size, size), conditioning=text, captions=[""] * batch_size,
        keys=[""] * batch_size, shape=(3, size, size),
    )
    for step in (1, 2):
        generators = SampleGenerators(0, step, range(batch_size), batch_size)
        for result in objective.losses(batch, generators, step):
            result.loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        average.update(step)
alive = peak = 0
events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
for event in sorted(events, key=lambda e: e.start_ns()):
    alive += event.nbytes()
    peak = max(peak, alive)
print(peak)
"""


LOWER = ("bfloat16", "int8", "int4")

ALL_WEIGHTS = ["student.lora=null", "student.full=true"]


@pytest.mark.parametrize(
    ("guidance", "checkpointing", "student"),
    [
        (1, "false", []),
        (3, "true", []),
        (1, "false", ["student.lora={rank: 128, targets: [paper]}", "optimizer.type=adam8bit"]),
        *[(3, "true", [f"train.precision={precision}"]) for precision in ("bfloat16", "int4")],
        *[
            pytest.param(guidance, checkpointing, more, marks=pytest.mark.slow)
            for guidance, checkpointing, more in (
                (1, "true", []),
                (3, "false", []),
                (3, "true", ["train.precision=int8"]),
                *((3, "false", [f"train.precision={precision}"]) for precision in LOWER),
            )
        ],
    ],
)
def test_planned_memory_is_within_a_tenth_of_a_real_steps_peak(
    guidance: int, checkpointing: str, student: list[str]
) -> None:
    """Against the CPU allocator's own record of two steps, in a process of its own."""
    overrides = [
        *SMALL,
        f"teacher.guidance_scale={guidance}",
        f"train.activation_checkpointing={checkpointing}",
        *student,
    ]
    plan = make_plan(recipe(*overrides), Machine(gpus=1, memory_gb=1), side=16, tokens=24)
    done = subprocess.run(
        [sys.executable, "-c", STEP, json.dumps(overrides)], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert plan.memory.total == pytest.approx(int(done.stdout.split()[-1]), rel=0.1)


def small_plan(*overrides: str, gpus: int = 1, memory_gb: float = 1) -> Plan:
    return make_plan(recipe(*SMALL, *overrides), Machine(gpus, memory_gb), side=16, tokens=24)


@pytest.mark.parametrize("precision", ["float32", *LOWER])
@pytest.mark.parametrize("student", [[], ALL_WEIGHTS])
def test_planned_weights_are_those_that_a_run_holds(precision: str, student: list[str]) -> None:
    settings = recipe(*SMALL, *student, f"train.precision={precision}")
    objective = Distillation(settings, TextConditioning.collate([torch.randn(2, 384)]), torch.device("cpu"))
    objective.read_weights(torch.device("cpu"))
    planned = small_plan(*student, f"train.precision={precision}").memory.weights
    # Layers of the small teacher have short rows: scales take more there than `bytes_of` says of large ones.
    exact = precision in ("float32", "bfloat16")
    assert planned == pytest.approx(held_bytes(objective.model), rel=0 if exact else 0.05)


def test_a_cpu_computes_attention_in_float32_and_a_gpu_in_the_lowest_type() -> None:
    cpu, gpu = (
        small_plan("train.precision=bfloat16", f"train.gpu={gpu}").memory for gpu in ("false", "true")
    )
    assert cpu.activations > gpu.activations
    assert replace(cpu, activations=0) == replace(gpu, activations=0)
    assert small_plan("train.gpu=true").memory == small_plan().memory, "all is float32 anyway"


def test_workers_gather_weights_in_the_types_that_they_are_held_in() -> None:
    wide, held = (
        small_plan("train.gpu=true", f"train.precision={precision}", gpus=4).memory
        for precision in ("float32", "bfloat16")
    )
    assert wide.gathered > held.gathered > wide.gathered / 2
    assert wide.gradients == held.gradients, "trained weights are float32"


def test_unpacked_weights_do_not_stay_until_backward() -> None:
    activations = {p: small_plan(f"train.precision={p}").memory.activations for p in LOWER}
    assert activations["int8"] == pytest.approx(activations["bfloat16"], rel=0.03)
    assert activations["int4"] == pytest.approx(activations["bfloat16"], rel=0.03)


def test_more_gpus_hold_smaller_shares_and_checkpointing_less() -> None:
    one, four = small_plan("train.gpu=true"), small_plan("train.gpu=true", gpus=4)
    assert four.memory.weights == pytest.approx(one.memory.weights / 4, rel=1e-6)
    assert four.memory.optimizer == pytest.approx(one.memory.optimizer / 4, rel=1e-6)
    assert (
        four.student_operations + four.teacher_operations == one.student_operations + one.teacher_operations
    ), "the batch is the same"
    assert four.hours == pytest.approx(one.hours / 4)
    assert one.otherwise.activations < one.memory.activations


def test_muon_keeps_one_number_per_weight_of_the_blocks_where_adam_keeps_two() -> None:
    adam, muon = small_plan(*ALL_WEIGHTS), small_plan(*ALL_WEIGHTS, "optimizer.type=muon")
    network = new_student(recipe(*SMALL, *ALL_WEIGHTS))
    blocks = network.family.blocks(network.transformer)
    trained = [p for block in blocks for p in block.parameters() if p.requires_grad]
    matrices = sum(p.numel() for p in trained if p.ndim == 2)
    assert adam.memory.optimizer - muon.memory.optimizer == 4 * matrices > 0
    assert replace(adam.memory, optimizer=0) == replace(muon.memory, optimizer=0)


def test_adam_of_8_bits_and_an_ema_on_the_host_are_counted_as_such() -> None:
    wide = [*ALL_WEIGHTS, "train.gpu=true"]
    adam, less = small_plan(*wide), small_plan(*wide, "optimizer.type=adam8bit")
    assert less.memory.optimizer / adam.memory.optimizer == pytest.approx(0.25, abs=0.02)
    assert replace(adam.memory, optimizer=0) == replace(less.memory, optimizer=0)
    hosted = small_plan(*wide, "optimizer.ema_offload=true").memory
    assert hosted == replace(adam.memory, ema=0)
    assert small_plan(*ALL_WEIGHTS, "optimizer.ema_offload=true").memory.ema, (
        "without a GPU it stays in the same memory"
    )


def test_replicas_average_their_gradients_in_place_but_for_one_message() -> None:
    alone, replicas = (
        small_plan(*ALL_WEIGHTS, "train.parallel=ddp", gpus=gpus).memory.gradients for gpus in (1, 4)
    )
    assert alone < replicas <= alone + BUCKET_BYTES


def test_operations_are_those_of_the_method() -> None:
    once, guided = small_plan("teacher.guidance_scale=1"), small_plan("teacher.guidance_scale=3")
    assert guided.teacher_operations == 2 * once.teacher_operations, "a guided query is two passes"
    walk = small_plan("teacher.guidance_scale=1", "imitation.data_free=true")
    assert walk.teacher_operations == 4 * once.teacher_operations, "a walk has four segments"
    assert walk.cache < once.cache, "and needs no latents"


def test_a_run_that_does_not_fit_names_a_remedy() -> None:
    plan = small_plan(memory_gb=0.05)
    assert plan.memory.total > 0.05e9
    assert "does not fit 0.05 GB: " in plan_table(plan)


@pytest.mark.parametrize("share", [0.9, 0.6, 0.4])
def test_the_settings_that_are_named_make_a_run_fit(share: float) -> None:
    """Of the least that the run can take, up to what it takes, in several steps."""
    plan = small_plan()
    limit = share * plan.memory.total / 1e9
    [line] = [line for line in plan_table(small_plan(memory_gb=limit)).splitlines() if "does not fit" in line]
    settings = line.partition(": set ")[2].split(" and ")
    thrifty = small_plan(*settings, memory_gb=limit)
    assert thrifty.memory.total <= limit * 1e9, settings


def test_settings_that_do_not_suffice_are_not_named() -> None:
    assert "accumulate" not in plan_table(small_plan("train.precision=int4", memory_gb=1e-4))


def test_what_cannot_be_planned_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"batch_size=\d+ is too small for 999 workers"):
        small_plan(gpus=999)
    with pytest.raises(UserError, match=r"train.precision int8: FSDP does not shard .* train.parallel=ddp"):
        small_plan("train.precision=int8", gpus=4)
    assert small_plan("train.precision=int8", "train.parallel=ddp", gpus=4).memory.gathered == 0
    with pytest.raises(UserError, match=r"has no config.json"):
        make_plan(recipe(f"teacher.path={tmp_path}"), Machine(1, 80))
    with pytest.raises(UserError, match=r"--latent-size 15 can't be cut"):
        make_plan(recipe(), Machine(1, 80), side=15)


def test_the_known_architectures_ship_with_fewstep() -> None:
    assert all(network_config(hub_id)["_class_name"] for hub_id in NETWORKS)


def test_reference_images_are_counted(tiny_teacher: Path, tmp_path: Path) -> None:
    plans, served = [], []
    for references in (0, 1):
        tiny.write_data(data := tmp_path / str(references), references=references)
        settings = tiny.recipe(data, tiny_teacher)
        plans.append(make_plan(settings, Machine(1, 80), tokens=4))
        [one] = plan_serving(Served.recipe(settings), GPU(80), tokens=4, precisions=["float32"])
        served.append(one)
        unprepared = tiny.recipe(tmp_path / "none", tiny_teacher)
        asked = make_plan(unprepared, Machine(1, 80), tokens=4, references=references)
        assert asked.operations == plans[-1].operations
        [also] = plan_serving(
            Served.recipe(unprepared), GPU(80), tokens=4, references=references, precisions=["float32"]
        )
        assert also.operations == one.operations
        assert ("4 tokens, reference images: 1" in plan_table(asked)) == bool(references)
    with pytest.raises(UserError, match=r"--references 2: the data or the student has 1"):
        make_plan(settings, Machine(1, 80), references=2)
    with pytest.raises(UserError, match=r"--references 1: this network takes none"):
        make_plan(recipe("teacher.path=fashion", "teacher.family=dit"), Machine(1, 80), references=1)
    # 32 image tokens in place of 16, beside 4 of the text, everywhere but in the head.
    assert plans[1].operations > 1.3 * plans[0].operations
    assert plans[1].memory.activations > 1.3 * plans[0].memory.activations
    assert plans[1].cache > plans[0].cache
    assert served[1].operations > 1.3 * served[0].operations
