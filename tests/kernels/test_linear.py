"""Linear layers through their door equal their definition, whichever library makes the products."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import linear as doors
from tests.kernels.accuracy import LIMIT, assert_accurate, relative_error


@pytest.fixture(params=[True, False], ids=["onednn", "torch"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Both choices, on any processor."""
    if request.param and not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(doors, "_mkl_is_slow", lambda: request.param)
    yield


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def activated(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.linear(x * torch.sigmoid(1.702 * x), weight, bias)


DOORS = [(doors.linear, F.linear), (doors.activated_linear, activated)]


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("door", "definition"), DOORS)
@pytest.mark.parametrize("lead", [(), (1,), (7,), (2, 9)], ids=str)
def test_values_and_gradients_are_those_of_the_definition(door, definition, dtype, lead) -> None:  # noqa: ANN001
    values = [numbers(*lead, 48), numbers(33, 48), numbers(33)]
    ours = [value.to(dtype).requires_grad_() for value in values]
    exact = [value.detach().double().requires_grad_() for value in ours]
    plain = [value.detach().clone().requires_grad_() for value in ours]
    seed = numbers(*lead, 33).to(dtype)
    results = []
    for function, inputs in ((door, ours), (definition, plain), (definition, exact)):
        out = function(*inputs)
        out.backward(seed.to(out.dtype))
        names = ("out", "d_x", "d_weight", "d_bias")
        results.append(dict(zip(names, [out.detach(), *(value.grad for value in inputs)], strict=True)))
    assert_accurate(*results)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize(("door", "definition"), DOORS)
def test_packed_weights_give_the_same_without_a_gradient(door, definition) -> None:  # noqa: ANN001
    x, weight, bias = (value.float() for value in (numbers(5, 48), numbers(33, 48), numbers(33)))
    with torch.no_grad():
        got = door(x, doors.packed(weight), bias)
    assert relative_error(got, definition(x.double(), weight.double(), bias.double())) < LIMIT[torch.float32]
    assert torch.equal(weight, numbers(33, 48).float())


@pytest.mark.usefixtures("library")
def test_an_input_that_needs_no_gradient_gets_none() -> None:
    x, weight, bias = numbers(3, 48).float(), numbers(33, 48).float().requires_grad_(), numbers(33).float()
    doors.linear(x, weight, bias).sum().backward()
    assert x.grad is None and weight.grad is not None


def test_the_activation_is_not_kept_for_the_backward_pass() -> None:
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        doors.activated_linear(*(v.float().requires_grad_() for v in (numbers(9, 48), numbers(33, 48), numbers(33))))
    assert sorted(tuple(tensor.shape) for tensor in kept) == [(9, 48), (33, 48)]


def test_other_makers_processors_keep_torchs_products(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, slow in (("AMD EPYC", True), ("Intel(R) Xeon(R)", False), (None, False)):
        doors._mkl_is_slow.cache_clear()
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda name=name: {"cpu_name": name})
        assert doors._mkl_is_slow() == (slow and torch.backends.mkldnn.is_available())
    doors._mkl_is_slow.cache_clear()


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize(("door", "definition"), DOORS)
def test_float16_activations_meet_float32_weights_in_float16_with_float32_sums(door, definition) -> None:  # noqa: ANN001
    torch.manual_seed(0)
    x = torch.randn(64, 48).half().requires_grad_()
    weight, bias = torch.randn(32, 48, requires_grad=True), torch.randn(32, requires_grad=True)
    d_out = torch.randn(64, 32).half()
    out = door(x, weight, bias)
    got = torch.autograd.grad(out, (x, weight, bias), d_out)
    narrow = [t.detach().half().double().requires_grad_() for t in (x, weight, bias)]
    true = definition(*narrow)
    want = torch.autograd.grad(true, narrow, d_out.double())
    assert out.dtype == torch.float16 and [g.dtype for g in got] == [torch.float16, torch.float32, torch.float32]
    for mine, theirs in zip((out, *got), (true, *want), strict=True):
        assert (mine.double() - theirs).norm() < 1e-3 * theirs.norm()  # half a unit of float16 is 5e-4


def test_a_bias_gradient_beyond_float16_stays_finite_beside_float32_weights() -> None:
    x, weight, bias = torch.ones(4096, 8).half(), torch.randn(8, 8), torch.zeros(8, requires_grad=True)
    (gradient,) = torch.autograd.grad(doors.linear(x, weight, bias), bias, torch.full((4096, 8), 32.0).half())
    assert gradient.tolist() == [4096 * 32.0] * 8  # twice the largest number of float16
