"""The door to the resblock boundary on a CPU: against its definition, and against float64 autograd."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, library
from torch.utils.checkpoint import checkpoint

from kernels import boundary as door
from kernels import reference
from tests.kernels.boundary_cases import Case, assert_boundary, make, run, turned

SHAPE = (3, 5, 24)
MIXES = [
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.float64, torch.float64),
]
ONE = torch.ones((), dtype=torch.float64)


def written_out(
    x: Tensor, branch: Tensor | None, gain: Tensor, bias: Tensor, *_: Any, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The boundary without scales, from the formulas."""
    total = x if branch is None else x + branch
    centred = total - total.mean(-1, keepdim=True)
    return total, centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * gain + bias


def infinite(case: Case, name: str, value: float) -> Case:
    """The case with one bad number in row (1, 2) of a gradient."""
    gradient = getattr(case, name).clone()
    gradient[1, 2, 7] = value
    return replace(case, **{name: gradient})


@pytest.mark.parametrize("has_branch", [True, False])
@pytest.mark.parametrize("function", [reference.boundary, door.boundary])
def test_without_scales_it_is_an_add_and_a_layer_norm_with_their_own_gradients(
    function: Callable[..., tuple[Tensor, Tensor]], has_branch: bool
) -> None:
    case = make(SHAPE, torch.float64, torch.float64, scaled=False, has_branch=has_branch)
    expected = run(written_out, case)
    for name, value in run(function, case).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("has_branch", [True, False])
def test_scales_of_one_leave_the_gradients_of_autograd(has_branch: bool) -> None:
    case = make((2, 6), torch.float64, torch.float64, scaled=False, has_branch=has_branch)
    tensors = [t.requires_grad_() for t in (case.x, case.branch, case.gain, case.bias) if t is not None]

    def of_tensors(x: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        branch, gain, bias = rest if has_branch else (None, *rest)
        return door.boundary(x, branch, gain, bias, ONE if has_branch else None, ONE)

    assert torch.autograd.gradcheck(of_tensors, tensors)
    assert torch.autograd.gradcheck(lambda x, y: door.leave(x, y, ONE), [case.x, case.d_h.requires_grad_()])


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("mix", MIXES, ids=str)
def test_the_door_equals_the_definition_in_every_precision(mix: tuple[torch.dtype, torch.dtype], scaled: bool) -> None:
    assert_boundary(door.boundary, reference.boundary, make(SHAPE, *mix, scaled))
    assert_boundary(door.boundary, reference.boundary, make(SHAPE, *mix, scaled, has_branch=False))


@pytest.mark.parametrize("function", [reference.boundary, door.boundary])
def test_each_scale_acts_on_its_own_side(function: Callable[..., tuple[Tensor, Tensor]]) -> None:
    """d_h comes times the scale of the block it enters; the stream's gradient stays in units of the loss."""
    plain = make(SHAPE, torch.float64, torch.float64, scaled=False)
    enter, leave = torch.tensor(700.0, dtype=torch.float64), torch.tensor([3.0], dtype=torch.float64)
    scaled = replace(plain, d_h=plain.d_h * enter, leave_scale=leave, enter_scale=enter)
    expected, got = run(written_out, plain), run(function, scaled)
    factors = {"d_branch": leave, "d_gain": enter, "d_bias": enter}
    for name, value in got.items():
        torch.testing.assert_close(value, expected[name] * factors.get(name, 1), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("function", [reference.boundary, door.boundary])
def test_a_bad_gradient_of_h_ends_at_the_layer_norm_but_shows_in_gain_and_bias(
    function: Callable[..., tuple[Tensor, Tensor]], value: float
) -> None:
    case = make(SHAPE, torch.float32, torch.float16)
    good, got = run(function, case), run(function, infinite(case, "d_h", value))
    row = torch.zeros(SHAPE[:-1], dtype=torch.bool)
    row[1, 2] = True
    assert torch.equal(got["d_x"][row], case.d_total[row]), "the whole row of the layer norm's gradient is dropped"
    assert case.leave_scale is not None
    assert torch.equal(got["d_branch"][row], (case.d_total[row] * case.leave_scale).half())
    assert torch.equal(got["d_x"][~row], good["d_x"][~row]) and torch.equal(
        got["d_branch"][~row], good["d_branch"][~row]
    )
    for name in ("d_gain", "d_bias"):
        assert not got[name][7].isfinite() and torch.equal(got[name][:7], good[name][:7])


@pytest.mark.parametrize("function", [reference.boundary, door.boundary])
def test_a_bad_gradient_of_the_stream_stays_in_the_stream_and_out_of_the_branch(
    function: Callable[..., tuple[Tensor, Tensor]],
) -> None:
    case = make(SHAPE, torch.float32, torch.float16)
    for value in (float("inf"), float("nan")):
        good, got = run(function, case), run(function, infinite(case, "d_total", value))
        assert not got["d_x"][1, 2, 7].isfinite() and got["d_branch"][1, 2, 7] == 0
        good["d_x"][1, 2, 7], good["d_branch"][1, 2, 7] = got["d_x"][1, 2, 7], 0
        for name, gradient in got.items():
            torch.testing.assert_close(gradient, good[name], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("leave", [reference.leave, door.leave])
def test_a_filter_comes_before_the_cast(leave: Callable[..., Tensor]) -> None:
    """What float16 cannot hold must reach the block's parameters as Inf: so its scale is found too large."""
    x, branch = torch.zeros(4), torch.zeros(4, dtype=torch.float16, requires_grad=True)
    leave(x, branch, torch.tensor(2.0)).backward(torch.tensor([1.0, 1e5, float("nan"), 3e38]))
    assert branch.grad is not None and branch.grad.tolist() == [2.0, float("inf"), 0.0, 0.0]


@pytest.mark.parametrize("mix", MIXES, ids=str)
def test_leaving_alone_equals_the_definition(mix: tuple[torch.dtype, torch.dtype]) -> None:
    case = make(SHAPE, *mix)
    results = []
    for leave in (reference.leave, door.leave):
        assert case.branch is not None
        x, branch = case.x.clone().requires_grad_(), case.branch.clone().requires_grad_()
        total = leave(x, branch, case.leave_scale)
        total.backward(case.d_total)
        results.append((total.detach(), x.grad, branch.grad))
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)


def test_memory_order_of_the_inputs_does_not_matter() -> None:
    case = make(SHAPE, torch.float32, torch.float32)
    expected = run(door.boundary, case)
    for name, value in run(door.boundary, turned(case)).items():
        assert torch.equal(value, expected[name]), name


def test_torch_sees_well_formed_operators() -> None:
    case = make(SHAPE, torch.float32, torch.bfloat16)
    learned = [t.requires_grad_() for t in (case.x, case.branch, case.gain, case.bias) if t is not None]
    x, branch, gain, bias = learned
    scales = (case.leave_scale, case.enter_scale)
    library.opcheck(door._forward, (x, branch, gain, bias, *scales, torch.bfloat16))
    other = turned(case)
    library.opcheck(door._forward, (other.x, other.branch, gain, bias, *scales, torch.bfloat16))
    library.opcheck(door._leave, (other.x, other.branch, case.leave_scale))
    library.opcheck(door._forward, (x, None, gain, bias, None, None, torch.float32))
    library.opcheck(door._leave, (x, branch, case.leave_scale))
    kept = [t.detach() for t in (case.d_total, case.d_h, x, torch.zeros(3, 5), torch.ones(3, 5), gain)]
    library.opcheck(door._backward, (*kept, *scales, torch.bfloat16))
    library.opcheck(door._backward, (None, *kept[1:], None, None, None))
    library.opcheck(door._leave_backward, (case.d_total, case.leave_scale, torch.bfloat16))


def two_blocks(x: Tensor, weight: Tensor, gain: Tensor, bias: Tensor) -> Tensor:
    scale, next_scale = torch.tensor(64.0), torch.tensor(48.0)
    x, h = door.boundary(x, None, gain, bias, None, scale, torch.bfloat16)
    x, h = door.boundary(x, F.linear(h, weight), gain, bias, scale, next_scale)
    return door.leave(x, F.linear(h, weight).tanh(), next_scale)


@pytest.mark.parametrize("way", ["checkpointed", "compiled"])
def test_checkpointing_and_compiling_give_the_same_bits(way: str) -> None:
    def results(function: Callable[..., Tensor]) -> list[Tensor]:
        random = torch.Generator().manual_seed(1)
        x, gain, bias = (torch.randn(n, 24, generator=random).squeeze(0).requires_grad_() for n in (5, 1, 1))
        weight = torch.randn(24, 24, generator=random).bfloat16().requires_grad_()
        function(x, weight, gain, bias).square().sum().backward()
        return [tensor.grad for tensor in (x, weight, gain, bias) if tensor.grad is not None]

    ways: dict[str, Callable[..., Tensor]] = {
        "checkpointed": lambda *inputs: checkpoint(two_blocks, *inputs, use_reentrant=False),
        "compiled": torch.compile(two_blocks, backend="aot_eager", fullgraph=True),
    }
    expected, got = results(two_blocks), results(ways[way])
    assert len(got) == 4 and all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))


def test_what_does_not_fit_is_refused() -> None:
    x, gain = torch.zeros(2, 4), torch.ones(4)
    with pytest.raises(ValueError, match="branch is"):
        door.boundary(x, torch.zeros(1, 4), gain, gain)
    with pytest.raises(ValueError, match="branch is"):
        door.leave(x, torch.zeros(2, 1))
    with pytest.raises(ValueError, match="gain is"):
        door.boundary(x, None, torch.ones(2), gain)
    with pytest.raises(ValueError, match="leave_scale is given"):
        door.boundary(x, None, gain, gain, torch.tensor(2.0))
