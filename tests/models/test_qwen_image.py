"""The Qwen-Image family packs, unpacks and masks as the model means it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fewstep.errors import UserError
from fewstep.models.conditioning import TextConditioning
from fewstep.models.packing import pack, unpack
from fewstep.models.registry import get_family
from fewstep.models.teacher import load_teacher, open_teacher


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))
def test_unpack_inverts_pack(batch: int, channels: int, rows: int, columns: int) -> None:
    x = torch.randn(batch, channels, 2 * rows, 2 * columns)
    assert torch.equal(unpack(pack(x), channels, 2 * rows, 2 * columns)[:, 0], x)


def test_patches_are_channel_major() -> None:
    x = torch.arange(8.0).view(1, 2, 2, 2)
    assert torch.equal(pack(x), torch.arange(8.0).view(1, 1, 8))


@pytest.fixture(scope="module")
def network():
    transformer, family, _ = load_teacher("emoji", "qwen_image")
    return transformer.eval(), family


def test_padding_does_not_change_a_sample(network) -> None:
    transformer, family = network
    states = [torch.randn(5, 384), torch.randn(9, 384)]
    x, t = torch.randn(2, 3, 16, 16), torch.tensor([0.3, 0.8])
    with torch.no_grad():
        together = family.denoise(transformer, x, t, TextConditioning.collate(states))
        alone = family.denoise(transformer, x[:1], t[:1], TextConditioning.collate(states[:1]))
    torch.testing.assert_close(together[:1], alone, atol=1e-5, rtol=0)


def test_parameters_named_unused_get_no_gradient_and_all_others_do(network) -> None:
    transformer, family = network
    transformer.requires_grad_(True)
    x, condition = torch.randn(1, 3, 16, 16), TextConditioning.collate([torch.randn(4, 384)])
    family.denoise(transformer, x, torch.tensor([0.5]), condition).square().sum().backward()
    without = {n for n, p in transformer.named_parameters() if p.grad is None or not p.grad.any()}
    transformer.requires_grad_(False)
    assert without == set(family.unused_parameters(transformer))


def test_conditions_are_chosen_per_sample() -> None:
    given_, null = (
        TextConditioning.collate([torch.ones(3, 2), torch.ones(4, 2)]),
        TextConditioning.collate([torch.zeros(2, 2)]),
    )
    mixed = given_.where(torch.tensor([True, False]), null)
    assert mixed.mask.sum(1).tolist() == [3, 2]
    assert mixed.states[1].abs().sum() == 0


def test_an_unknown_family_names_the_nearest() -> None:
    with pytest.raises(UserError, match="qwen_image"):
        get_family("qwen-image")


@pytest.mark.parametrize("path", ["./nowhere", "no/such/folder/here"])
def test_a_missing_teacher_is_refused(path: str) -> None:
    with pytest.raises(UserError, match="there is no folder"):
        load_teacher(path, "qwen_image")


def test_a_folder_without_a_model_is_refused(tmp_path) -> None:
    with pytest.raises(UserError, match="holds no qwen_image model"):
        load_teacher(str(tmp_path), "qwen_image")


SMALL = {
    "num_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 24,
    "axes_dims_rope": (4, 6, 6),
    "in_channels": 16,
    "out_channels": 4,
}


def test_edit_networks_generate_without_further_images() -> None:
    family = get_family("qwen_image")
    torch.manual_seed(0)
    plain, edits = family.build(SMALL), family.build(SMALL | {"zero_cond_t": True})
    edits.load_state_dict(plain.state_dict())
    condition = TextConditioning.collate([torch.randn(5, 24), torch.randn(7, 24)])
    inputs = torch.randn(2, 4, 4, 6), torch.tensor([0.3, 0.8]), condition
    with torch.no_grad():
        torch.testing.assert_close(family.denoise(edits, *inputs), family.denoise(plain, *inputs))


def test_networks_with_a_further_condition_are_refused(tmp_path: Path) -> None:
    family = get_family("qwen_image")
    network = family.network_class(**SMALL, use_additional_t_cond=True)
    network.save_pretrained(tmp_path)
    for load in (load_teacher, open_teacher):
        with pytest.raises(UserError, match="takes an additional condition on the time"):
            load(str(tmp_path), "qwen_image")
