"""A FLUX that starts from a Qwen-Image network computes the same velocity until its own parts have learned."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fewstep.errors import UserError
from fewstep.models.dual_stream import start_from_dual_stream
from fewstep.models.registry import get_family

BATCH, TEXT, SIDE = 3, 5, 6
SIZE = {"in_channels": 12, "attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 24,
        "axes_dims_rope": [4, 6, 6]}  # fmt: skip


def qwen_image() -> nn.Module:
    network = get_family("qwen_image").build(SIZE | {"num_layers": 3, "out_channels": 3})
    for parameter in network.parameters():  # all of it matters, the normalisation's weights included
        nn.init.normal_(parameter, std=0.2)
    return network


def flux(**changes: object) -> nn.Module:
    own = {"num_layers": 3, "num_single_layers": 2, "pooled_projection_dim": 24, "guidance_embeds": True}
    return get_family("flux").build(SIZE | own | changes)


def told_where_qwen_images_text_stands(network: nn.Module, x: Tensor, text: Tensor, t: Tensor) -> Tensor:
    rows = torch.arange(SIDE) - SIDE // 2
    return network(
        hidden_states=x,
        encoder_hidden_states=text,
        pooled_projections=torch.randn(BATCH, 24),
        timestep=t,
        guidance=torch.tensor([1.0, 2.5, 4.0]),
        img_ids=torch.cartesian_prod(torch.zeros(1, dtype=torch.long), rows, rows),
        txt_ids=(SIDE // 2 + torch.arange(TEXT))[:, None].expand(TEXT, 3),
        return_dict=False,
    )[0]


@torch.no_grad()
def test_it_computes_the_same_velocity() -> None:
    torch.manual_seed(0)
    original, started, fresh = qwen_image(), flux(), flux()
    x, t = torch.randn(BATCH, SIDE * SIDE, 12), torch.tensor([0.1, 0.5, 1.0])
    text = nn.functional.normalize(torch.randn(BATCH, TEXT, 24), dim=-1) * 24**0.5 * 0.4  # rms 0.4
    start_from_dual_stream(started, original, text_rms=0.4)
    expected = original(
        hidden_states=x,
        encoder_hidden_states=text,
        encoder_hidden_states_mask=torch.ones(BATCH, TEXT, dtype=torch.bool),
        timestep=t,
        img_shapes=[[(1, SIDE, SIDE)]] * BATCH,
        return_dict=False,
    )[0]
    torch.testing.assert_close(
        told_where_qwen_images_text_stands(started, x, text, t), expected, rtol=1e-4, atol=1e-4
    )
    assert not torch.allclose(told_where_qwen_images_text_stands(fresh, x, text, t), expected, atol=0.1)


def test_every_part_of_it_learns_from_there() -> None:
    torch.manual_seed(0)
    network = flux()
    start_from_dual_stream(network, qwen_image(), text_rms=1.0)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    x, text, t = torch.randn(BATCH, SIDE * SIDE, 12), torch.randn(BATCH, TEXT, 24), torch.rand(BATCH)
    before = {name: parameter.clone() for name, parameter in network.named_parameters()}
    for _ in range(3):  # what stands before a layer of zeros gets its first gradient in the second step
        told_where_qwen_images_text_stands(network, x, text, t).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    still = [name for name, parameter in network.named_parameters() if torch.equal(parameter, before[name])]
    assert not still


@pytest.mark.parametrize("changes", [{"num_layers": 2}, {"num_attention_heads": 4}])
def test_another_size_is_refused(changes: dict[str, int]) -> None:
    with pytest.raises(UserError, match=r"from_teacher: the network has no .* of the teacher's shape"):
        start_from_dual_stream(flux(**changes), qwen_image(), text_rms=1.0)


def test_another_class_is_refused() -> None:
    with pytest.raises(UserError, match="of family flux can start from a teacher of family qwen_image"):
        start_from_dual_stream(qwen_image(), qwen_image(), text_rms=1.0)
