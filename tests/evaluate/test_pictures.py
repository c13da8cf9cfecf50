"""Grids and plots: every pixel, label and point of what they are to show."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from fewstep.evaluate.grid import GridRow, comparison_grid, sample_grid
from fewstep.evaluate.plots import loss_plot, quality_plot
from fewstep.evaluate.report import MethodResult, Report

CAPTIONS = [
    "red heart, noto style",
    "woman lifting weights in a very crowded gymnasium at night, twemoji style",
    "",
]


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)


def places_of(tile, picture):
    """Upper left corners, (y, x), where `tile` occurs in `picture` exactly."""
    height, width = tile.shape[:2]
    corners = np.argwhere((picture == tile[0, 0]).all(axis=-1))
    return [
        (int(y), int(x)) for y, x in corners if np.array_equal(picture[y : y + height, x : x + width], tile)
    ]


def enlarged(pixels, factor):
    return np.kron(pixels, np.ones((factor, factor, 1), dtype=np.uint8))


def test_a_comparison_shows_every_image_enlarged_exactly_in_rows_and_columns(images):
    rows = [GridRow("Teacher", "64 guided steps", images), GridRow("Student", "4 evaluations", 255 - images)]
    picture = np.asarray(comparison_grid(rows, CAPTIONS))
    corners = [[places_of(enlarged(pixels, 6), picture) for pixels in row.images] for row in rows]
    assert all(len(found) == 1 for row in corners for found in row)
    tops, lefts = np.array(corners).reshape(2, 3, 2).transpose(2, 0, 1)
    assert (tops == tops[:, :1]).all()
    assert (lefts == lefts[:1]).all()
    assert tops[1, 0] >= tops[0, 0] + 96
    assert (np.diff(lefts[0]) >= 96).all()


def test_a_comparison_labels_rows_at_the_left_and_columns_above_inside_their_tiles(images):
    bare = np.asarray(comparison_grid([GridRow("", "", images)], [" ", " ", " "]))
    labelled = comparison_grid([GridRow("Teacher", "64 guided steps\n128 passes", images)], CAPTIONS)
    picture = np.asarray(labelled)
    top, left = places_of(enlarged(images[0], 6), picture)[0]
    ink = (picture < 200).all(axis=-1)
    assert ink[top : top + 96, : left - 1].any()
    columns = [places_of(enlarged(pixels, 6), picture)[0][1] for pixels in images]
    assert ink[: top - 1, columns[0] : columns[0] + 96].any()
    assert ink[: top - 1, columns[1] : columns[1] + 96].any()
    assert not ink[: top - 1, columns[2] :].any(), "an empty caption has no text, and none of its neighbour's"
    assert not ink[: top - 1, columns[0] + 96 : columns[1] - 1].any(), "a caption leaves its column"
    assert bare.shape[0] < picture.shape[0], "the head grows with the captions"


def test_the_highlighted_row_stands_out(images):
    plain = np.asarray(comparison_grid([GridRow("Student", "", images)], CAPTIONS))
    marked = np.asarray(comparison_grid([GridRow("Student", "", images, highlighted=True)], CAPTIONS))
    assert plain.shape == marked.shape
    assert (plain != marked).any()
    assert len(places_of(enlarged(images[1], 6), marked)) == 1


def test_images_larger_than_a_tile_are_shown_pixel_by_pixel():
    large = np.random.default_rng(1).integers(0, 256, (1, 100, 100, 3), dtype=np.uint8)
    assert len(places_of(large[0], np.asarray(comparison_grid([GridRow("a", "b", large)], ["c"])))) == 1


def test_samples_are_in_reading_order(images):
    picture = np.asarray(sample_grid(images, columns=2))
    (first,), (second,), (third,) = (places_of(enlarged(pixels, 3), picture) for pixels in images)
    assert first[0] == second[0] < third[0]
    assert first[1] == third[1] < second[1]


def a_report():
    figures = [("teacher_64", 128, 0.1, 0.0), ("euler_4", 8, 50.0, 30.0), ("euler_8", 16, 9.0, 20.0)]
    rows = [
        MethodResult(name, passes, k, (k - 1, k + 2), 5.0, (4.0, 6.0), distance, 0.1, 60.0)
        for name, passes, k, distance in [*figures, ("student_4", 4, 3.0, 15.0)]
    ]
    return Report(384, tuple(rows))


def test_the_quality_plot_draws_the_baseline_as_a_line_and_the_student_as_a_point():
    left, right = quality_plot(a_report()).axes
    lines = {tuple(line.get_xdata()): tuple(line.get_ydata()) for line in right.lines}
    assert lines == {(8, 16): (30.0, 20.0), (4,): (15.0,)}
    assert {tuple(container[0].get_ydata()) for container in left.containers} == {(50.0, 9.0), (3.0,)}
    assert [tick.get_text() for tick in right.get_xticklabels()] == ["4", "8", "16"]


def test_a_student_of_several_nfes_is_a_line_of_its_own():
    report = a_report()
    fewer = replace(report.row("student_4"), name="student_2", passes=2, paired_distance=18.0)
    _, right = quality_plot(replace(report, rows=(*report.rows[:1], fewer, *report.rows[1:]))).axes
    lines = {tuple(line.get_xdata()): tuple(line.get_ydata()) for line in right.lines}
    assert lines == {(8, 16): (30.0, 20.0), (2, 4): (18.0, 15.0)}
    assert fewer.label == "student, 2 evaluations"


def test_the_loss_plot_draws_the_loss_and_the_quartiles_that_were_logged():
    rows = [{"step": step, "train/loss": 1.0 / step, "train/loss_t1of4": 2.0} for step in range(1, 101)]
    rows += [{"step": 101, "train/loss": 1.0 / 101, "train/loss_t4of4": 3.0}]
    left, right = loss_plot(rows).axes
    assert len(left.lines[0].get_xdata()) == 101
    assert [len(line.get_xdata()) for line in right.lines[::2]] == [100, 1]
    assert [text.get_text() for text in right.get_legend().get_texts()] == ["image side", "noise side"]
    np.testing.assert_allclose(right.lines[1].get_ydata(), 2.0)


def test_plots_are_written_as_png(tmp_path):
    quality_plot(a_report()).savefig(tmp_path / "quality.png")
    loss_plot([{"step": 1, "train/loss": 0.5}]).savefig(tmp_path / "loss.png")
    loss_plot([]).savefig(tmp_path / "nothing_logged.png")
    for name in ("quality.png", "loss.png", "nothing_logged.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
