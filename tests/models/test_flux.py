"""The FLUX families compute what was recorded of published ones, and what FLUX means."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from fewstep.encoders import load_encoder
from fewstep.errors import UserError
from fewstep.flow import guided_velocity
from fewstep.models.adapters import LoRAConfig, lora_target_modules
from fewstep.models.conditioning import TextConditioning
from fewstep.models.family import Family
from fewstep.models.flux import Flux
from fewstep.models.flux2 import Flux2
from fewstep.models.heads import DXConfig
from fewstep.models.network import PolicyNetwork
from fewstep.models.teacher import load_teacher
from fewstep.student.adapter import CONFIG, WEIGHTS, load_adapter, save_adapter

ADAPTERS = Path(__file__).parents[1] / "conformance" / "adapters"
BASE, ADAPTER = ADAPTERS / "flux_base", ADAPTERS / "flux_gm_adapter"

with np.load(ADAPTERS / "io.npz") as archive:
    IO = {key: torch.from_numpy(archive[key]) for key in archive.files if key.startswith("flux")}

X, T, GUIDANCE = IO["flux/x"], IO["flux/t"], IO["flux/guidance"][0].item()
CONDITIONING = TextConditioning(
    IO["flux/prompt_embeds"], torch.ones(IO["flux/prompt_embeds"].shape[:2], dtype=torch.bool), IO["flux/pooled"]
)  # fmt: skip

SMALL = {
    "patch_size": 1, "in_channels": 12, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16,
    "num_attention_heads": 2, "joint_attention_dim": 24, "guidance_embeds": True,
}  # fmt: skip
FAMILIES = {
    "flux": (Flux(3.5), SMALL | {"pooled_projection_dim": 24, "axes_dims_rope": (4, 6, 6)}),
    "flux2": (Flux2(3.5), SMALL | {"axes_dims_rope": (4, 4, 4, 4)}),
}


@pytest.fixture(scope="module", params=FAMILIES)
def network(request: pytest.FixtureRequest) -> tuple[nn.Module, Family]:
    family, config = FAMILIES[request.param]
    torch.manual_seed(0)
    return family.build(config).eval().requires_grad_(False), family


def texts(*lengths: int) -> list[Tensor]:
    return [torch.randn(length, 24, generator=torch.Generator().manual_seed(length)) for length in lengths]


def latents(batch: int, height: int = 8, width: int = 4) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(0))


def student() -> PolicyNetwork:
    transformer, family, _ = load_teacher(str(BASE), "flux", GUIDANCE)
    return load_adapter(transformer, family, ADAPTER)


def test_a_published_adapter_predicts_what_was_recorded() -> None:
    network = student().eval()
    with torch.no_grad():
        packed = network(X, T, CONDITIONING, student=True)
    predicted = network.head.parameters_of(packed, network._unpack(packed, X))
    assert set(predicted) == {"means", "logweights", "logstds"}
    for name, value in predicted.items():
        torch.testing.assert_close(value, IO[f"flux_gm/{name}"], atol=1e-4, rtol=0)


def test_the_teacher_is_untouched_by_the_student_on_it() -> None:
    transformer, family, _ = load_teacher(str(BASE), "flux", GUIDANCE)
    with torch.no_grad():
        tokens = family.denoise(transformer.eval(), X, T, CONDITIONING)
    alone = family.unpack(tokens, 4, *X.shape[-2:])[:, 0]
    assert torch.equal(student().velocity(X, T, CONDITIONING), alone)


def test_a_round_trip_keeps_every_byte_of_every_tensor(tmp_path: Path) -> None:
    save_adapter(student(), tmp_path)
    before, after = load_file(ADAPTER / WEIGHTS), load_file(tmp_path / WEIGHTS)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype
        assert tensor.numpy().tobytes() == after[name].numpy().tobytes()
    metadata = [safe_open(folder / WEIGHTS, "pt").metadata() for folder in (ADAPTER, tmp_path)]
    assert metadata[0] == metadata[1]
    published, ours = (json.loads((folder / CONFIG).read_text()) for folder in (ADAPTER, tmp_path))
    assert published.items() <= ours.items()


def test_the_papers_layers_are_those_of_the_published_adapter() -> None:
    transformer, family, _ = load_teacher(str(BASE), "flux", GUIDANCE)
    published = {name.split(".lora_")[0] for name in load_file(ADAPTER / WEIGHTS) if ".lora_" in name}
    assert set(lora_target_modules(transformer, family, ("paper",))) == published


def test_a_new_student_starts_as_its_teacher(network) -> None:
    """Also where the output projection has no bias, as in FLUX.2."""
    family, config = FAMILIES[network[1].name]
    grown = PolicyNetwork(family.build(config), family, DXConfig(points=3), LoRAConfig(rank=2)).eval()
    x, t, conditioning = latents(2), torch.tensor([0.9, 0.2]), TextConditioning.collate(texts(3, 5))
    with torch.no_grad():
        packed = grown(x, t, conditioning, student=True)
        output = grown.head.parameters_of(packed, grown._unpack(packed, x))["output"]
        teacher = grown.velocity(x, t, conditioning)
    torch.testing.assert_close(output, teacher[:, None].expand_as(output), atol=1e-5, rtol=0)


def test_padding_does_not_change_a_sample(network) -> None:
    transformer, family = network
    x, t = latents(2), torch.tensor([0.3, 0.8])
    together = family.denoise(transformer, x, t, TextConditioning.collate(texts(5, 9)))
    alone = family.denoise(transformer, x[:1], t[:1], TextConditioning.collate(texts(5)))
    torch.testing.assert_close(together[:1], alone, atol=1e-5, rtol=0)


def test_flux2_packs_and_numbers_tokens_as_its_own_pipeline_does() -> None:
    from diffusers import Flux2Pipeline

    family, config = FAMILIES["flux2"]
    transformer = family.build(config).eval().requires_grad_(False)
    x, t, conditioning = latents(2), torch.tensor([0.3, 0.8]), TextConditioning.collate(texts(5, 5))
    patches = Flux2Pipeline._patchify_latents(x)
    theirs = transformer(
        hidden_states=Flux2Pipeline._pack_latents(patches),
        encoder_hidden_states=conditioning.states,
        timestep=t,
        guidance=torch.full((2,), 3.5),
        img_ids=Flux2Pipeline._prepare_latent_ids(patches),
        txt_ids=Flux2Pipeline._prepare_text_ids(conditioning.states),
        return_dict=False,
    )[0]
    torch.testing.assert_close(family.denoise(transformer, x, t, conditioning), theirs, atol=1e-5, rtol=0)


def test_rows_and_columns_of_the_image_are_told_apart(network) -> None:
    """One patch differs from all others; the answer depends on where it is, along either axis."""
    transformer, family = network
    t, conditioning = torch.tensor([0.5]), TextConditioning.collate(texts(4))
    answers = []
    for row, column in ((0, 0), (2, 0), (0, 2)):
        x = torch.zeros(1, 3, 8, 8)
        x[:, :, row : row + 2, column : column + 2] = 3.0
        tokens = family.unpack(family.denoise(transformer, x, t, conditioning), 3, 8, 8)[0, 0]
        answers.append(tokens[:, row : row + 2, column : column + 2])
    assert all(not torch.allclose(answers[0], other, atol=1e-6) for other in answers[1:])
    assert not torch.allclose(answers[1], answers[2], atol=1e-6)


def test_parameters_named_unused_get_no_gradient_and_all_others_do() -> None:
    for family, config in FAMILIES.values():
        torch.manual_seed(0)
        transformer = family.build(config)
        conditioning = TextConditioning.collate(texts(4))
        family.denoise(transformer, latents(1), torch.tensor([0.5]), conditioning).square().sum().backward()
        without = {n for n, p in transformer.named_parameters() if p.grad is None or not p.grad.any()}
        assert without == set(family.unused_parameters(transformer))


def test_the_embedded_guidance_is_an_input(network) -> None:
    transformer, family = network
    x, t, conditioning = latents(1), torch.tensor([0.5]), TextConditioning.collate(texts(4))
    told = [type(family)(scale).denoise(transformer, x, t, conditioning) for scale in (1.0, 3.5, 3.5)]
    assert torch.equal(told[1], told[2])
    assert not torch.allclose(told[0], told[1], atol=1e-6)


def test_a_text_without_a_pooled_vector_is_summarised_by_its_tokens() -> None:
    family, config = FAMILIES["flux"]
    torch.manual_seed(0)
    transformer = family.build(config).eval().requires_grad_(False)
    x, t, states = latents(2), torch.tensor([0.5, 0.6]), texts(3, 6)
    derived = family.denoise(transformer, x, t, TextConditioning.collate(states))
    given = family.denoise(transformer, x, t, TextConditioning.collate(states, [s.mean(0) for s in states]))
    other = family.denoise(transformer, x, t, TextConditioning.collate(states, texts(24, 24)[0][:2]))
    torch.testing.assert_close(derived, given, atol=1e-5, rtol=0)
    assert not torch.allclose(derived, other, atol=1e-4)


def test_a_pipeline_s_folder_is_its_transformer_s(tmp_path: Path) -> None:
    (tmp_path / "transformer").symlink_to(BASE)
    (transformer, _, reference), (direct, _, known) = (
        load_teacher(str(path), "flux", GUIDANCE) for path in (tmp_path, BASE)
    )
    assert reference.sha256 == known.sha256
    assert torch.equal(transformer.proj_out.weight, direct.proj_out.weight)


def test_a_guidance_scale_is_refused_where_it_is_missing_or_has_no_place() -> None:
    with pytest.raises(UserError, match=r"is guidance-distilled .* name one"):
        load_teacher(str(BASE), "flux")
    with pytest.raises(UserError, match=r"takes no guidance scale .* set teacher\.guidance"):
        load_teacher("emoji", "qwen_image", 3.5)


@torch.no_grad()
def test_the_bundled_network_told_a_scale_moves_as_its_teacher_guided_at_that_scale() -> None:
    encoder = load_encoder("minilm")
    captions = ["red heart, noto style", "owl, fluent style", "pizza, twemoji style"]
    conditions = [encoder.conditioning(texts) for texts in (captions, [""] * 3)]
    x, scales = latents(3, 16, 16), (1.0, 2.0, 4.0)
    imitated, family, _ = load_teacher("emoji", "qwen_image")
    network, flux, _ = load_teacher("emoji-flux", "flux", scales[0])
    for t in (torch.ones(3), torch.full((3,), 0.9)):
        positive, negative = (velocity(imitated, family, x, t, condition) for condition in conditions)
        told = {
            scale: velocity(network, replace(flux, embedded_guidance_scale=scale), x, t, conditions[0])
            for scale in scales
        }
        for scale in scales:
            guided = guided_velocity(positive, negative, scale)
            errors = {other: (told[other] - guided).square().mean().item() for other in scales}
            assert min(errors, key=errors.get) == scale
            assert errors[scale] < 0.08 * guided.square().mean()


def velocity(
    network: nn.Module, family: Family, x: Tensor, t: Tensor, conditioning: TextConditioning
) -> Tensor:
    tokens = family.denoise(network, x, t, conditioning)
    return family.unpack(tokens, x.shape[1], *x.shape[-2:])[:, 0]


def test_pooled_vectors_follow_their_texts() -> None:
    first = TextConditioning.collate(texts(3, 4), [torch.tensor([1.0]), torch.tensor([2.0])])
    null = TextConditioning.collate(texts(2), [torch.tensor([0.0])])
    assert first.where(torch.tensor([False, True]), null).pooled.tolist() == [[0.0], [2.0]]
    assert first.cat(null.expand(2)).pooled.tolist() == [[1.0], [2.0], [0.0], [0.0]]
    assert TextConditioning.join([first[1:], null]).pooled.tolist() == [[2.0], [0.0]]
    assert first.repeat(2)[1:3].pooled.tolist() == [[2.0], [1.0]]
