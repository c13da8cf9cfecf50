"""Reference images: conformance with diffusers' editing pipelines on tiny random networks, and guidance beside them."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    QwenImageEditPlusPipeline,
    QwenImageTransformer2DModel,
)
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus
from PIL import Image
from pipelines import flux2_klein, qwen_image
from pipelines.parts import CELL, CHANNELS, FLUX_TIMES, flux2_autoencoder, varied
from torch import Tensor

from fewstep.encoders import load_autoencoder
from fewstep.flow import Renorm, euler
from fewstep.models.conditioning import Conditioning, TextConditioning
from fewstep.models.guided_teacher import GuidedTeacher
from fewstep.models.heads import DXConfig
from fewstep.models.network import PolicyNetwork
from fewstep.models.own_schedule import OwnSchedule
from fewstep.models.registry import get_family

STEPS, SCALE = 4, 3.0
SIZE = (8, 12)
"""(height, width) of the latents that are generated."""


def text(width: int, length: int, seed: int) -> TextConditioning:
    states = torch.randn(1, length, width, generator=torch.Generator().manual_seed(seed))
    return TextConditioning(states, torch.ones(1, length, dtype=torch.bool))


def pictures(*sizes: tuple[int, int]) -> list[np.ndarray]:
    """Noise of these (height, width), (H, W, 3) uint8."""
    random = np.random.default_rng(0)
    return [random.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]


@torch.no_grad()
def ours(
    family: str, pipe: Any, folder: Path, images: list[np.ndarray], noise: Tensor, renorm: Renorm = "none"
) -> Tensor:
    """Final latents of fewstep's guided teacher, with the pipeline's network and the images as references."""
    pipe.vae.save_pretrained(folder)
    autoencoder = load_autoencoder(str(folder))
    references = tuple(autoencoder.encode(torch.from_numpy(image[None])) for image in images)
    network = PolicyNetwork(pipe.transformer, get_family(family), DXConfig(points=1), None)
    states = conditions(pipe.transformer.config.joint_attention_dim)
    teacher = GuidedTeacher(network, states[1], SCALE, renorm=renorm, patch=2)
    conditioning = TextConditioning(states[0].states, states[0].mask, references=references)
    tokens = network.family.tokens(network.transformer, *noise.shape[2:])
    schedule = OwnSchedule(dict(pipe.scheduler.config), network.family, tokens)
    return euler(partial(teacher.velocity, conditioning=conditioning), noise, STEPS, schedule)


def conditions(width: int) -> tuple[TextConditioning, TextConditioning]:
    """A text and the null text."""
    return text(width, 7, seed=1), text(width, 3, seed=2)


def noise() -> Tensor:
    return torch.randn(1, CHANNELS, *SIZE, generator=torch.Generator().manual_seed(3))


def options(width: int) -> dict[str, Any]:
    positive, negative = conditions(width)
    return {
        "prompt_embeds": positive.states, "negative_prompt_embeds": negative.states,
        "height": CELL * SIZE[0], "width": CELL * SIZE[1], "num_inference_steps": STEPS, "output_type": "latent",
    }  # fmt: skip


def test_qwen_image_edit_samples_as_its_own_pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The pipeline scales references to such areas, of sides that are multiples of 32.
    for name in ("VAE_IMAGE_SIZE", "CONDITION_IMAGE_SIZE"):
        monkeypatch.setattr(pipeline_qwenimage_edit_plus, name, 32 * 64)
    torch.manual_seed(0)
    vae = AutoencoderKLQwenImage(
        base_dim=4, z_dim=CHANNELS, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[False],
        latents_mean=[0.5, -0.25, 0.1, 0.0], latents_std=[2.0, 1.5, 2.5, 1.0],
    )  # fmt: skip
    network = varied(QwenImageTransformer2DModel(**qwen_image.CONFIG))
    pipe: Any = QwenImageEditPlusPipeline(
        FlowMatchEulerDiscreteScheduler(**qwen_image.TIMES),
        vae.eval(),
        None,
        None,
        None,
        network,  # type: ignore[arg-type]
    )
    pipe.set_progress_bar_config(disable=True)
    images = pictures((32, 32), (32, 64))
    theirs = pipe(
        [Image.fromarray(image) for image in images],
        **options(16),
        prompt_embeds_mask=torch.ones(1, 7),
        negative_prompt_embeds_mask=torch.ones(1, 3),
        true_cfg_scale=SCALE,
        latents=pipe._pack_latents(noise(), *noise().shape),
    ).images
    theirs = pipe._unpack_latents(theirs, CELL * SIZE[0], CELL * SIZE[1], CELL)[:, :, 0]
    found = ours("qwen_image", pipe, tmp_path, images, noise(), renorm="token")
    torch.testing.assert_close(found, theirs, atol=1e-4, rtol=1e-4)


def test_flux2_klein_edits_as_its_own_pipeline(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = varied(Flux2Transformer2DModel(**flux2_klein.CONFIG))
    pipe: Any = Flux2KleinPipeline(
        FlowMatchEulerDiscreteScheduler(**FLUX_TIMES),
        flux2_autoencoder(),
        None,
        None,
        network,  # type: ignore[arg-type]
    )
    pipe.set_progress_bar_config(disable=True)
    images = pictures((64, 64), (64, 96))
    theirs = pipe(
        [Image.fromarray(image) for image in images],
        **options(48),
        guidance_scale=SCALE,
        latents=pipe._patchify_latents(noise()),
    ).images
    # The pipeline gives the autoencoder's own units.
    std = (pipe.vae.bn.running_var + pipe.vae.config.batch_norm_eps).sqrt().view(1, -1, 1, 1)
    normed = (pipe._patchify_latents(theirs) - pipe.vae.bn.running_mean.view(1, -1, 1, 1)) / std
    found = ours("flux2", pipe, tmp_path, images, noise())
    torch.testing.assert_close(found, pipe._unpatchify_latents(normed), atol=1e-4, rtol=1e-4)


def edits(count: int) -> TextConditioning:
    """Texts of different lengths, with two references each."""
    generator = torch.Generator().manual_seed(5)
    states = [torch.randn(3 + index, 16, generator=generator) for index in range(count)]
    references = tuple(torch.randn(count, CHANNELS, 4, 6, generator=generator) for _ in range(2))
    texts = TextConditioning.collate(states)
    return TextConditioning(texts.states, texts.mask, references=references)


@pytest.mark.parametrize("family", ["qwen_image", "flux2"])
def test_an_edit_in_a_batch_is_the_edit_alone(family: str) -> None:
    kinds: dict[str, tuple[Any, dict[str, Any]]] = {
        "qwen_image": (QwenImageTransformer2DModel, qwen_image.CONFIG),
        "flux2": (Flux2Transformer2DModel, flux2_klein.CONFIG | {"joint_attention_dim": 16}),
    }
    kind, config = kinds[family]
    torch.manual_seed(0)
    network = PolicyNetwork(varied(kind(**config)), get_family(family), DXConfig(points=2), None)
    batch = edits(3)
    x, t = torch.randn(3, CHANNELS, 8, 12), torch.full((3,), 0.7)
    with torch.no_grad():
        together = network.policy(x, t, batch).velocity(x, t)
        for row in range(3):
            part = slice(row, row + 1)
            length = batch.lengths[row]
            alone = TextConditioning(
                batch.states[part, :length], batch.mask[part, :length], None, batch[part].references
            )
            found = network.policy(x[part], t[part], alone).velocity(x[part], t[part])
            torch.testing.assert_close(found, together[part], atol=1e-5, rtol=1e-5)


def test_references_follow_their_texts_and_guidance_keeps_them() -> None:
    batch = edits(3)
    again = Conditioning.join([batch[slice(2)], batch[slice(2, 3)]])
    for joined, first in zip(again.references, batch.references, strict=True):
        assert torch.equal(joined, first)
    null = text(16, 2, seed=9)
    negative = batch.unconditional(null, rows=torch.tensor([2, 0]))
    assert torch.equal(negative.states, null.states.expand(2, -1, -1))
    for kept, first in zip(negative.references, batch.references, strict=True):
        assert torch.equal(kept, first[[2, 0]])
    dropped = batch.where(torch.tensor([True, False, True]), null)
    assert dropped.references == batch.references
    with pytest.raises(ValueError, match="shorter"):
        batch.cat(null)  # with references and without
