"""The Krea 2 family: what its own pipeline computes, and what only its networks have."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import Krea2Pipeline, Krea2Transformer2DModel
from pipelines import krea2
from pipelines.parts import Calls, check_steps, varied
from torch import Tensor

from fewstep.models.adapters import lora_target_modules
from fewstep.models.conditioning import TextConditioning
from fewstep.models.krea2 import Krea2
from fewstep.models.packing import unpack
from fewstep.models.teacher import load_teacher

FAMILY = Krea2()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    krea2.write(folder := tmp_path_factory.mktemp("krea2"))
    return folder


@pytest.mark.parametrize("size", [(8, 6), (4, 10)])
def test_its_own_pipeline_steps_by_its_velocity(
    folder: Path, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of each caption, only the tokens that the pipeline's mask leaves, flattened to one vector each."""
    network, _, _ = load_teacher(str(folder), "krea2")
    noise = torch.randn(2, 4, *size, generator=torch.Generator().manual_seed(0))
    calls = Calls(Krea2Transformer2DModel, monkeypatch)
    end = krea2.sample(folder, ["a red heart", "a blue owl, made of gold"], noise, 3, 1.0)
    given = calls.arguments.copy()
    states, velocities = [], list[Tensor]()
    for call in given:
        states.append(unpack(call["hidden_states"], 4, *size)[:, 0])
        embeds, mask = call["encoder_hidden_states"], call["encoder_attention_mask"]
        assert mask[0].diff().any()
        assert mask[:, -1].all(), "the suffix follows the padding"
        conditioning = TextConditioning.collate(
            [rows[kept].flatten(1) for rows, kept in zip(embeds, mask, strict=True)]
        )
        assert conditioning.states.shape[1] < 50
        with torch.no_grad():
            tokens = FAMILY.denoise(network, states[-1], call["timestep"], conditioning)
        velocities.append(FAMILY.velocity(tokens, 4, *size))
    assert torch.equal(states[0], noise)
    check_steps(velocities, [*states, end], [call["timestep"][0].item() for call in given] + [0.0])


def test_a_token_s_state_is_that_of_each_layer_after_the_other() -> None:
    """As the pipeline's own, of shape (tokens, layers, width), flattened; with a time of each sample."""
    network = varied(FAMILY.build(krea2.CONFIG))
    layers, width = krea2.CONFIG["num_text_layers"], krea2.CONFIG["text_hidden_dim"]
    x, t, embeds = torch.randn(2, 4, 8, 6), torch.tensor([0.9, 0.2]), torch.randn(2, 5, layers, width)
    conditioning = TextConditioning(embeds.flatten(2), torch.ones(2, 5, dtype=torch.bool))
    assert FAMILY.condition_width(network) == layers * width == conditioning.states.shape[-1]
    packed = Krea2Pipeline._pack_latents(type("Patched", (), {"patch_size": 2})(), x, *x.shape)
    positions = Krea2Pipeline.prepare_position_ids(5, 4, 3, torch.device("cpu"))
    with torch.no_grad():
        tokens = FAMILY.denoise(network, x, t, conditioning)
        theirs = network(packed, embeds, t, positions).sample
    torch.testing.assert_close(tokens, theirs, atol=1e-5, rtol=0)


def test_feed_forward_layers_and_the_time_embedding_are_adapted() -> None:
    network = FAMILY.build(krea2.CONFIG)
    blocks = ["transformer_blocks.0", "transformer_blocks.1"]
    blocks += ["text_fusion.layerwise_blocks.0", "text_fusion.refiner_blocks.0"]
    expected = {f"{block}.ff.{layer}" for block in blocks for layer in ("gate", "up", "down")}
    expected |= {"time_embed.linear_1", "time_embed.linear_2"}
    assert set(lora_target_modules(network, FAMILY, ("paper",))) == expected
