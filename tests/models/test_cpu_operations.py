"""What transformer blocks compute in faster ways on CPUs equals torch's own results, gradients included."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from diffusers.models.attention import FeedForward
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.nn import functional as F

from fewstep.models import cpu_operations
from fewstep.models.cpu_operations import compute_faster, gelu, linear
from fewstep.models.lora import FoldedLoRALinear


def draw(*shape: int, grad: bool = False) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).requires_grad_(grad)


def results(function: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    """The output, and the gradients of a sum of it whose terms differ."""
    out = function(*inputs)
    wanted = [tensor for tensor in inputs if tensor.requires_grad]
    return [out.detach(), *torch.autograd.grad((out * draw(*out.shape)).sum(), wanted)]


@pytest.fixture
def onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN also on machines where it is not the faster one."""
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(cpu_operations, "onednn_is_faster", lambda: True)


@pytest.mark.usefixtures("onednn")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sizes", [(128, 512), (512, 128), (24, 24)])
def test_linear_layers_and_their_gradients_equal_torchs(sizes: tuple[int, int], bias: bool) -> None:
    x, weight = draw(3, 7, sizes[0], grad=True), draw(sizes[1], sizes[0], grad=True)
    inputs = (x, weight, draw(sizes[1], grad=True)) if bias else (x, weight)
    for ours, theirs in zip(results(linear, *inputs), results(F.linear, *inputs), strict=True):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max()))


@pytest.mark.usefixtures("onednn")
def test_linear_layers_get_only_the_gradients_that_are_asked_for() -> None:
    x, weight, bias = draw(5, 8), draw(6, 8, grad=True), draw(6)
    linear(x, weight, bias).sum().backward()
    assert weight.grad is not None
    assert (x.grad, bias.grad) == (None, None)
    with torch.no_grad():
        assert not linear(x, weight, bias).requires_grad


@pytest.mark.usefixtures("onednn")
def test_linear_layers_take_views_and_no_rows() -> None:
    x, weight = draw(8, 5, 3).transpose(0, 2), draw(6, 8)
    torch.testing.assert_close(linear(x, weight), F.linear(x, weight))
    assert linear(x[:0], weight).shape == (0, 5, 6)


@pytest.mark.usefixtures("onednn")
def test_linear_layers_under_autocast_and_in_other_types_are_torchs_own() -> None:
    x, weight = draw(5, 8), draw(6, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(linear(x, weight), F.linear(x, weight))
    assert torch.equal(linear(x.double(), weight.double()), F.linear(x.double(), weight.double()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gelu_by_sigmoid_is_as_near_the_exact_numbers_as_torchs(dtype: torch.dtype) -> None:
    x = torch.cat([torch.linspace(-30, 30, 4001), torch.tensor([0.0, -0.0, 1e-30, -88.0, 1e4, -1e4])]).to(
        dtype
    )
    exact = F.gelu(x.double(), approximate="tanh")
    assert gelu(x).dtype == dtype
    ours, theirs = ((result - exact).abs().max() for result in (gelu(x), F.gelu(x, approximate="tanh")))
    assert ours <= theirs * 1.5


def test_gelu_has_torchs_gradient() -> None:
    x = draw(9, 33, grad=True)
    assert torch.equal(results(gelu, x)[1], results(lambda x: F.gelu(x, approximate="tanh"), x)[1])


@pytest.mark.usefixtures("onednn")
def test_blocks_compute_the_same_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    for name in ("_product", "_gelu"):
        own = getattr(cpu_operations, name)
        monkeypatch.setattr(
            cpu_operations, name, lambda *args, name=name, own=own: called.append(name) or own(*args)
        )
    exact, tanh = nn.GELU(), nn.GELU(approximate="tanh")
    block = nn.Sequential(
        nn.Linear(8, 32), tanh, nn.Linear(32, 8), exact, FeedForward(8, activation_fn="gelu-approximate")
    )
    x = draw(4, 8)
    expected = block(x)
    compute_faster([block])
    torch.testing.assert_close(block(x), expected)
    assert called == ["_product", "_gelu", "_product", "_product", "_gelu", "_product"]


@pytest.mark.usefixtures("onednn")
@pytest.mark.parametrize("adapted", [True, False])
def test_layers_with_folded_adapters_compute_the_same_faster(adapted: bool) -> None:
    block = nn.Sequential(nn.Linear(8, 8))
    config = LoraConfig(r=4, target_modules=["0"], init_lora_weights=False)
    config._register_custom_module({nn.Linear: FoldedLoRALinear})
    inject_adapter_in_model(config, block)
    block[0]._disable_adapters = not adapted
    x = draw(4, 8)
    trained = [p for p in block.parameters() if p.requires_grad]
    expected = block(x)
    gradients = torch.autograd.grad(expected.square().sum(), trained) if adapted else ()
    compute_faster([block])
    torch.testing.assert_close(block(x), expected)
    again = torch.autograd.grad(block(x).square().sum(), trained) if adapted else ()
    torch.testing.assert_close(again, gradients)
