"""Teachers and published adapters compute what the reference implementation recorded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fewstep.errors import UserError
from fewstep.models.adapters import LoRAConfig
from fewstep.models.conditioning import TextConditioning
from fewstep.models.heads import DXConfig, GMFlowConfig
from fewstep.models.network import PolicyNetwork
from fewstep.models.registry import get_family
from fewstep.models.teacher import load_teacher
from fewstep.student.adapter import WEIGHTS, check_adapter, load_adapter, save_adapter

ADAPTERS = Path(__file__).parents[1] / "conformance" / "adapters"

with np.load(ADAPTERS / "io.npz") as archive:
    IO = {key: torch.from_numpy(archive[key]) for key in archive.files if key.startswith("qwen")}

CONDITIONING = TextConditioning(IO["qwen/prompt_embeds"], IO["qwen/prompt_mask"].bool())


def teacher():
    transformer, family, _ = load_teacher(str(ADAPTERS / "qwen_base"), "qwen_image")
    return transformer, family


def student_parameters(network: PolicyNetwork) -> dict[str, torch.Tensor]:
    """What the head predicts at the recorded inputs."""
    with torch.no_grad():
        packed = network.eval()(IO["qwen/x"], IO["qwen/t"], CONDITIONING, student=True)
    return network.head.parameters_of(packed, network._unpack(packed, IO["qwen/x"]))


def assert_recorded(ours: torch.Tensor, key: str) -> None:
    torch.testing.assert_close(ours, IO[key], atol=1e-4, rtol=0)


@pytest.mark.parametrize("adapter", ["qwen_gm", "qwen_dx"])
def test_a_published_adapter_predicts_what_was_recorded(adapter: str) -> None:
    network = load_adapter(*teacher(), ADAPTERS / f"{adapter}_adapter")
    for name, value in student_parameters(network).items():
        assert_recorded(value, f"{adapter}/{name}")


@pytest.mark.parametrize("adapter", ["qwen_gm", "qwen_dx"])
def test_the_teacher_is_untouched_by_the_student_on_it(adapter: str) -> None:
    network = load_adapter(*teacher(), ADAPTERS / f"{adapter}_adapter")
    assert_recorded(network.velocity(IO["qwen/x"], IO["qwen/t"], CONDITIONING), "qwen/teacher_velocity")
    student_parameters(network)  # and after the student's turn
    assert_recorded(network.velocity(IO["qwen/x"], IO["qwen/t"], CONDITIONING), "qwen/teacher_velocity")


def test_a_new_student_starts_as_its_teacher() -> None:
    transformer, family = teacher()
    bias = transformer.proj_out.bias.detach().clone()
    network = PolicyNetwork(transformer, family, GMFlowConfig(components=3, logstd_width=32), lora=None)
    # The recorded means stand off the teacher's velocity by their random draw: one per component and channel.
    drawn = (IO["qwen_gm_init/means"] - IO["qwen/teacher_velocity"][:, None])[0, :, :, :1, 0]
    with torch.no_grad():
        network.head.proj_out_means.bias.copy_((bias.view(1, 4, 4) + drawn).flatten())
    for name, value in student_parameters(network).items():
        assert_recorded(value, f"qwen_gm_init/{name}")


def test_the_noise_on_initial_means_is_one_draw_per_component_and_channel() -> None:
    transformer, family = teacher()
    bias = transformer.proj_out.bias.detach().clone()
    network = PolicyNetwork(
        transformer, family, GMFlowConfig(components=64, logstd_width=8), lora=None, seed=3
    )
    noise = (network.head.proj_out_means.bias.detach() - bias.repeat(64)).view(64, 4, 4)
    assert (noise.std(dim=2) < 1e-6).all(), "equal across the patch"
    assert 0.04 < noise[:, :, 0].std() < 0.06
    assert len(noise[:, :, 0].unique()) == 64 * 4


@pytest.mark.parametrize("adapter", ["qwen_gm", "qwen_dx"])
def test_a_round_trip_keeps_every_byte_of_every_tensor(adapter: str, tmp_path: Path) -> None:
    source = ADAPTERS / f"{adapter}_adapter"
    save_adapter(load_adapter(*teacher(), source), tmp_path)
    before, after = load_file(source / WEIGHTS), load_file(tmp_path / WEIGHTS)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype
        assert tensor.numpy().tobytes() == after[name].numpy().tobytes()


@pytest.mark.parametrize(
    ("layers", "misfits"),
    [
        (1, r"num_layers \(2 for 1\), transformer_blocks.1.*lora_A.weight \(not in the base\); "),
    ],
)
def test_an_adapter_for_another_base_is_refused_with_what_does_not_fit(layers: int, misfits: str) -> None:
    family = get_family("qwen_image")
    other = family.build(
        {"patch_size": 2, "in_channels": 16, "out_channels": 4, "num_layers": layers, "attention_head_dim": 16,
         "num_attention_heads": 2, "joint_attention_dim": 16, "axes_dims_rope": [8, 4, 4]}
    )  # fmt: skip
    with pytest.raises(UserError, match=f"not an adapter for this base: {misfits}give the teacher") as caught:
        load_adapter(other, family, ADAPTERS / "qwen_gm_adapter")
    assert str(caught.value).count(" (") <= 5 + 1, "at most five are listed, then they are counted"


def test_a_folder_that_says_nothing_of_a_head_is_no_student(tmp_path: Path) -> None:
    for file in (ADAPTERS / "qwen_gm_adapter").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_text('{"_class_name": "QwenImageTransformer2DModel"}')
    with pytest.raises(
        UserError, match=r"holds no student: .* nothing of a policy head \(n_grid is missing\)"
    ):
        load_adapter(*teacher(), tmp_path)


def test_an_adapter_of_another_head_is_not_gone_on_from() -> None:
    settings = DXConfig(points=5, mode="grid", segment_size=1.0, shift=1.0)
    source = ADAPTERS / "qwen_dx_adapter"
    lora = LoRAConfig(rank=4, targets=tuple(
        name.removesuffix(".lora_A.weight") for name in load_file(source / WEIGHTS) if name.endswith(".lora_A.weight")
    ))  # fmt: skip
    with pytest.raises(
        UserError, match=r"not an adapter for this head: .*shift=3.2.*shift=1.0.*set student.policy"
    ):
        check_adapter(PolicyNetwork(*teacher(), settings, lora), source)


def test_adapters_and_head_train_and_nothing_else() -> None:
    from fewstep.models.adapters import LoRAConfig

    network = PolicyNetwork(*teacher(), GMFlowConfig(components=2, logstd_width=8), LoRAConfig(rank=4))
    names = set(network.trainable())
    assert all("lora_" in name or ".head." in name for name in names)
    blocks = {name.split(".lora_")[0].split("transformer_blocks.")[1] for name in names if "blocks" in name}
    mlps = ("net.0.proj", "net.2")
    paper = {f"{b}.img_mlp.{layer}" for b in (0, 1) for layer in mlps} | {
        f"0.txt_mlp.{layer}" for layer in mlps
    }
    assert blocks == paper, "FFN of all blocks, but not the last one's text stream"
    assert any("timestep_embedder.linear_1.lora_A" in name for name in names)
