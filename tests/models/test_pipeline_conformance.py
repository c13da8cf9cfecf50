"""A teacher samples as its own pipeline does: conformance with diffusers' pipelines on tiny random networks.

`python -m pipelines` in this folder prints the table of differences.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from pipelines.compare import CASES, SIZES, Case, compared

from fewstep.models.diffusers_family import DiffusersFamily
from fewstep.models.registry import base_name, registered


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Case, Path]:
    folder = tmp_path_factory.mktemp(request.param.name)
    request.param.write(folder)
    return request.param, folder


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_teacher_samples_as_its_own_pipeline(case: tuple[Case, Path], size: tuple[int, int]) -> None:
    found, folder = case
    for guidance_scale in found.guidance_scales:
        difference = compared(found, folder, size, guidance_scale)
        assert difference.latents < 1e-3
        assert difference.levels <= 1


def test_every_family_of_texts_is_compared() -> None:
    # Other tests register families of their own.
    built_in = {
        name
        for name, family in registered().items()
        if isinstance(family, DiffusersFamily) and type(family).__module__.startswith("fewstep.models.")
    }
    assert {base_name(case.family) for case in CASES} == built_in
