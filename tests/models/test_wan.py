"""The Wan family: what only its networks have, frames under each other, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from pipelines import wan
from pipelines.parts import varied

from fewstep.errors import UserError
from fewstep.models.adapters import LoRAConfig, lora_target_modules
from fewstep.models.conditioning import TextConditioning
from fewstep.models.heads import GMFlowConfig
from fewstep.models.network import PolicyNetwork
from fewstep.models.registry import get_family
from fewstep.models.teacher import load_teacher, open_teacher
from fewstep.models.wan import TEXT_TOKENS, Wan
from fewstep.plan.parts import usual_parts

FRAMES = 3
VIDEOS = Wan(FRAMES)
TEXTS = [torch.randn(5, 16, generator=torch.Generator().manual_seed(0)), torch.randn(40, 16)]


@pytest.mark.parametrize("frames", [1, FRAMES])
def test_a_network_that_has_been_called_answers_its_own_pipeline_as_before(frames: int) -> None:
    network, family = varied(WanTransformer3DModel(**wan.CONFIG)), Wan(frames)
    video, t = torch.randn(2, 4, frames, 4, 6), torch.tensor([0.5, 0.1])
    x = torch.cat(video.unbind(2), dim=2)  # (B, C, T·H, W), the frames under each other
    padded = torch.zeros(2, TEXT_TOKENS, 16)
    for row, text in enumerate(TEXTS):
        padded[row, : len(text)] = text
    with torch.no_grad():
        before = network(video, 1000 * t, padded).sample
        tokens = family.denoise(network, x, t, TextConditioning.collate(TEXTS))
        after = network(video, 1000 * t, padded).sample
    ours = family.velocity(tokens, *x.shape[1:])
    torch.testing.assert_close(ours, torch.cat(before.unbind(2), dim=2), atol=1e-5, rtol=0)
    assert torch.equal(before, after)


def test_frames_are_no_rows_of_one_image() -> None:
    network, x, t = varied(WanTransformer3DModel(**wan.CONFIG)), torch.randn(1, 4, 12, 6), torch.tensor([0.5])
    text = TextConditioning.collate(TEXTS[:1])
    with torch.no_grad():
        video, image, pair = (
            Wan(f).velocity(Wan(f).denoise(network, x, t, text), 4, 12, 6) for f in (3, 1, 2)
        )
    assert not torch.allclose(video, image, atol=1e-3)
    assert not torch.allclose(video, pair, atol=1e-3)


def test_feed_forward_layers_and_the_time_embedding_are_adapted() -> None:
    network = VIDEOS.build(wan.CONFIG)
    expected = {f"blocks.{block}.ffn.net.{layer}" for block in (0, 1) for layer in ("0.proj", "2")}
    expected |= {f"condition_embedder.time_embedder.linear_{index}" for index in (1, 2)}
    assert set(lora_target_modules(network, VIDEOS, ("paper",))) == expected


@pytest.mark.parametrize("full", [False, True])
def test_the_head_has_its_own_table_of_scale_and_shift(full: bool) -> None:
    """The network's own follows its last norm, in whose place the head is: in a student it does nothing."""
    network = varied(VIDEOS.build(wan.CONFIG))
    table = network.scale_shift_table.detach().clone()
    lora = None if full else LoRAConfig(rank=2)
    student = PolicyNetwork(network, VIDEOS, GMFlowConfig(components=2, logstd_width=8), lora, full=full)
    own = [
        name for name in student.trainable() if name.endswith("scale_shift_table") and ".blocks." not in name
    ]
    assert own == ["transformer.norm_out.head.norm_out.scale_shift_table"]
    assert torch.equal(student.get_parameter(own[0]), table)
    inputs = torch.randn(1, 4, 12, 6), torch.tensor([0.5]), TextConditioning.collate(TEXTS[:1])
    with torch.no_grad():
        before, teacher = student(*inputs, student=True), student.velocity(*inputs)
        student.get_parameter(own[0]).add_(1)
        assert not torch.allclose(student(*inputs, student=True), before)
        assert torch.equal(student.velocity(*inputs), teacher)
        student.get_parameter(own[0]).sub_(1)
        student.transformer.scale_shift_table.add_(1)
        torch.testing.assert_close(student(*inputs, student=True), before)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"image_dim": 8}, "an image beside the text"),
        ({"added_kv_proj_dim": 24}, "an image beside the text"),
        ({"in_channels": 9}, "an image beside the noise"),
        ({"patch_size": (2, 2, 2)}, r"patches of \(2, 2, 2\) cells"),
    ],
)
def test_networks_that_take_more_than_a_text_are_refused(
    config: dict[str, Any], message: str, tmp_path: Path
) -> None:
    WanTransformer3DModel(**wan.CONFIG | config).save_pretrained(tmp_path)
    for opened in (load_teacher, open_teacher):
        with pytest.raises(UserError, match=message) as caught:
            opened(str(tmp_path), "wan:3")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"boundary_ratio": 0.875}, "second network for small σ"),
        ({"expand_timesteps": True}, "a time of its own"),
    ],
)
def test_pipelines_of_wan_2_2_are_refused(setting: dict[str, Any], message: str, tmp_path: Path) -> None:
    wan.write(tmp_path)
    for place in (tmp_path, tmp_path / "transformer"):
        load_teacher(str(place), "wan:3")
    index = tmp_path / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | setting))
    for opened in (load_teacher, open_teacher):
        for place in (tmp_path, tmp_path / "transformer"):
            with pytest.raises(UserError, match=message) as caught:
                opened(str(place), "wan:3")
            assert "\n" not in str(caught.value)


def test_a_family_s_name_tells_its_frames() -> None:
    assert get_family("wan:21") == Wan(21)
    assert (get_family("wan").frames, get_family("wan:1").name, get_family("wan:21").name) == (
        1,
        "wan",
        "wan:21",
    )
    assert usual_parts("wan:21", "owner/name") == ("wan:owner/name", "owner/name:vae:21")
    assert usual_parts("wan", "owner/name") == ("wan:owner/name", "owner/name:vae")
    for name in ("wan:0", "wan:", "wan:many", "wan:-1"):
        with pytest.raises(UserError, match="no number of latent frames"):
            get_family(name)
    with pytest.raises(UserError, match="'flux' makes images and takes no number of frames"):
        get_family("flux:2")
    with pytest.raises(UserError, match="there is no family 'wann'; did you mean 'wan'"):
        get_family("wann:2")
