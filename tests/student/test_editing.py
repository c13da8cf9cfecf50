"""Students that take reference images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fewstep.errors import UserError
from fewstep.flow import gaussian_noise
from fewstep.images import Size, fit
from fewstep.student import FewStepPipeline
from tiny import write_editor


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    write_editor(folder := tmp_path_factory.mktemp("editor"))
    return folder


@pytest.fixture(scope="module")
def pipe(folder: Path) -> FewStepPipeline:
    return FewStepPipeline.from_pretrained(folder)


def picture(seed: int, height: int = 16, width: int = 16) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def latents(pipe: FewStepPipeline, *prompts: str, **options: object) -> torch.Tensor:
    return pipe(list(prompts), output_type="latent", **options).images


def test_the_result_depends_on_the_reference_and_on_nothing_else_in_the_batch(pipe: FewStepPipeline) -> None:
    one = latents(pipe, "in noto style", image=picture(0))
    assert torch.equal(latents(pipe, "in noto style", image=[np.asarray(picture(0))]), one)
    assert (latents(pipe, "in noto style", image=picture(1)) - one).abs().max() > 1e-2
    batch = latents(pipe, "in noto style", "in a very different style", image=picture(0))
    torch.testing.assert_close(batch[:1], one, atol=1e-4, rtol=0)


def test_the_network_sees_the_image_at_the_size_of_the_result(pipe: FewStepPipeline) -> None:
    large = picture(0, 40, 60)
    [latent] = pipe.encode_images(pipe.fitted([large], (3, 16, 24)))
    expected = torch.tensor(fit(large, Size(24, 16))).movedim(-1, 0) / 127.5 - 1
    torch.testing.assert_close(latent, expected)
    # About the trained number of pixels at the image's aspect ratio, unless a size is asked for
    assert latents(pipe, "in noto style", image=large).shape == (1, 3, 12, 18)
    assert latents(pipe, "in noto style", image=picture(0, 4, 4)).shape == (1, 3, 16, 16)
    assert latents(pipe, "in noto style", image=large, height=16, width=32).shape == (1, 3, 16, 32)


def test_the_teacher_is_guided_by_the_text_and_keeps_the_reference(pipe: FewStepPipeline) -> None:
    noise = gaussian_noise((1, 3, 16, 16), torch.Generator().manual_seed(0))
    text = pipe.encode(["in noto style"])
    made = []
    for seed in (0, 1):
        references = pipe.encode_images(pipe.fitted([picture(seed)], (3, 16, 16)))
        made.append(pipe.sample_teacher(noise, pipe.beside(text, references), 4))
    assert (made[0] - made[1]).abs().max() > 1e-2


def test_wrong_numbers_of_references_are_refused(pipe: FewStepPipeline) -> None:
    for image in (None, [picture(0), picture(1)]):
        with pytest.raises(UserError, match="edits 1 reference images at once, not"):
            pipe("in noto style", image=image)
    with pytest.raises(UserError, match="PIL images or arrays"):
        pipe("in noto style", image="owl.png")
    plain = FewStepPipeline.from_pretrained("emoji-student")
    with pytest.raises(UserError, match="takes no reference images: leave it out"):
        plain("red heart, noto style", image=picture(0))


def test_diffusers_edits_as_the_student(pipe: FewStepPipeline, tmp_path: Path) -> None:
    from diffusers import DiffusionPipeline

    from fewstep.student.diffusers import save_diffusers

    save_diffusers(pipe, tmp_path / "editor", merged=True)
    exported = DiffusionPipeline.from_pretrained(tmp_path / "editor", trust_remote_code=True)
    options = {"image": picture(0), "generator": torch.Generator().manual_seed(0), "output_type": "latent"}
    drawn = exported("in noto style", **options).images
    expected = latents(pipe, "in noto style", image=picture(0), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(drawn, expected, atol=1e-4, rtol=0)
