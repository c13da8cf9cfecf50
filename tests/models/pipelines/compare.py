"""What fewstep's teachers and diffusers' pipelines make of the same noise and prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewstep.encoders import load_autoencoder, load_encoder
from fewstep.flow import Renorm, euler
from fewstep.models.conditioning import Conditioning
from fewstep.models.guided_teacher import GuidedTeacher
from fewstep.models.heads import DXConfig
from fewstep.models.network import PolicyNetwork
from fewstep.models.own_schedule import OwnSchedule
from fewstep.models.teacher import open_teacher, own_scheduler
from fewstep.plan.parts import usual_parts

SIZES = [(8, 12), (16, 8)]
"""(height, width) of latents."""

PROMPTS = ["red heart", "a very long caption of a flag with stripes"]
"""Two captions of different lengths, in one batch."""

STEPS = 4


@dataclass(frozen=True)
class Case:
    """One of the tiny pipelines."""

    name: str
    """Of its module in this package."""
    family: str
    """Of its network."""
    renorm: Renorm = "none"
    """How its pipeline scales the guided velocity."""
    embedded_guidance_scale: float | None = None
    """Of a guidance-distilled network."""
    guidance_scales: tuple[float, ...] = (1.0, 3.5)
    """What its pipeline can do with a second pass; the usual scales, of which 1 is none."""

    @property
    def _module(self) -> Any:
        return import_module(f"pipelines.{self.name}")

    @property
    def write(self) -> Callable[[Path], None]:
        """Writes the pipeline to a folder."""
        return self._module.write

    @property
    def sample(self) -> Callable[..., Tensor]:
        """Runs diffusers' own pipeline in a folder that `write` wrote.

        Its arguments are the folder, B captions, noise (B, C, H, W), the number of steps, the guidance scale (1 is no
        guidance), and the caption of the second pass (None is ""); its result is the final latents, (B, C, H, W).
        """
        return self._module.sample


CASES = [
    Case("flux", "flux", embedded_guidance_scale=3.5),
    Case("flux2", "flux2", embedded_guidance_scale=4.0, guidance_scales=(1.0,)),
    Case("flux2_klein", "flux2"),
    Case("krea2", "krea2"),
    Case("longcat_image", "longcat_image", renorm="token_cap"),
    Case("qwen_image", "qwen_image", renorm="token"),
    Case("qwen_image21", "qwen_image21"),
    Case("sd3", "sd3"),
    Case("wan", "wan:2"),
    Case("z_image", "z_image"),
]


@dataclass(frozen=True)
class Difference:
    """Of fewstep's result from the pipeline's."""

    latents: float
    """Largest difference of latents, relative to their largest value."""
    levels: int
    """Largest difference of decoded pixels, in 8-bit levels."""


def compared(case: Case, folder: Path, size: tuple[int, int], guidance_scale: float) -> Difference:
    """Sample both ways, and compare.

    Args:
        case, folder: the pipeline, and where it was written.
        size: (height, width) of the latents.
        guidance_scale: the usual one, of which 1 is none.
    """
    network = _network(case, folder)
    noise = torch.randn(len(PROMPTS), network.channels, *size, generator=torch.Generator().manual_seed(1))
    negative = None if guidance_scale == 1 else ""
    theirs = case.sample(folder, PROMPTS, noise, STEPS, guidance_scale, negative)
    ours = _sampled(case, folder, network, noise, PROMPTS, guidance_scale)
    _, autoencoder = usual_parts(case.family, str(folder))
    vae = load_autoencoder(autoencoder)
    pixels = [vae.decode(latents).int() for latents in (ours, theirs)]
    return Difference(
        ((ours - theirs).abs().max() / theirs.abs().max()).item(), int((pixels[0] - pixels[1]).abs().max())
    )


def _network(case: Case, folder: Path) -> PolicyNetwork:
    transformer, family, weights = open_teacher(str(folder), case.family, case.embedded_guidance_scale)
    network = PolicyNetwork(transformer, family, DXConfig(points=1), None)
    if weights is not None:
        network.fill(weights, torch.device("cpu"))
    return network


@torch.no_grad()
def _sampled(
    case: Case,
    folder: Path,
    network: PolicyNetwork,
    noise: Tensor,
    prompts: Sequence[str],
    guidance_scale: float,
) -> Tensor:
    """Latents of fewstep's teacher by Euler steps of its own schedule."""
    encoder = load_encoder(usual_parts(case.family, str(folder))[0], max_tokens=512)
    family, transformer = network.family, network.transformer
    teacher = GuidedTeacher(
        network, encoder.null(), guidance_scale, renorm=case.renorm, patch=family.patch(transformer)
    )
    velocity = partial(teacher.velocity, conditioning=Conditioning.join(encoder.encode(prompts)))
    scheduler = own_scheduler(str(folder))
    assert scheduler is not None
    schedule = OwnSchedule(scheduler, family, family.tokens(transformer, *noise.shape[2:]))
    return euler(velocity, noise, STEPS, schedule)
