"""The families LongCat-Image and FLUX.2 klein: what students are built of, and which layers they adapt."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.errors import UserError
from fewstep.models.adapters import LoRAConfig, lora_target_modules
from fewstep.models.conditioning import TextConditioning
from fewstep.models.heads import GMFlowConfig
from fewstep.models.longcat_image import LongCatImage
from fewstep.models.network import PolicyNetwork
from fewstep.models.registry import get_family

CASES = {"longcat_image": "longcat_image", "flux2_klein": "flux2"}
"""Module in `pipelines` with a network's settings → family."""

TIMES = torch.tensor([0.9987, 0.7059])
"""In bfloat16, they are 1 and 0.7070."""


class Case:
    """A family, and a tiny network of it."""

    def __init__(self, name: str) -> None:
        self.name, self.config = CASES[name], import_module(f"pipelines.{name}").CONFIG | {"num_layers": 2}
        self.family: Any = get_family(self.name)

    def network(self, **changes: Any) -> Any:
        torch.manual_seed(0)
        return self.family.build(self.config | changes).eval()

    def conditioning(self, *lengths: int) -> TextConditioning:
        width, made = self.config["joint_attention_dim"], torch.Generator()
        return TextConditioning.collate(
            [torch.randn(n, width, generator=made.manual_seed(n)) for n in lengths]
        )

    @property
    def inputs(self) -> tuple[Tensor, Tensor, TextConditioning]:
        x = torch.randn(2, 4, 8, 6, generator=torch.Generator().manual_seed(0))
        return x, TIMES, self.conditioning(5, 9)

    @torch.no_grad()
    def velocity(self, network: nn.Module, *inputs: Any) -> Tensor:
        x, t, conditioning = inputs or self.inputs
        return self.family.velocity(self.family.denoise(network, x, t, conditioning), *x.shape[1:])


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


def test_longcat_is_called_as_its_pipeline_calls_it() -> None:
    """Directly, with its own helpers for positions and packing, in two sizes, one of them wider than high."""
    from diffusers import LongCatImagePipeline
    from diffusers.pipelines.longcat_image.pipeline_longcat_image import prepare_pos_ids

    case = Case("longcat_image")
    network = case.network()
    for height, width in ((8, 6), (4, 12)):
        x = torch.randn(2, 4, height, width)
        image = prepare_pos_ids(1, "image", (512, 512), height=height // 2, width=width // 2)
        whole = case.conditioning(512, 512)
        with torch.no_grad():
            theirs = network(
                hidden_states=LongCatImagePipeline._pack_latents(x, *x.shape),
                encoder_hidden_states=whole.states,
                timestep=TIMES,
                txt_ids=prepare_pos_ids(0, "text", (0, 0), num_token=512),
                img_ids=image,
                return_dict=False,
            )[0]
            ours = case.family.denoise(network, x, TIMES, whole)
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_the_network_says_its_sizes(case: Case) -> None:
    network, family = case.network(), case.family
    assert family.latent_channels(network) == 4
    assert family.condition_width(network) == case.config["joint_attention_dim"]
    assert (family.pooled_width(network), family.takes_guidance(network)) == (None, False)
    assert len(family.blocks(network)) == 3


def test_the_adapted_layers_of_longcat_are_ffns_and_the_time_embedding() -> None:
    network = Case("longcat_image").network()
    dual = [
        f"transformer_blocks.{index}.{ff}.net.{layer}"
        for index in (0, 1)
        for ff in ("ff", "ff_context")
        for layer in ("0.proj", "2")
    ]
    single = [f"single_transformer_blocks.0.{layer}" for layer in ("proj_mlp", "proj_out")]
    time = [f"time_embed.timestep_embedder.linear_{n}" for n in (1, 2)]
    for target in ("paper", "ffn"):  # nothing is shared with attention
        assert set(lora_target_modules(network, LongCatImage(), (target,))) == {*dual, *single, *time}


def test_a_matrix_that_ffn_and_attention_share_can_be_left_out() -> None:
    case = Case("flux2_klein")
    network = case.network(num_single_layers=2)
    paper, ffn = (set(lora_target_modules(network, case.family, (target,))) for target in ("paper", "ffn"))
    assert paper - ffn == {f"single_transformer_blocks.{i}.attn.to_qkv_mlp_proj" for i in (0, 1)}
    assert ffn < paper
    assert all(f"single_transformer_blocks.{i}.attn.to_out" in ffn for i in (0, 1))
    again = lora_target_modules(network, case.family, ("ffn", "to_qkv_mlp_proj"))
    assert set(again) == paper
    assert LoRAConfig().targets == ("paper",)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_positions_stay_exact(case: Case, precision: Any) -> None:
    student = PolicyNetwork(case.network(), case.family, GMFlowConfig(components=2), LoRAConfig(rank=2))
    student.lower(precision)
    tables: list[Any] = []
    student.transformer.pos_embed.register_forward_hook(lambda *given: tables.extend(given[2]))
    student.velocity(*case.inputs)
    student(*case.inputs, student=True)
    assert {table.dtype for table in tables} == {torch.float32}


def test_longer_texts_than_there_is_room_for_are_refused() -> None:
    case = Case("longcat_image")
    x, t = case.inputs[0][:1], TIMES[:1]
    with pytest.raises(UserError, match="up to 512 tokens, and one has 513: prepare"):
        case.velocity(case.network(), x, t, case.conditioning(513))
