"""The Stable Diffusion 3 family: what its own pipeline computes, and what only its networks have."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import SD3Transformer2DModel
from pipelines import sd3
from pipelines.parts import Calls, check_steps, varied
from safetensors.torch import load_file, save_file
from torch import Tensor

from fewstep.errors import UserError
from fewstep.flow import SamplerConfig, TeacherSamplerConfig
from fewstep.models.adapters import LoRAConfig, lora_target_modules
from fewstep.models.conditioning import TextConditioning
from fewstep.models.heads import GMFlowConfig
from fewstep.models.network import PolicyNetwork
from fewstep.models.sd3 import SD3
from fewstep.models.teacher import TeacherCard, load_teacher, open_teacher, save_teacher
from fewstep.student import FewStepPipeline, StudentCard, save_student

FAMILY = SD3()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sd3.write(folder := tmp_path_factory.mktemp("sd3"))
    return folder


@pytest.mark.parametrize("size", [(8, 6), (4, 10)])
def test_its_own_pipeline_steps_by_its_velocity(
    folder: Path, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    network, _, _ = load_teacher(str(folder), "sd3")
    noise, times = torch.randn(2, 4, *size, generator=torch.Generator().manual_seed(0)), [1.0]
    calls = Calls(SD3Transformer2DModel, monkeypatch)
    end = sd3.sample(folder, ["a red heart", "an owl, made of gold"], noise, 3, 1.0)
    given = calls.arguments.copy()
    times = [call["timestep"][0].item() / 1000 for call in given] + [0.0]
    velocities: list[Tensor] = []
    for call in given:
        states = call["encoder_hidden_states"]
        assert states.shape == (2, 77 + 256, FAMILY.condition_width(network))
        mask = torch.ones(states.shape[:2], dtype=torch.bool)
        conditioning = TextConditioning(states, mask, call["pooled_projections"])
        with torch.no_grad():
            tokens = FAMILY.denoise(
                network, call["hidden_states"], call["timestep"].float() / 1000, conditioning
            )
        velocities.append(FAMILY.velocity(tokens, 4, *size))
    assert torch.equal(given[0]["hidden_states"], noise)
    assert not torch.allclose(velocities[0][:1], velocities[0][1:])
    check_steps(velocities, [*(call["hidden_states"] for call in given), end], times)


def test_a_network_that_has_been_called_answers_its_own_pipeline_as_before(folder: Path) -> None:
    network, _, _ = load_teacher(str(folder), "sd3")
    x, t = torch.randn(1, 4, 8, 6), torch.tensor([0.5])
    conditioning = TextConditioning(
        torch.randn(1, 5, 28), torch.ones(1, 5, dtype=torch.bool), torch.randn(1, 14)
    )
    with torch.no_grad():
        ours = FAMILY.velocity(FAMILY.denoise(network, x, t, conditioning), 4, 8, 6)
        theirs = network(x, conditioning.states, conditioning.pooled, 1000 * t).sample
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


def test_feed_forward_layers_and_the_time_embedding_are_adapted() -> None:
    network = FAMILY.build(sd3.CONFIG)
    expected = {
        f"transformer_blocks.{block}.{stream}.net.{layer}"
        for block, streams in enumerate([("ff", "ff_context"), ("ff", "ff_context"), ("ff",)])
        for stream in streams
        for layer in ("0.proj", "2")
    }
    expected |= {f"time_text_embed.timestep_embedder.linear_{index}" for index in (1, 2)}
    assert set(lora_target_modules(network, FAMILY, ("paper",))) == expected


@pytest.mark.parametrize(
    "other", [{"num_layers": 1, "dual_attention_layers": ()}, {"qk_norm": None}, {"patch_size": 1}]
)
def test_other_networks_of_the_class_have_no_layer_that_is_not_named(other: dict) -> None:
    """A single block, whose text stream ends at once; SD3 without norms of queries and keys; tokens of one cell."""
    network = varied(FAMILY.build(sd3.CONFIG | other))
    conditioning = TextConditioning(
        torch.randn(2, 5, 28), torch.ones(2, 5, dtype=torch.bool), torch.randn(2, 14)
    )
    x, t = torch.randn(2, 4, 8, 6), torch.tensor([0.9, 0.2])
    tokens = FAMILY.denoise(network, x, t, conditioning)
    theirs = network(x, conditioning.states, conditioning.pooled, 1000 * t).sample
    torch.testing.assert_close(FAMILY.velocity(tokens, 4, 8, 6), theirs, atol=1e-5, rtol=0)
    tokens.square().sum().backward()
    without = {name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()}
    assert without == set(FAMILY.unused_parameters(network))
    PolicyNetwork(network, FAMILY, GMFlowConfig(), LoRAConfig(rank=1))


def test_positions_are_those_of_the_file(folder: Path, tmp_path: Path) -> None:
    """A table of positions is no parameter, and in a model that was trained on it is not the constructor's."""
    network = FAMILY.build(sd3.CONFIG)
    network.save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    table = torch.randn(state["pos_embed.pos_embed"].shape)
    assert not torch.allclose(table, network.pos_embed.pos_embed)
    save_file(state | {"pos_embed.pos_embed": table}, file, metadata={"format": "pt"})
    for opened in (load_teacher, open_teacher):
        assert torch.equal(opened(str(tmp_path), "sd3")[0].pos_embed.pos_embed, table)


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> FewStepPipeline:
    """A student of pixels and of the bundled text encoder, whose vector of a caption is the mean of its tokens."""
    folder = tmp_path_factory.mktemp("student")
    torch.manual_seed(0)
    own = {"in_channels": 3, "out_channels": 3, "joint_attention_dim": 384, "pooled_projection_dim": 384}
    varied(FAMILY.build(sd3.CONFIG | own)).save_pretrained(folder / "teacher")
    transformer, family, reference = load_teacher(str(folder / "teacher"), "sd3")
    network = PolicyNetwork(transformer, family, GMFlowConfig(components=2, logstd_width=8), None)
    card = StudentCard(
        teacher=reference,
        text_encoder="minilm",
        autoencoder="pixel",
        latent_shape=(3, 8, 8),
        sampler=SamplerConfig(nfe=2),
        teacher_sampler=TeacherSamplerConfig(guidance_scale=3.0),
    )
    save_student(network, card, folder / "student")
    return FewStepPipeline.from_pretrained(folder / "student")


@pytest.mark.parametrize(
    ("height", "width", "message"),
    [
        (9, 8, "both sides must be multiples of 2"),  # diffusers would leave the last row out
        (8, 26, "positions for sides of at most 24"),
        (26, None, "positions for sides of at most 24"),
    ],
)
def test_an_image_without_positions_is_refused_in_one_sentence(
    pipe: FewStepPipeline, height: int, width: int | None, message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        pipe("red heart", height=height, width=width)
    assert "\n" not in str(caught.value)
    assert pipe("red heart", height=24, width=10, output_type="latent").images.shape == (1, 3, 24, 10)


def test_a_trained_teacher_keeps_its_table_of_positions(tmp_path: Path) -> None:
    transformer = FAMILY.build(sd3.CONFIG)
    with torch.no_grad():
        transformer.pos_embed.pos_embed.add_(0.1)  # as of another size
    card = TeacherCard("sd3", "minilm", "pixel", (4, 8, 8), 1.0, 1.0)
    save_teacher(transformer, card, tmp_path / "teacher", dict(transformer.named_parameters()))
    loaded, _, _ = load_teacher(str(tmp_path / "teacher"), "sd3")
    opened, _, _ = open_teacher(str(tmp_path / "teacher"), "sd3")
    for network in (loaded, opened):
        assert torch.equal(network.pos_embed.pos_embed, transformer.pos_embed.pos_embed)
