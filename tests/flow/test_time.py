"""Raw time, shifted time and segments."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fewstep.flow import Segments, TimeShift

SHIFTS = st.floats(0.2, 8.0)


@given(SHIFTS, st.floats(0.0, 1.0))
def test_unwarp_undoes_warp(m: float, raw: float) -> None:
    shift = TimeShift(m)
    assert shift.unwarp(shift.warp(raw)) == pytest.approx(raw, abs=1e-12)
    tensor = torch.tensor([raw], dtype=torch.float32)
    torch.testing.assert_close(shift.unwarp(shift.warp(tensor)), tensor, atol=1e-6, rtol=1e-5)


@given(SHIFTS, st.floats(0.0, 0.99))
def test_warp_is_increasing_and_keeps_the_ends(m: float, raw: float) -> None:
    shift = TimeShift(m)
    assert shift.warp(0.0) == 0.0
    assert shift.warp(1.0) == pytest.approx(1.0)
    assert shift.warp(raw + 0.01) > shift.warp(raw)


def test_dynamic_shift_follows_the_sequence_length() -> None:
    assert math.log(TimeShift.for_sequence(256).m) == pytest.approx(0.5)
    assert math.log(TimeShift.for_sequence(4096).m) == pytest.approx(1.15)
    assert math.log(TimeShift.for_sequence(2176).m) == pytest.approx(0.825)


@given(st.integers(1, 12), st.sampled_from([0.5, 0.7, 1.0]), st.floats(1e-4, 1.0))
def test_a_segment_contains_its_time(nfe: int, final: float, raw: float) -> None:
    raw_t = torch.tensor([raw])
    raw_src, size = Segments(nfe, final).containing(raw_t)
    assert raw_src + 1e-6 >= raw_t
    assert raw_t >= raw_src - size - 1e-6


@pytest.mark.parametrize("final", [0.5, 1.0])
@pytest.mark.parametrize("nfe", [1, 2, 4, 7, 8])
def test_segments_tile_raw_time(nfe: int, final: float) -> None:
    segments = Segments(nfe, final)
    raw_src, sizes = segments.containing(segments.boundaries[:-1].float())
    torch.testing.assert_close(raw_src, segments.boundaries[:-1].float())  # a boundary is the source below it
    torch.testing.assert_close(raw_src - sizes, segments.boundaries[1:].float())
    assert sizes.sum().item() == pytest.approx(1.0)
    if nfe > 1:
        assert (sizes[-1] / sizes[0]).item() == pytest.approx(final, rel=1e-5)
        torch.testing.assert_close(sizes[:-1], sizes[:1].expand(nfe - 1))


def test_a_boundary_reached_by_float_arithmetic_is_still_that_boundary() -> None:
    for nfe in range(2, 33):
        step, raw = torch.tensor(1 / (nfe - 0.5)), torch.tensor(1.0)
        for _ in range(nfe):
            raw_src, _ = Segments(nfe, 0.5).containing(raw[None])
            torch.testing.assert_close(raw_src[0], raw, atol=1e-5, rtol=0)
            raw = raw - step


def test_one_segment_is_all_of_time_whatever_its_scale() -> None:
    raw_src, size = Segments(1, 0.5).containing(torch.tensor([1e-7, 0.3, 1.0]))
    assert raw_src.tolist() == size.tolist() == [1.0] * 3
