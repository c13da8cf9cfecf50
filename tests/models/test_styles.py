"""A style acts as if its product were added to the weights, on the samples that have it and on no others."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from fewstep.errors import UserError
from fewstep.models.adapters import LoRAConfig
from fewstep.models.conditioning import TextConditioning
from fewstep.models.family import Family, Transformer
from fewstep.models.guided_teacher import GuidedTeacher
from fewstep.models.heads import GMFlowConfig
from fewstep.models.network import PolicyNetwork
from fewstep.models.registry import get_family
from fewstep.models.styles import LowRank, Style, StyledConditioning, read_style
from random_lora import in_style, random_lora, write_lora

WIDTH = 24
CONFIGS = {
    "qwen_image": {
        "num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": WIDTH,
        "axes_dims_rope": (4, 6, 6), "in_channels": 16, "out_channels": 4,
    },
    "qwen_image21": {
        "num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2, "context_in_dim": WIDTH,
        "axes_dims_rope": (4, 6, 6), "in_channels": 8, "out_channels": 8,
    },
}  # fmt: skip
ENDS = {
    "qwen_image": ("attn.to_q", "img_mlp.net.2", "timestep_embedder.linear_1", "norm_out.linear"),
    "qwen_image21": ("attn.to_q", "img_mlp.out", "timestep_embedder.linear_1", "modulation.1"),
}
"""Layers with and without adapters of the student's, for tokens and for the time; and one that heads replace."""


def base(family: str) -> tuple[Transformer, Family]:
    torch.manual_seed(0)
    network = get_family(family).build(CONFIGS[family]).eval()
    with torch.no_grad():
        for parameter in network.parameters():  # some classes begin with zeros
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return network, get_family(family)


def student(family: str, full: bool = False, added: dict[str, Tensor] | None = None) -> PolicyNetwork:
    """A student with adapters at work; `added` is added to the weights of the layers of these names."""
    transformer, known = base(family)
    lora = None if full else LoRAConfig(rank=8)
    network = PolicyNetwork(transformer, known, GMFlowConfig(components=2, logstd_width=8), lora, full=full)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
        for name, product in (added or {}).items():
            for layer in network._layers_of(name):
                layer.weight += product
    network.eval().requires_grad_(False)
    network.keep_folded()
    return network


def inputs(family: str, batch: int) -> tuple[Tensor, Tensor, TextConditioning]:
    generator = torch.Generator().manual_seed(2)
    channels = {"qwen_image": 4, "qwen_image21": 8}[family]
    states = [torch.randn(3 + 2 * row, WIDTH, generator=generator) for row in range(batch)]
    x = torch.randn(batch, channels, 4, 4, generator=generator)
    return x, torch.rand(batch, generator=generator), TextConditioning.collate(states)


def products(lora: dict[str, LowRank], scale: float) -> dict[str, Tensor]:
    return {name: scale * up @ down for name, (down, up) in lora.items()}


@pytest.mark.parametrize("role", ["student", "teacher"])
@pytest.mark.parametrize(
    ("family", "full"), [("qwen_image", False), ("qwen_image", True), ("qwen_image21", False)]
)
@torch.no_grad()
def test_a_style_is_its_product_added_to_the_weights(family: str, full: bool, role: str) -> None:
    network, is_student = student(family, full), role == "student"
    one, two = (random_lora(base(family)[0], ENDS[family], seed, rank=2 + seed) for seed in (1, 2))
    first, second = network.take(Style(one)), network.take(Style(two))
    x, t, plain = inputs(family, 4)
    mixes = ((), ((first, 0.5),), ((second, -1.0),), ((first, 0.3), (second, 0.7)))
    styled = network.prepare(StyledConditioning(plain, mixes), student=is_student)
    output = network(x, t, styled, student=is_student)
    sums = [{}, products(one, 0.5), products(two, -1.0), products(one, 0.3)]
    sums[3] = {name: product + products(two, 0.7)[name] for name, product in sums[3].items()}
    for row, added in enumerate(sums):
        alone = student(family, full, added)
        wanted = alone(x[row : row + 1], t[row : row + 1], plain[row : row + 1], student=is_student)
        torch.testing.assert_close(output[row : row + 1], wanted, atol=2e-5, rtol=1e-4)
    assert (output - network(x, t, plain, student=is_student)).abs().amax((1, 2))[1:].min() > 1e-3


@pytest.mark.parametrize("is_student", [True, False])
@torch.no_grad()
def test_a_sample_does_not_see_the_styles_of_the_others(is_student: bool) -> None:
    network = student("qwen_image")
    before = network(*inputs("qwen_image", 3), student=is_student)
    one, two = (
        network.take(Style(random_lora(base("qwen_image")[0], ENDS["qwen_image"], seed, rank=3 * seed)))
        for seed in (1, 2)
    )
    x, t, plain = inputs("qwen_image", 3)

    def output(*mixes) -> Tensor:
        return network(x, t, StyledConditioning(plain, mixes), student=is_student)

    assert torch.equal(output((), (), ()), before)
    styled = output(((one, 0.8),), (), ((two, 1.0),))
    assert torch.equal(styled[1], before[1]), "to the bit"
    again = output(((one, 0.8),), ((two, 0.1), (one, 2.0)), ())
    assert torch.equal(again[0], styled[0]), "to the bit"
    assert torch.equal(again[2], before[2])


@pytest.mark.parametrize("prepared", [True, False])
@pytest.mark.parametrize("family", sorted(CONFIGS))
@torch.no_grad()
def test_guidance_is_in_the_style_of_each_sample(family: str, prepared: bool) -> None:
    """The interval leaves out one sample, so that the rows of the second pass are others than those of the first."""
    lora = random_lora(base(family)[0], ENDS[family])
    x, _, plain = inputs(family, 3)
    t = torch.tensor([0.9, 0.2, 0.6])
    null = TextConditioning.collate([torch.zeros(2, WIDTH)])

    def guided(network: PolicyNetwork, conditioning, rows: slice) -> Tensor:
        teacher = GuidedTeacher(network, null, 3.0, interval=(0.5, 1.0), frozen=True)
        if prepared:
            conditioning = teacher.prepare(conditioning)
        return teacher.velocity(x[rows], t[rows], conditioning)

    network = student(family)
    style = network.take(Style(lora))
    together = guided(network, StyledConditioning(plain, ((), (), ((style, 1.5),))), slice(0, 3))
    for row, added in enumerate(({}, {}, products(lora, 1.5))):
        alone = guided(student(family, added=added), plain[row : row + 1], slice(row, row + 1))
        torch.testing.assert_close(together[row : row + 1], alone, atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize("style", ["diffusers", "peft", "kohya"])
def test_files_are_read_in_any_style_of_keys(style: str, tmp_path: Path) -> None:
    transformer, family = base("qwen_image")
    lora = random_lora(transformer, ("attn.to_q", "img_mlp.net.2"))
    read = read_style(family, transformer, write_lora(tmp_path / "a.safetensors", lora, style))
    assert read.layers.keys() == lora.keys()
    for name, (down, up) in read.layers.items():
        torch.testing.assert_close(up @ down, lora[name].up @ lora[name].down)
    assert read.nbytes == 4 * sum(part.numel() for low_rank in lora.values() for part in low_rank)


def test_what_is_no_style_for_a_network_is_refused_in_one_sentence(tmp_path: Path) -> None:
    transformer, family = base("qwen_image")
    fine = in_style("diffusers", random_lora(transformer, ("attn.to_q",)))
    layer = "transformer.transformer_blocks.0.attn.to_q"
    unknown = {name.replace("blocks.1", "blocks.7"): tensor for name, tensor in fine.items()}
    cases = {
        "adapts transformer_blocks.7.attn.to_q, which this QwenImage": unknown,
        "can't be loaded into a QwenImage": fine | {f"{layer}.lora_B.weight": torch.zeros(5, 3)},
        "values at transformer_blocks.0.attn.to_q that are not finite": fine
        | {f"{layer}.lora_A.weight": torch.full((3, 32), torch.nan)},
        "adapts no layer of a QwenImage": {"text_encoder.layer.lora_A.weight": torch.zeros(3, 3)},
    }
    for message, state in cases.items():
        save_file(
            {name: tensor.contiguous() for name, tensor in state.items()}, file := tmp_path / "a.safetensors"
        )
        with pytest.raises(UserError, match=message) as caught:
            read_style(family, transformer, str(file))
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="there is no file"):
        read_style(family, transformer, str(tmp_path / "none.safetensors"))
    with pytest.raises(UserError, match="networks of the family 'dit'"):
        read_style(get_family("dit"), transformer, str(file))


def test_a_layer_of_the_tokens_of_all_samples_is_refused(tmp_path: Path) -> None:
    family = get_family("z_image")
    transformer = family.build(
        {"dim": 32, "n_heads": 2, "n_kv_heads": 2, "n_layers": 1, "n_refiner_layers": 1, "cap_feat_dim": WIDTH,
         "axes_dims": [4, 6, 6], "axes_lens": [64, 32, 32], "in_channels": 4}
    )  # fmt: skip
    file = write_lora(tmp_path / "a.safetensors", random_lora(transformer, ("cap_embedder.1",)))
    with pytest.raises(UserError, match=r"cap_embedder\.1, which is no layer that"):
        read_style(family, transformer, file)
