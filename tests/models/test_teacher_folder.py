"""A base with LoRA files is a teacher, whatever style of keys they have."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fewstep.errors import UserError
from fewstep.models.family import Transformer
from fewstep.models.registry import get_family
from fewstep.models.styles import LowRank
from fewstep.models.teacher import checked_meanwhile, load_teacher, open_teacher, reference_to
from fewstep.models.teacher_folder import LoRAFile, check_loras, teacher_folder
from random_lora import in_style, random_lora

FAMILY = get_family("qwen_image")
CONFIG = {
    "num_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 24,
    "axes_dims_rope": (4, 6, 6),
    "in_channels": 16,
    "out_channels": 4,
}
LAYERS = ("attn.to_q", "img_mlp.net.2")


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("base")
    FAMILY.build(CONFIG).save_pretrained(folder)
    return folder


def matrices(network: Transformer, seed: int = 0) -> dict[str, LowRank]:
    return random_lora(network, LAYERS, seed)


@pytest.mark.parametrize("style", ["diffusers", "peft", "kohya"])
def test_a_lora_is_folded_with_its_scale(style: str, base: Path, tmp_path: Path) -> None:
    plain = FAMILY.load(str(base))
    lora = matrices(plain)
    save_file(in_style(style, lora), file := tmp_path / "style.safetensors")
    folded = FAMILY.load(teacher_folder(str(base), FAMILY, [LoRAFile(path=str(file), scale=0.5)]))
    for name, own in plain.named_parameters():
        layer = name.removesuffix(".weight")
        wanted = own + 0.5 * lora[layer][1] @ lora[layer][0] if layer in lora else own
        torch.testing.assert_close(folded.get_parameter(name), wanted, atol=1e-6, rtol=0)


def test_several_loras_add_up_and_the_folder_is_written_once(base: Path, tmp_path: Path) -> None:
    plain = FAMILY.load(str(base))
    loras = []
    for seed in (1, 2):
        save_file(in_style("diffusers", matrices(plain, seed)), file := tmp_path / f"{seed}.safetensors")
        loras.append(LoRAFile(path=str(file)))
    folder = Path(teacher_folder(str(base), FAMILY, loras))
    folded, layer = FAMILY.load(str(folder)), "transformer_blocks.1.attn.to_q"
    added = sum(up @ down for seed in (1, 2) for down, up in [matrices(plain, seed)[layer]])
    torch.testing.assert_close(
        folded.get_submodule(layer).weight, plain.get_submodule(layer).weight + added, atol=1e-6, rtol=0
    )
    written = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    assert teacher_folder(str(base), FAMILY, loras) == str(folder)
    assert {file: file.stat().st_mtime_ns for file in folder.iterdir()} == written
    assert teacher_folder(str(base), FAMILY, loras[:1]) != str(folder)


def test_a_teacher_is_its_base_and_its_loras(base: Path, tmp_path: Path) -> None:
    save_file(in_style("diffusers", matrices(FAMILY.load(str(base)))), file := tmp_path / "a.safetensors")
    lora = LoRAFile(path=str(file))
    reference = reference_to(str(base), "qwen_image", [lora])
    assert reference.loras == (lora,)
    assert reference.sha256 != reference_to(str(base), "qwen_image").sha256
    assert (
        reference.sha256
        != reference_to(str(base), "qwen_image", [LoRAFile(path=str(file), scale=0.9)]).sha256
    )
    with checked_meanwhile(str(base), reference):
        _, _, folder = open_teacher(str(base), "qwen_image", loras=reference.loras)
    assert folder is not None
    assert folder != base
    save_file(in_style("diffusers", matrices(FAMILY.load(str(base)), seed=5)), file)
    with (
        pytest.raises(UserError, match="this student was distilled from"),
        checked_meanwhile(str(base), reference),
    ):
        pass


def test_weights_keep_their_type(base: Path, tmp_path: Path) -> None:
    plain = FAMILY.load(str(base))
    plain.to(torch.bfloat16).save_pretrained(half := tmp_path / "half")
    lora = matrices(plain)
    save_file(in_style("diffusers", lora), file := tmp_path / "a.safetensors")
    folder = teacher_folder(str(half), FAMILY, [LoRAFile(path=str(file))])
    folded = {k: v for file in Path(folder).glob("*.safetensors") for k, v in load_file(file).items()}
    assert {tensor.dtype for tensor in folded.values()} == {torch.bfloat16}
    layer = next(iter(lora))
    wanted = plain.get_submodule(layer).weight.float() + lora[layer][1] @ lora[layer][0]
    assert torch.equal(folded[f"{layer}.weight"], wanted.bfloat16())


def test_a_lora_of_another_network_is_refused(base: Path, tmp_path: Path) -> None:
    a, b = torch.randn(3, 8), torch.randn(8, 3)
    fine = in_style("diffusers", matrices(FAMILY.load(str(base))))
    cases = {
        "adapts transformer_blocks.7.attn.to_q, which this QwenImage": fine
        | {"transformer.transformer_blocks.7.attn.to_q.lora_A.weight": a}
        | {"transformer.transformer_blocks.7.attn.to_q.lora_B.weight": b},
        "can't be loaded into a QwenImage": {
            "transformer.transformer_blocks.0.attn.to_q.lora_A.weight": a,
            "transformer.transformer_blocks.0.attn.to_q.lora_B.weight": b,
        },
        "adapts no layer of a QwenImage": {
            "text_encoder.layer.lora_A.weight": a,
            "text_encoder.layer.lora_B.weight": b,
        },
    }
    for number, (message, state) in enumerate(cases.items()):
        save_file({k: v.contiguous() for k, v in state.items()}, file := tmp_path / f"{number}.safetensors")
        with pytest.raises(UserError, match=message):
            check_loras(str(base), FAMILY, [LoRAFile(path=str(file))])


def test_a_lora_that_is_not_there_or_can_not_be_read_is_refused(base: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.safetensors").write_bytes(b"no tensors")
    for path, message in (
        (str(tmp_path / "none.safetensors"), "there is no file"),
        (str(tmp_path / "broken.safetensors"), "can't be loaded"),
        (str(base.parent), "has 0 .* files"),
    ):
        with pytest.raises(UserError, match=message):
            check_loras(str(base), FAMILY, [LoRAFile(path=path)])
    with pytest.raises(UserError, match="networks of the family 'dit'"):
        check_loras(str(base), get_family("dit"), [LoRAFile(path="x")])


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_single_file_is_a_teacher(prefix: str, base: Path, tmp_path: Path) -> None:
    plain = FAMILY.load(str(base))
    state = {prefix + name: tensor.contiguous() for name, tensor in plain.state_dict().items()}
    save_file(state, file := tmp_path / "model.safetensors")
    shutil.copy(base / "config.json", tmp_path)
    network, _, folder = open_teacher(str(file), "qwen_image")
    assert folder is not None
    loaded, _, reference = load_teacher(str(file), "qwen_image")
    assert reference.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    for name, parameter in plain.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter)
        assert network.get_parameter(name).shape == parameter.shape
    # With a LoRA on it
    save_file(in_style("diffusers", lora := matrices(plain)), style := tmp_path / "style.safetensors")
    _, _, folder = open_teacher(str(file), "qwen_image", loras=[LoRAFile(path=str(style))])
    name = next(iter(lora))
    wanted = plain.get_submodule(name).weight + lora[name][1] @ lora[name][0]
    torch.testing.assert_close(FAMILY.load(str(folder)).get_submodule(name).weight, wanted, atol=1e-6, rtol=0)


def test_a_single_file_of_another_network_is_refused(base: Path, tmp_path: Path) -> None:
    shutil.copy(base / "config.json", tmp_path)
    save_file({"other.weight": torch.ones(2, 2)}, file := tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"can't read .* as a QwenImageTransformer2DModel"):
        open_teacher(str(file), "qwen_image")
    with pytest.raises(UserError, match="reads no single files of the family 'dit'"):
        open_teacher(str(file), "dit")
