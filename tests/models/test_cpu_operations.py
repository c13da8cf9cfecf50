"""What transformer blocks compute in faster ways on CPUs equals torch's own results, gradients included."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fewstep.models import cpu_operations
from fewstep.models.cpu_operations import compute_faster, gelu, linear


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
    assert gelu(x, approximate="tanh").dtype == dtype
    ours, theirs = ((g(x, approximate="tanh") - exact).abs().max() for g in (gelu, F.gelu))
    assert ours <= theirs * 1.5


def test_gelu_has_torchs_gradient_and_leaves_its_exact_form_alone() -> None:
    x = draw(9, 33, grad=True)
    tanh = [results(lambda one, g=g: g(one, approximate="tanh"), x)[1] for g in (gelu, F.gelu)]
    assert torch.equal(*tanh)
    assert torch.equal(gelu(x), F.gelu(x))


@pytest.mark.usefixtures("onednn")
def test_blocks_compute_the_same_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    ours = cpu_operations.linear
    monkeypatch.setattr(cpu_operations, "linear", lambda *args: called.append(args) or ours(*args))
    block = nn.Sequential(nn.Linear(8, 32), nn.GELU(approximate="tanh"), nn.Linear(32, 8))
    x = draw(4, 8)
    expected = block(x)
    compute_faster([block])
    torch.testing.assert_close(block(x), expected)
    assert len(called) == 2
