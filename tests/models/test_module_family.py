"""A network of one's own is a teacher: its velocity is its own, and students grow on it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fewstep.errors import UserError
from fewstep.models import ModuleFamily, get_family, register
from fewstep.models.adapters import LoRAConfig
from fewstep.models.conditioning import TextConditioning
from fewstep.models.family_code import MODULES, FamilyCode, code_of, find_code, use_module
from fewstep.models.heads import DXConfig, GMFlowConfig, PolicyConfig
from fewstep.models.network import PolicyNetwork
from fewstep.models.prediction import DiffusionPrediction
from fewstep.models.teacher import load_teacher
from fewstep.models.unet import UNet
from fewstep.student.adapter import load_adapter, save_adapter

EXAMPLE = Path(__file__).parents[2] / "jobs" / "examples" / "own_teacher.py"
TEXT = TextConditioning.collate([torch.randn(3, 384), torch.randn(5, 384)])
X, T = torch.randn(2, 3, 8, 8), torch.tensor([0.4, 0.9])
GM = GMFlowConfig(components=4, logstd_width=16)


class Patches(nn.Module):
    """Tokens of 2×2 patches, each through an MLP; the last layer is linear."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.into, self.time = nn.Linear(12, width), nn.Linear(1, width)
        self.head = nn.Sequential(nn.SiLU(), nn.Linear(width, 12, bias=False))

    def forward(self, x: Tensor, t: Tensor, _: object) -> Tensor:
        tokens = nn.functional.pixel_unshuffle(x, 2).flatten(2).mT
        tokens = self.head(self.into(tokens) + self.time(t[:, None])[:, None])
        return nn.functional.pixel_shuffle(tokens.mT.unflatten(2, (x.shape[2] // 2, -1)), 2)


def example() -> ModuleFamily:
    use_module(EXAMPLE)
    return get_family("conv_flow")


def patches(prediction: DiffusionPrediction | None = None) -> ModuleFamily:
    return ModuleFamily(
        "patches", Patches, "head.1", channels=3, width=0, patch_size=2, prediction=prediction
    )


FAMILIES = {
    "convolution": (example, {"width": 16, "depth": 2}),
    "linear": (patches, {}),
    "noise": (lambda: patches(DiffusionPrediction.from_scheduler({})), {}),
}


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.fixture(params=FAMILIES)
def built(request: pytest.FixtureRequest):
    torch.manual_seed(0)
    make, config = FAMILIES[request.param]
    return (family := make()), family.build(config)


def truth(transformer: nn.Module) -> Tensor:
    """The velocity by the network itself, past everything of ours but the change of variables."""
    network, prediction = transformer.network, transformer.prediction
    with torch.no_grad():
        if prediction is None:
            return network(X, T, TEXT)
        return prediction.velocity(lambda z, timestep: network(z, timestep, TEXT), X, T)


@pytest.mark.parametrize("policy", [GM, DXConfig(points=3)], ids=["gmflow", "dx"])
def test_the_teacher_is_the_network_and_the_student_starts_as_the_teacher(
    built, policy: PolicyConfig
) -> None:
    family, transformer = built
    expected = truth(transformer)
    network = PolicyNetwork(transformer, family, policy, LoRAConfig(rank=2))
    torch.testing.assert_close(network.velocity(X, T, TEXT), expected, atol=1e-5, rtol=1e-4)
    with torch.no_grad():
        started = network.policy(X, T, TEXT).velocity(X, T)
    # Means stand off the teacher's velocity by noise of std 0.05 each, K of them averaged.
    torch.testing.assert_close(started, expected, atol=0.1, rtol=1e-3)


def test_every_trainable_parameter_gets_a_gradient(built) -> None:
    network = PolicyNetwork(built[1], built[0], GM, LoRAConfig(rank=2))
    with torch.no_grad():
        for name, parameter in network.trainable().items():
            if "lora_B" in name or "logweights" in name:
                parameter.normal_(std=0.1)
    policy = network.policy(X, T, TEXT)
    (policy.velocity(0.9 * X, 0.8 * T) - truth(built[1])).square().sum().backward()
    # The log-std's first layer hangs on a last one that starts at zero weights.
    without = {n for n, p in network.trainable().items() if p.grad is None or not p.grad.any()}
    assert all("proj_out_logstds.1" in name for name in without)


def test_an_adapter_survives_its_file(built, tmp_path: Path) -> None:
    family, transformer = built
    network = PolicyNetwork(transformer, family, GM, LoRAConfig(rank=2))
    weights = {name: torch.randn_like(p) * 0.1 for name, p in network.trainable().items()}
    save_adapter(network, tmp_path / "student", weights)
    again = family.build(transformer.config)
    again.network.load_state_dict(
        {
            name.replace(".base_layer", ""): tensor
            for name, tensor in transformer.network.state_dict().items()
            if "lora_" not in name
        }
    )
    loaded = load_adapter(again, family, tmp_path / "student").trainable()
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in weights.items())


def test_a_folder_of_safetensors_is_a_teacher(tmp_path: Path) -> None:
    example()
    network = get_family("conv_flow").build({"width": 16, "depth": 2}).network
    (tmp_path / "config.json").write_text(json.dumps({"width": 16, "depth": 2}))
    save_file(network.state_dict(), tmp_path / "anything.safetensors")
    transformer, _, reference = load_teacher(str(tmp_path), "conv_flow")
    assert torch.equal(truth(transformer), network(X, T, TEXT))
    assert reference.sha256
    (tmp_path / "config.json").write_text(json.dumps({"width": 16, "depth": 3}))
    with pytest.raises(UserError, match=r"holds no conv_flow model.*blocks\.2") as caught:
        load_teacher(str(tmp_path), "conv_flow")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("projection", "patch", "message"),
    [
        ("nothing", 2, "projection 'nothing' is NoneType"),
        ("head.0", 2, "projection 'head.0' is SiLU"),
        ("into", 2, "not the output of 'into' unpacked"),
    ],
)
def test_a_projection_that_is_not_the_last_is_refused(projection: str, patch: int, message: str) -> None:
    family = ModuleFamily("wrong", Patches, projection, channels=3, width=0, patch_size=patch)
    with pytest.raises(UserError, match=message):
        family.denoise(family.build({"width": 12}), X, T, TEXT)


def test_a_file_that_does_not_run_or_registers_nothing_is_refused(tmp_path: Path) -> None:
    for text, message in (("1/0", "ZeroDivisionError"), ("x = 1", "registers no family")):
        (tmp_path / "mine.py").write_text(text)
        with pytest.raises(UserError, match=message):
            use_module(tmp_path / "mine.py")
    with pytest.raises(UserError, match="there is no file"):
        use_module(tmp_path / "other.py")


def test_code_that_came_with_a_student_runs_only_with_consent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = EXAMPLE.read_text().replace("conv_flow", "foreign_flow")
    (folder := tmp_path / "student").mkdir()
    (folder / "family.py").write_text(text)
    code = FamilyCode.read(folder / "family.py")
    with pytest.raises(UserError, match=f"read .*family.py, and if you trust it, set {MODULES}"):
        find_code("foreign_flow", code.sha256, folder)
    assert code_of("foreign_flow") is None
    with pytest.raises(UserError, match="not the file that the student was exported with"):
        find_code("foreign_flow", "0" * 64, folder)
    monkeypatch.setenv(MODULES, str(folder / "family.py"))
    find_code("foreign_flow", code.sha256, folder)
    assert code_of("foreign_flow").sha256 == code.sha256


def test_a_family_that_could_only_fail_later_is_not_registered() -> None:
    class OfBefore(UNet):
        name = "of-before"

        def denoise(self, transformer, x, t, conditioning):
            return x

    with pytest.raises(UserError, match=r"guidance_scale=None since fewstep 0\.2"):
        register(OfBefore())
    for no_family in (UNet, object()):
        with pytest.raises(UserError, match="an instance of a class derived from Family"):
            register(no_family)


def test_texts_with_and_without_pooled_vectors_are_no_batch() -> None:
    states, mask = torch.zeros(1, 2, 3), torch.ones(1, 2, dtype=torch.bool)
    bare, pooled = TextConditioning(states, mask), TextConditioning(states, mask, torch.ones(1, 4))
    for one, other in ((bare, pooled), (pooled, bare)):
        with pytest.raises(ValueError, match="pooled"):
            TextConditioning.join([one, other])
        with pytest.raises(ValueError, match="pooled"):
            one.where(torch.tensor([True]), other)
