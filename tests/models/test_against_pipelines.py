"""Encoder and family together call a network as diffusers' own pipeline calls it, and take from it what it takes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from fewstep.encoders import load_encoder
from fewstep.encoders.base import ConditionEncoder
from fewstep.models.family import Family
from fewstep.models.packing import unpack
from fewstep.models.teacher import load_teacher
from fewstep.plan.parts import ENCODERS

FAMILIES = {
    "flux": "flux", "flux2": "flux2", "flux2_klein": "flux2", "longcat_image": "longcat_image",
    "qwen_image": "qwen_image",
}  # fmt: skip
"""Module in `pipelines` → family."""

PROMPTS, HEIGHT, WIDTH, STEPS = ["a cat 'ab' on a mat", "a dog"], 8, 6, 3
NOISE = torch.randn(2, 4, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(0))


class Opened:
    """A pipeline's folder, and fewstep's network and encoder of it."""

    def __init__(self, name: str, folder: Path) -> None:
        self.module, self.folder = import_module(f"pipelines.{name}"), folder
        self.module.write(folder)
        family = FAMILIES[name]
        scale = getattr(self.module, "EMBEDDED_GUIDANCE", None)
        self.network: Any
        self.family: Family
        self.network, self.family, _ = load_teacher(str(folder), family, scale)
        self.encoder: ConditionEncoder = load_encoder(f"{ENCODERS[family]}:{folder}", max_tokens=100)

    def sampled(self, **options: Any) -> Tensor:
        return self.module.sample(self.folder, PROMPTS, NOISE, STEPS, options.pop("guidance", 1.0), **options)

    @torch.no_grad()
    def velocity(self, x: Tensor, t: Tensor, conditioning: Any) -> Tensor:
        tokens = self.family.denoise(self.network.eval(), x, t, conditioning)
        return self.family.velocity(tokens, *x.shape[1:])


@pytest.fixture(scope="module", params=FAMILIES)
def pipeline(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Opened:
    return Opened(request.param, tmp_path_factory.mktemp(request.param))


@contextmanager
def calls_of(kind: type[Any]) -> Iterator[list[tuple[dict[str, Any], Tensor]]]:
    """The arguments and the tokens of all calls of a class of networks."""
    calls: list[tuple[dict[str, Any], Tensor]] = []
    forward = kind.forward

    def recorded(self: Any, **named: Any) -> Any:
        result = forward(self, **named)
        calls.append((named, result[0]))
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "forward", recorded)
        yield calls


def test_each_call_of_the_network_is_fewsteps_velocity(pipeline: Opened) -> None:
    """Of two captions of different lengths, on an image that is not square."""
    with calls_of(getattr(diffusers, pipeline.network.__class__.__name__)) as calls:
        latents = pipeline.sampled()
    assert len(calls) == STEPS
    x, conditioning = NOISE, pipeline.encoder.conditioning(PROMPTS)
    times = [call["timestep"] for call, _ in calls] + [torch.zeros(2)]
    for (call, tokens), t, after in zip(calls, times[:-1], times[1:], strict=True):
        theirs = unpack(tokens, 4, HEIGHT, WIDTH)[:, 0]
        torch.testing.assert_close(
            unpack(call["hidden_states"], 4, HEIGHT, WIDTH)[:, 0], x, atol=2e-5, rtol=0
        )
        velocity = pipeline.velocity(x, t, conditioning)
        torch.testing.assert_close(velocity, theirs, atol=1e-5, rtol=1e-5)
        x = x + (after - t)[:, None, None, None] * velocity
    torch.testing.assert_close(latents, x, atol=5e-5, rtol=0)


def test_a_caption_alone_and_an_own_time_give_the_same(pipeline: Opened) -> None:
    t, conditioning = torch.tensor([0.9, 0.4]), pipeline.encoder.conditioning(PROMPTS)
    together = pipeline.velocity(NOISE, t, conditioning)
    for row, prompt in enumerate(PROMPTS):
        own = pipeline.encoder.conditioning([prompt])
        alone = pipeline.velocity(NOISE[row : row + 1], t[row : row + 1], own)
        torch.testing.assert_close(together[row : row + 1], alone, atol=1e-5, rtol=0)
    assert not torch.allclose(together, pipeline.velocity(NOISE, t.flip(0), conditioning), atol=1e-3)


def test_the_second_pass_of_guidance_is_the_null_condition(pipeline: Opened) -> None:
    if pipeline.module.__name__.endswith("flux2"):
        pytest.skip("FLUX.2 dev has none")
    kind = getattr(diffusers, pipeline.network.__class__.__name__)
    with calls_of(kind) as calls:
        pipeline.sampled(guidance=3.0)
    assert len(calls) == 2 * STEPS
    [(first, _), (second, tokens)] = calls[:2]
    assert torch.equal(first["hidden_states"], second["hidden_states"])
    null = pipeline.encoder.null()
    exact = replace(null, states=pipeline.encoder.conditioning([""]).states).expand(2)
    velocity = pipeline.velocity(NOISE, first["timestep"], exact)
    torch.testing.assert_close(velocity, unpack(tokens, 4, HEIGHT, WIDTH)[:, 0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(exact.states[:1], null.states, atol=1e-3, rtol=2**-10)
