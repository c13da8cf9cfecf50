"""Recipes: typed, documented, and refused with a helpful sentence."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import pytest

from fewstep.cli.common import chosen_recipe
from fewstep.config import document
from fewstep.errors import UserError
from fewstep.models.heads import DXConfig
from fewstep.student import read_student_card, resolve_student
from fewstep.train.recipe import RECIPES, RENAMED, DistillRecipe, TeacherRecipe, load_recipe
from fewstep.train.runs import RECORDS


def load(*overrides: str, source: str | None = None) -> DistillRecipe:
    return load_recipe(DistillRecipe, source, overrides)


def test_every_shipped_recipe_is_valid() -> None:
    files = sorted(RECIPES.glob("*.yaml"))
    assert files
    for file in files:
        kind = TeacherRecipe if "teacher" in file.stem else DistillRecipe
        assert load_recipe(kind, file.stem, []).name == file.stem


def test_overrides_win_and_are_typed() -> None:
    recipe = load(
        "optimizer.lr=5e-4", "train.steps=7", "student.policy.components=4", source="emoji_qwen_4nfe"
    )
    assert (recipe.optimizer.lr, recipe.train.steps, recipe.student.policy.components) == (5e-4, 7, 4)


def test_a_recipe_says_only_what_differs_from_its_base(tmp_path: Path) -> None:
    (tmp_path / "short.yaml").write_text("name: short\ntrain: {steps: 7, seed: 3}\nsampler: {nfe: 2}\n")
    (tmp_path / "long.yaml").write_text("base: short\nname: long\ntrain: {steps: 70}\n")
    recipe = load_recipe(DistillRecipe, "long", ["train.seed=4"], tmp_path)
    assert (recipe.name, recipe.train.steps, recipe.train.seed, recipe.sampler.nfe) == ("long", 70, 4, 2)


def test_keys_of_before_version_0_2_are_read_and_told_their_new_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "short.yaml").write_text(
        "name: short\nimitation: {nfe: 2, dropout: 0.2, shift: 1.5}\nteacher: {guidance: 2.0}\n"
        "evaluation: {ladder: [4, 8], promise: quick}\n"
    )
    (tmp_path / "long.yaml").write_text(
        "base: short\nname: long\nsampler: {nfe: 8}\noptimizer: {clip_norm: 1.0}\n"
    )
    overrides = ["optimizer.rate=1e-4", "imitation.temperature=auto"]
    recipe = load_recipe(DistillRecipe, "long", overrides, tmp_path)
    assert (recipe.sampler.nfe, recipe.sampler.shift, recipe.sampler.temperature) == (8, 1.5, "auto")
    assert (recipe.imitation.gm_dropout, recipe.teacher.guidance_scale) == (0.2, 2.0)
    assert (recipe.optimizer.lr, recipe.optimizer.max_grad_norm) == (1e-4, 1.0)
    assert (recipe.evaluation.baseline_steps, recipe.evaluation.criteria) == ((4, 8), "quick")
    told = capsys.readouterr().err
    assert "optimizer.rate is now called optimizer.lr" in told
    assert "imitation.temperature is now called sampler.temperature" in told
    assert "imitation.nfe is now called sampler.nfe" in told


def test_every_new_name_of_an_old_key_is_a_field() -> None:
    known = {key for kind in (DistillRecipe, TeacherRecipe) for key, _, _ in document(kind)}
    assert set(RENAMED.values()) <= known
    assert not set(RENAMED) & known


def test_the_recipes_in_the_shipped_students_cards_load() -> None:
    for name, evaluations in (("emoji-student", 4), ("fashion-student", 1)):
        card = read_student_card(resolve_student(name).folder)
        recipe = load_recipe(DistillRecipe, card.recipe)
        assert recipe.sampler.nfe == card.sampler.nfe == evaluations
        assert recipe.sampler == card.sampler
        assert recipe.teacher.guidance_scale == card.teacher_sampler.guidance_scale == 2.0


def test_a_recipe_based_on_itself_is_refused(tmp_path: Path) -> None:
    (tmp_path / "one.yaml").write_text("base: two\n")
    (tmp_path / "two.yaml").write_text("base: one\n")
    with pytest.raises(UserError, match=r"based on itself.*one → two → one"):
        load_recipe(DistillRecipe, "one", [], tmp_path)


def test_a_resumed_run_brings_its_own_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    RECORDS.mkdir(parents=True)
    (RECORDS / "run-1.yaml").write_text("name: mine\ntrain: {steps: 7}\n")
    (RECORDS / "run-1.json").write_text(json.dumps({"mlflow_run": "a", "storage": str(tmp_path / "runs")}))
    options = Namespace(recipe=None, resume="run-1", set=["train.seed=4"])
    recipe = chosen_recipe(DistillRecipe, options, default="emoji_qwen_4nfe")
    assert (recipe.name, recipe.train.steps, recipe.train.seed) == ("mine", 7, 4)
    options = Namespace(recipe="emoji_qwen_4nfe_full", resume="run-1", set=[])
    assert chosen_recipe(DistillRecipe, options, default="").name == "emoji_qwen_4nfe_full"
    with pytest.raises(UserError, match=r"no run 'run-2' in runs; did you mean 'run-1'\?"):
        chosen_recipe(
            DistillRecipe, Namespace(recipe=None, resume="run-2", set=[]), default="emoji_qwen_4nfe"
        )
    options = Namespace(recipe=None, resume=None, set=[])
    assert chosen_recipe(DistillRecipe, options, default="emoji_qwen_4nfe").name == "emoji_qwen_4nfe"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.rat=1", r"unknown key 'optimizer.rat'; did you mean 'optimizer.lr'"),
        ("optimiser.lr=1", r"unknown key 'optimiser'"),
        ("train.steps=many", r"train.steps: .*integer.*'many'"),
        ("train.steps=0", r"train.steps"),
        ("sampler.final_step_scale=0", r"sampler.final_step_scale"),
        ("train.workers=49", r"data.batch_size=48 is too small for 49 workers with 1 micro-batches each: set it to 49"),
        ("train.workers=[2,1]", r"train: workers must be a number or \[fewest, most\]"),
        ("train.workers=[1,49]", r"too small for 49 workers"),
        ("steps", r"--set takes section.key=value"),
        ("evaluation.baseline_steps=[2]", r"evaluation: .*baseline_steps"),
        ("tracking.model=team/flux", r"tracking: model 'team/flux' must not hold"),
        ("tracking.model=flux.1", r"tracking: model 'flux.1'"),
        ("tracking.alias=Latest", r"tracking: alias 'Latest'"),
        ("tracking.alias=v2", r"tracking: alias 'v2'"),
        ("sampler.temperature=0", r"sampler.temperature"),
        ("teacher.guidance_interval=[0.7, 0]", r"guidance_interval must be \[least, largest\]"),
        ("train.steps=true", r"train.steps: .*integer.*'true'"),
        ("optimizer.lr=on", r"optimizer.lr: .*number.*'on'"),
        ("sampler.more_nfes=[2, no]", r"sampler.more_nfes.1: .*integer.*'no'"),
        ("train.steps=1:30", r"train.steps: .*integer.*'1:30'"),
        ("optimizer.lr=1:30.5", r"optimizer.lr: .*number.*'1:30.5'"),
        ("optimizer.lr=inf", r"optimizer.lr: .*finite number"),
        ("optimizer.weight_decay=.inf", r"optimizer.weight_decay: .*finite number"),
        ("optimizer.betas=[0.9, .nan]", r"optimizer.betas.1: .*finite number"),
        ("teacher.guidance_scale=inf", r"teacher.guidance_scale: .*finite number"),
        ("train.steps=2026-13-45", r"--set train.steps=2026-13-45: the value is not YAML"),
        ("train.steps=@champion", r"--set train.steps=@champion: the value is not YAML; put text in quotes"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_in_one_sentence(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load(override)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", [
    "2024", "on", "no", "007", "1e-4", "1_000", "null and void", "photos/set #2", "a: b", "@champion", "[x]", 
    "{y}", "~/photos", "s3://bucket/my runs", "2026-11-28", "0x1f", "1:30", "'quoted", "* all", "% done", "", " ",
    '"a" and "b"', "'a' 'b'", "'it's'", '"a" # "b"', '"a": "b"', '"', "'' or ''",
])  # fmt: skip
@pytest.mark.parametrize("key", ["data.path", "tracking.experiment", "teacher.path", "train.storage"])
def test_text_stays_text(key: str, text: str) -> None:
    section, name = key.split(".")
    assert getattr(getattr(load(f"{key}={text}"), section), name) == text


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("train.steps=010", 10),
        ("train.steps=08", 8),
        ("train.steps=1_000", 1000),
        ("train.steps=1e3", 1000),
        ("train.seed=-010", -10),
        ("optimizer.lr=010", 10.0),
        ("optimizer.lr=1e-4", 1e-4),
        ("optimizer.lr=.5E1", 5.0),
        ("sampler.temperature=1e-1", 0.1),
        ("sampler.more_nfes=[1e1, 010, 2]", (10, 10, 2)),
        ("optimizer.betas=[9e-1, 0.95]", (0.9, 0.95)),
        ("sampler.h=.inf", float("inf")),
        ("sampler.h=inf", float("inf")),
        ("train.gpu=on", True),
        ("train.compile=null", None),
    ],
)
def test_numbers_are_those_that_are_written_alone_in_lists_and_in_sections(
    override: str, value: object
) -> None:
    key, _, text = override.partition("=")
    section, name = key.split(".")
    for written in (override, f"{section}={{{name}: {text}}}"):
        assert getattr(getattr(load(written), section), name) == value


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_a_recipe_is_read_by_its_byte_order_mark(encoding: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_bytes("name: mine\ndata: {path: bücher}\n".encode(encoding))
    assert load(source=str(file)).data.path == "bücher"


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16-le"])
def test_a_recipe_that_is_no_text_is_refused(encoding: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_bytes("name: mine\ndata: {path: bücher}\n".encode(encoding))
    with pytest.raises(UserError, match=r"^--recipe: .*mine.yaml holds .*UTF-"):
        load(source=str(file))


def test_text_may_be_quoted_or_absent_and_stays_text_in_a_section() -> None:
    assert load("student.start='@champion'").student.start == "@champion"
    assert load('data.path="007"').data.path == "007"
    assert load("student.start=null").student.start is None
    assert load("student.start=2024").student.start == "2024"
    assert load("tracking={experiment: 007, model: on}").tracking.experiment == "007"
    assert load("student.lora={targets: [on, 12]}").student.lora.targets == ("on", "12")
    assert load("sampler.shift=dynamic").sampler.shift == "dynamic"
    assert load("sampler.shift=2").sampler.shift == 2.0


def test_a_file_without_keys_is_no_recipe(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("just words")
    with pytest.raises(UserError, match=r"mine.yaml is no recipe: it must hold keys and values"):
        load(source=str(tmp_path / "mine.yaml"))


def test_an_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'emoji_qwen_4nfe'"):
        load(source="emoji_qwen_4nf")


def test_every_field_is_documented() -> None:
    for kind in (DistillRecipe, TeacherRecipe):
        undocumented = [key for key, _, text in document(kind) if not text and key != "name"]
        assert not undocumented


def test_an_old_key_beside_an_empty_or_broken_section() -> None:
    assert load_recipe(DistillRecipe, {"imitation": {"nfe": 2}, "sampler": None}, []).sampler.nfe == 2
    with pytest.raises(UserError, match="sampler"):
        load_recipe(DistillRecipe, {"imitation": {"nfe": 2}, "sampler": 5}, [])


def test_a_section_of_another_type_takes_the_place_of_the_bases() -> None:
    assert load_recipe(DistillRecipe, "flux_4nfe_dx").student.policy == DXConfig(points=10, mode="grid")
    polynomial = load_recipe(DistillRecipe, "qwen_image_4nfe_dx_polynomial").student
    assert polynomial.policy == DXConfig(points=10, mode="polynomial")
    assert polynomial.lora is not None
    assert polynomial.lora.rank == 256


@pytest.mark.parametrize(
    ("kind", "name", "message"),
    [
        (
            DistillRecipe,
            "fashion_teacher",
            r"recipe of a teacher \(it has network\): give it to fewstep train-teacher",
        ),
        (
            TeacherRecipe,
            "fashion_dit_1nfe",
            r"recipe of a student \(it has student\): give it to fewstep distill",
        ),
    ],
)
def test_a_recipe_of_the_other_kind_is_told(kind: type, name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_recipe(kind, name)
