"""The notebook of the documentation: it lies there without outputs, and runs from its first cell to its last."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from PIL import Image

NOTEBOOKS = sorted((Path(__file__).parents[2] / "docs").rglob("*.ipynb"))
SECONDS_PER_CELL = 400
"""On two busy cores the distillation, the longest cell, takes a quarter of it."""


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_notebooks_are_committed_without_outputs(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == [], f"{cell.id}: clear all outputs before you commit"
            assert cell.execution_count is None


@pytest.fixture(scope="module")
def executed(
    ray_cluster: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, nbformat.NotebookNode]:
    """The tutorial about own images, run in an empty folder on the test session's Ray node."""
    import ray

    home = tmp_path_factory.mktemp("home")
    [path] = [path for path in NOTEBOOKS if path.name == "own_images.ipynb"]
    notebook = nbformat.read(path, as_version=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEWSTEP_HOME", str(home))
        patch.setenv("RAY_ADDRESS", ray.get_runtime_context().gcs_address)
        patch.setenv("IPYTHONDIR", str(home / ".ipython"))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        client = NotebookClient(
            notebook, timeout=SECONDS_PER_CELL, resources={"metadata": {"path": str(home)}}
        )
        client.execute()
    return home, notebook


def printed(notebook: nbformat.NotebookNode, cell_id: str) -> str:
    """What a cell wrote."""
    [cell] = [cell for cell in notebook.cells if cell.id == cell_id]
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")


def pictures(notebook: nbformat.NotebookNode, cell_id: str) -> int:
    """How many pictures a cell shows."""
    [cell] = [cell for cell in notebook.cells if cell.id == cell_id]
    return sum("image/png" in output.get("data", {}) for output in cell.outputs)


@pytest.mark.slow
def test_the_pictures_become_a_dataset(executed: tuple[Path, nbformat.NotebookNode]) -> None:
    home, notebook = executed
    assert pictures(notebook, "draw") == 1
    assert "data/shapes is ready" in printed(notebook, "prepare-data")
    assert (home / "data" / "shapes" / "dataset.json").exists()


@pytest.mark.slow
def test_a_student_is_distilled_measured_and_registered(executed: tuple[Path, nbformat.NotebookNode]) -> None:
    home, notebook = executed
    assert "20/20" in printed(notebook, "distil")
    assert "models:/shapes-4step@champion" in printed(notebook, "distil")
    assert "KID" in printed(notebook, "table")
    assert pictures(notebook, "picture") == 1
    assert (home / "mlflow.db").exists()


@pytest.mark.slow
def test_the_registered_student_generates(executed: tuple[Path, nbformat.NotebookNode]) -> None:
    home, notebook = executed
    with Image.open(home / "out" / "circles.png") as image:
        assert len(image.getcolors(1 << 20)) > 10
    assert pictures(notebook, "pipeline") == 1
    assert (home / "out" / "blue_square.png").exists()
