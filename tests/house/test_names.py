"""One class per name, one file of tests per name, every public name documented, one place for a sampler's setting."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCES = (ROOT / "platform", ROOT / "serve")
FILES = sorted(file for source in SOURCES for file in source.rglob("*.py"))

Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def public_definitions(tree: ast.Module) -> Iterator[tuple[str, Definition]]:
    """Public classes and functions of a module, and the public methods of those classes."""
    for node in tree.body:
        if isinstance(node, Definition) and not node.name.startswith("_"):
            yield node.name, node
            if isinstance(node, ast.ClassDef):
                for inner in node.body:
                    if isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef) and inner.name[0] != "_":
                        yield f"{node.name}.{inner.name}", inner


def test_no_two_classes_have_one_name() -> None:
    places = defaultdict(list)
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ClassDef):
                places[node.name].append(str(file.relative_to(ROOT)))
    assert not {name: where for name, where in places.items() if len(where) > 1}


def test_no_two_test_files_have_one_name() -> None:
    """pytest collects files outside of packages by their names alone, and stops at the second of a name."""
    places = defaultdict(list)
    for file in (ROOT / "tests").rglob("test_*.py"):
        places[file.name].append(str(file.relative_to(ROOT)))
    assert not {name: where for name, where in places.items() if len(where) > 1}


def test_public_names_are_documented() -> None:
    documented, missing = 0, []
    for file in FILES:
        for name, node in public_definitions(ast.parse(file.read_text())):
            # Methods that a base class documents need no second text; they are few, and counted against the goal.
            if ast.get_docstring(node):
                documented += 1
            else:
                missing.append(f"{file.relative_to(ROOT)}: {name}")
    share = documented / (documented + len(missing))
    assert share >= 0.98, f"{share:.1%} documented; missing: {missing}"


def test_a_new_sampler_setting_is_declared_in_one_place(tmp_path: Path) -> None:
    """Added to a copy of the library, it is at once in recipes, help pages, losses, cards and pipelines."""
    copy = shutil.copytree(ROOT / "platform" / "fewstep", tmp_path / "fewstep")
    file = copy / "flow" / "sampler_config.py"
    text = file.read_text()
    field = "    h: float = Field(0.0, ge=0, allow_inf_nan=True)\n"
    assert text.count(field) == 1
    file.write_text(
        text.replace(field, f'    sparkle: float = 0.25\n    """A setting that is new."""\n{field}')
    )
    program = """
import fewstep, torch
from pathlib import Path
from fewstep.models.conditioning import TextConditioning
from fewstep.models.teacher import TeacherReference
from fewstep.student import FewStepPipeline, read_student_card, resolve_student, write_student_card
from fewstep.train.objectives import Distillation, distillation
from fewstep.config import document
from fewstep.train.recipe import DistillRecipe, load_recipe

assert Path(fewstep.__file__).is_relative_to(Path.cwd())
recipe = load_recipe(DistillRecipe, "emoji_qwen_4nfe", ["sampler.sparkle=0.75"])
assert ("sampler.sparkle", "0.25", "A setting that is new.") in set(document(DistillRecipe))

seen = {}
def remember(student, teacher, noise, generator, sampler, config, ratio):
    seen["loss"] = sampler.sparkle
    return iter(())
distillation.imitation_walk = remember
null = TextConditioning(torch.zeros(1, 2, 384), torch.ones(1, 2, dtype=torch.bool))
objective = Distillation(recipe, null, torch.device("cpu"))
objective.read_weights(torch.device("cpu"))
batch = type("Batch", (), {"conditioning": null, "shape": (3, 16, 16), "__len__": lambda self: 1})()
list(objective.losses(batch, torch.Generator(), step=1))

card = read_student_card(resolve_student("emoji-student").folder)
write_student_card(card.model_copy(update={"sampler": recipe.sampler}), Path.cwd())
pipe = FewStepPipeline(objective.model, read_student_card(Path.cwd()))
seen["card and pipeline"] = pipe.sampler_for((3, 16, 16)).sparkle
print(seen)
"""
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "{'loss': 0.75, 'card and pipeline': 0.75}"
