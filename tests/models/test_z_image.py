"""The Z-Image family: what its own pipeline computes, and what only its networks have."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import ZImageTransformer2DModel
from pipelines import z_image
from pipelines.parts import Calls, check_steps, varied
from torch import Tensor

from fewstep.models.adapters import LoRAConfig, lora_target_modules
from fewstep.models.conditioning import TextConditioning
from fewstep.models.heads import GMFlowConfig
from fewstep.models.network import PolicyNetwork
from fewstep.models.teacher import load_teacher
from fewstep.models.z_image import ZImage

FAMILY = ZImage()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    z_image.write(folder := tmp_path_factory.mktemp("z_image"))
    return folder


@pytest.mark.parametrize("size", [(8, 6), (4, 10)])
def test_its_own_pipeline_steps_by_its_velocity(
    folder: Path, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Captions on both sides of 32 tokens, up to which they are padded, in one batch."""
    network, _, _ = load_teacher(str(folder), "z_image")
    noise = torch.randn(2, 4, *size, generator=torch.Generator().manual_seed(0))
    calls = Calls(ZImageTransformer2DModel, monkeypatch)
    end = z_image.sample(folder, ["a red heart", "a blue owl, made of gold and silver glass"], noise, 3, 1.0)
    given = calls.arguments.copy()
    states, velocities = [], list[Tensor]()
    for call in given:
        states.append(torch.stack(call["x"])[:, :, 0])
        conditioning = TextConditioning.collate(call["cap_feats"])
        lengths = conditioning.mask.sum(1)
        assert lengths[0] < 32 < lengths[1]
        with torch.no_grad():
            tokens = FAMILY.denoise(network, states[-1], 1 - call["t"], conditioning)
        velocities.append(FAMILY.velocity(tokens, 4, *size))
    assert torch.equal(states[0], noise)
    times = [1 - call["t"][0].item() for call in given] + [0.0]
    assert times[0] == 1
    check_steps(velocities, [*states, end], times)


def test_a_network_that_has_been_called_answers_its_own_pipeline_as_before(folder: Path) -> None:
    network, _, _ = load_teacher(str(folder), "z_image")
    x, t = torch.randn(2, 4, 8, 6), torch.tensor([0.5, 0.1])
    captions = [torch.randn(5, 16), torch.randn(40, 16)]
    with torch.no_grad():
        tokens = FAMILY.denoise(network, x, t, TextConditioning.collate(captions))
        theirs = network(list(x[:, :, None]), 1 - t, captions).sample
    theirs = -torch.stack(theirs)[:, :, 0]
    torch.testing.assert_close(FAMILY.velocity(tokens, 4, 8, 6), theirs, atol=1e-5, rtol=0)


def test_feed_forward_layers_and_the_time_embedding_are_adapted() -> None:
    network = FAMILY.build(z_image.CONFIG)
    expected = {
        f"{block}.0.feed_forward.{layer}"
        for block in ("noise_refiner", "context_refiner", "layers")
        for layer in ("w1", "w2", "w3")
    }
    expected |= {"t_embedder.mlp.0", "t_embedder.mlp.2"}
    assert set(lora_target_modules(network, FAMILY, ("paper",))) == expected


def test_padding_tokens_get_no_gradient_where_nothing_is_padded() -> None:
    """That gradient is 0 and not missing: optimizers and checkpoints have all parameters."""
    network = varied(FAMILY.build(z_image.CONFIG))
    x = torch.randn(1, 4, 16, 8)  # 32 tokens
    FAMILY.denoise(
        network, x, torch.tensor([0.5]), TextConditioning.collate([torch.randn(32, 16)])
    ).sum().backward()
    zero = {name for name, p in network.named_parameters() if p.grad is not None and not p.grad.any()}
    assert zero == {"x_pad_token", "cap_pad_token"}
    assert all(p.grad is not None for p in network.parameters())


def test_the_head_is_told_the_time_in_its_own_width() -> None:
    """The time embedding is never wider than 256, and tokens of real networks are."""
    network = FAMILY.build(z_image.CONFIG)
    assert network.config.dim > 256
    student = PolicyNetwork(network, FAMILY, GMFlowConfig(components=2, logstd_width=8), LoRAConfig(rank=2))
    conditioning = TextConditioning.collate([torch.randn(3, 16)])
    logstds = []
    with torch.no_grad():
        student.head.proj_out_logstds[3].weight.fill_(1.0)
        for time in (0.9, 0.2):
            packed = student(torch.randn(1, 4, 4, 4), torch.tensor([time]), conditioning, student=True)
            logstds.append(packed[0, :, -1])
    assert (logstds[0] == logstds[0][0]).all()
    assert not torch.allclose(*logstds)
