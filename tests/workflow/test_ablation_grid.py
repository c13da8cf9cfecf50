"""A grid's cells: equal operations, schedules that keep their share, and settings that are refused early."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml

from fewstep.errors import UserError
from fewstep.workflow.ablation.cells import CellResult, chosen, is_done, read_results
from fewstep.workflow.ablation.grid import GRIDS, Cell, Grid, load_grid

TREE = {
    "name": "small",
    "about": "A test.",
    "base": "fashion_dit_1nfe",
    "steps": 100,
    "seeds": [0, 1],
    "search": {"set": {"optimizer.lr": [1e-3, 2e-3]}, "share": 0.5, "figure": "kid_teacher"},
    "variants": {
        "plain": {"about": "the recipe"},
        "four_states": {"about": "more", "set": ["imitation.intermediate_states=4"]},
    },
    "claims": [
        {
            "claim": "more states help",
            "paper": "yes",
            "variant": "four_states",
            "against": "plain",
            "figure": "kid_teacher",
            "expect": "better",
        }
    ],
}


def grid(tmp_path: Path, **changes: object) -> Grid:
    file = tmp_path / "grid.yaml"
    file.write_text(yaml.safe_dump(TREE | changes, sort_keys=False))
    return load_grid(str(file))


def result(cell: Cell, grid: Grid, **figures: float) -> CellResult:
    return CellResult(
        cell=cell,
        recipe=grid.recipe(cell).model_dump(mode="json"),
        version="0",
        machine="here",
        steps=10,
        operations=1,
        hours=0.5,
        figures=figures,
        teacher={"passes": 128.0} | figures,
        solvers={"euler_4": {"passes": 8.0} | figures},
        captions=8,
    )


@pytest.mark.parametrize("name", [file.stem for file in GRIDS.glob("*.yaml")])
def test_bundled_grids_are_valid(name: str) -> None:
    found = load_grid(name)
    assert found.name == name
    assert len(found.seeds) >= 3


def test_variants_take_the_operations_of_the_base(tmp_path: Path) -> None:
    small = grid(tmp_path)
    plain, more = (Cell("small", name, 0) for name in ("plain", "four_states"))
    spent = [small.operations(cell) for cell in (plain, more)]
    assert small.recipe(plain).train.steps == 100
    assert small.recipe(more).train.steps < 60
    assert spent[1] == pytest.approx(spent[0], rel=0.02)


def test_a_variant_that_goes_on_from_a_student_shares_its_operations_with_it(tmp_path: Path) -> None:
    finish = {"about": "x", "before": {"share": 0.6}, "set": ["objective=dmd2", "dmd2.last_segment=true"]}
    small = grid(
        tmp_path, variants=TREE["variants"] | {"finish": finish | {"search": {"optimizer.lr": [1e-5, 2e-5]}}}
    )
    plain, cell = (Cell("small", name, 0) for name in ("plain", "finish"))
    before, own = small.stages(cell)
    assert before.train.steps == 60
    assert before.objective == "imitation"
    assert own.objective == "dmd2"
    assert Path(own.student.start).name == before.name
    assert small.stages(plain) == (small.recipe(plain),)
    assert small.operations(cell) == pytest.approx(small.operations(plain), rel=0.02)
    assert [one.found for one in small.searched() if one.variant == "finish"] == [
        ("optimizer.lr=1e-05",), ("optimizer.lr=2e-05",)
    ]  # fmt: skip
    with pytest.raises(UserError, match="as many combinations"):
        grid(tmp_path, variants=TREE["variants"] | {"finish": finish | {"search": {"optimizer.lr": [1e-5]}}})


def test_warm_ups_keep_their_share_of_the_steps(tmp_path: Path) -> None:
    small = grid(tmp_path)
    tried = small.recipe(small.searched()[0])
    assert tried.train.steps == 50
    assert tried.optimizer.warmup_steps == small.recipe(Cell("small", "plain", 0)).optimizer.warmup_steps // 2
    assert tried.optimizer.lr == 1e-3
    assert tried.train.seed == 1000


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"variants": {"plain": {"about": "x", "set": ["imitation.windows=1"]}}, "claims": []}, "window"),
        ({"variants": {"plain": {"about": "x"}}}, "four_states"),
        ({"seeds": [1000]}, "search.seed"),
        ({"seeds": [1, 1]}, "different"),
        ({"figure": "fid"}, "unknown key"),
        ({"base": "fashion"}, "no recipe"),
    ],
)
def test_what_is_wrong_is_told_before_training(tmp_path: Path, changes: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        grid(tmp_path, **changes)


def test_the_search_takes_each_variants_best_and_waits_until_all_were_tried(tmp_path: Path) -> None:
    small = grid(tmp_path)
    first, second, third, fourth = small.searched()
    results = {
        cell.name: result(cell, small, kid_teacher=value)
        for cell, value in ((first, 2.0), (second, 1.0), (third, 3.0))
    }
    assert chosen(small, results) == {"plain": second.found}
    diverged = dataclasses.replace(result(fourth, small), figures={}, failure="diverged")
    assert chosen(small, results | {fourth.name: diverged}) == {
        "plain": second.found,
        "four_states": third.found,
    }


def test_a_result_counts_only_for_the_recipe_that_it_was_made_with(tmp_path: Path) -> None:
    small = grid(tmp_path)
    cell = Cell("small", "plain", 0)
    result(cell, small, kid_teacher=1.0).save(tmp_path / "results" / "small")
    results = read_results(tmp_path / "results", small)
    assert is_done(cell, small, results)
    assert not is_done(cell, grid(tmp_path, steps=200), results)
    assert not is_done(cell, grid(tmp_path, set=["imitation.gm_dropout=0"]), results)
    assert is_done(cell, grid(tmp_path, set=["train.log_every=3"]), results), "changes no result"


def test_each_cell_has_a_name_of_its_own_and_a_changed_one_another_run(tmp_path: Path) -> None:
    search = {"set": {"optimizer.lr": [0.5, 5, 0.05]}}
    small = grid(tmp_path, search=search)
    assert (
        len({cell.name for cell in [*small.searched(), *small.cells(dict.fromkeys(TREE["variants"], ()))]})
        == 10
    )
    cell = Cell("small", "plain", 0)
    before, after = small.recipe(cell).name, grid(tmp_path, steps=200).recipe(cell).name
    assert before.startswith("small-plain-seed0-")
    assert before != after
    assert grid(tmp_path, set=["train.log_every=3"]).recipe(cell).name == before


def test_a_file_of_something_else_is_named(tmp_path: Path) -> None:
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "x.json").write_text("{}")
    with pytest.raises(UserError, match=r"x\.json"):
        read_results(tmp_path, grid(tmp_path))
