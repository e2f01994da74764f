"""The Triton kernels of the resblock boundary in the interpreter: against the definition, inside their buffers."""

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import boundary as door
from kernels import reference
from tests.kernels.boundary_cases import assert_boundary, make, run, turned

pytestmark = [pytest.mark.interpreter, pytest.mark.filterwarnings("ignore::RuntimeWarning")]  # numpy's, of Inf
MIXES = [
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float32),
]


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The door takes CPU tensors to Triton, whose backward runs few programs, so each has several rows."""
    monkeypatch.setattr(door, "_is_fused", lambda x: True)
    module = importlib.import_module("kernels.boundary_triton")
    monkeypatch.setattr(module, "N_PROGRAMS", 4)
    return module


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("mix", MIXES, ids=str)
def test_kernels_equal_the_definition_in_every_precision(mix: tuple[torch.dtype, torch.dtype], scaled: bool) -> None:
    assert_boundary(door.boundary, reference.boundary, make((2, 5, 48), *mix, scaled))
    assert_boundary(door.boundary, reference.boundary, make((2, 5, 48), *mix, scaled, has_branch=False))


@pytest.mark.parametrize("shape", [(1, 1000), (3, 33), (7, 257), (5, 2), (9, 31)], ids=str)
def test_any_width_and_any_number_of_rows_will_do(shape: tuple[int, ...]) -> None:
    assert_boundary(door.boundary, reference.boundary, make(shape, torch.float32, torch.float16))


def test_no_rows_give_empty_results_and_zero_gradients() -> None:
    results = run(door.boundary, make((0, 8), torch.float32, torch.float16))
    assert results["h"].shape == results["d_branch"].shape == (0, 8)
    assert results["d_gain"].tolist() == results["d_bias"].tolist() == [0.0] * 8


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_the_filter_drops_what_the_definition_drops(bad: float) -> None:
    case = make((6, 40), torch.float32, torch.float16)
    case.d_h[1, 7] = bad
    case.d_total[4, 3] = bad
    expected, got = run(reference.boundary, case), run(door.boundary, case)
    assert got["d_branch"].isfinite().all() and got["d_branch"][4, 3] == 0
    assert torch.equal(got["d_x"][1], case.d_total[1])
    for name, value in got.items():
        assert torch.equal(value.isfinite(), expected[name].isfinite()), name
    assert not got["d_gain"][7].isfinite() and not got["d_bias"][7].isfinite()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_leaving_alone_filters_then_casts(dtype: torch.dtype) -> None:
    gradient = torch.randn(3, 1500, generator=torch.Generator().manual_seed(0))  # 2 blocks, the second cut
    gradient[0, :4] = torch.tensor([torch.inf, -torch.inf, torch.nan, 1e5])
    outcomes = []
    for leave in (reference.leave, door.leave):
        x, branch = torch.zeros(3, 1500), torch.zeros(3, 1500, dtype=dtype, requires_grad=True)
        leave(x, branch, torch.tensor(2.0)).backward(gradient)
        outcomes.append(branch.grad)
    assert outcomes[0] is not None and torch.equal(outcomes[0], outcomes[1])


def test_the_same_bits_every_time_and_in_every_memory_order() -> None:
    case = make((3, 4, 70), torch.float32, torch.bfloat16)
    first, second, third = run(door.boundary, case), run(door.boundary, case), run(door.boundary, turned(case))
    for name, value in first.items():
        assert torch.equal(value, second[name]) and torch.equal(value, third[name]), name


def test_kernels_touch_their_own_memory_only(kernels: Any, guarded: Callable[[Tensor], Tensor]) -> None:
    """All buffers lie between NaN; outputs start as NaN, so what is left unwritten shows."""
    rows, width, programs = 7, 37, 4
    case = make((rows, width), torch.float32, torch.float16)
    assert case.branch is not None

    def output(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return guarded(torch.full(shape, torch.nan, dtype=dtype))

    gain, bias = guarded(case.gain), guarded(case.bias)
    total, h = output(rows, width), output(rows, width, dtype=torch.float16)
    mean, rstd = output(rows), output(rows)
    kernels.forward_kernel[(rows,)](
        guarded(case.x), guarded(case.branch), gain, bias, total, h, mean, rstd, width, 1e-5, True, 64
    )
    d_x, d_branch = output(rows, width), output(rows, width, dtype=torch.float16)
    d_gain, d_bias = output(programs, width), output(programs, width)
    scales = [guarded(torch.tensor([scale])) for scale in (512.0, 700.0)]
    kernels.backward_kernel[(programs,)](
        guarded(case.d_total), guarded(case.d_h), total, mean, rstd, gain, *scales, d_x, d_branch, d_gain, d_bias,
        rows, width, 2, True, True, True, True, 64,
    )  # fmt: skip
    alone = output(rows, width, dtype=torch.float16)
    kernels.leave_backward_kernel[(2,)](d_x, scales[0], alone, rows * width, 256)
    assert torch.equal(alone, d_branch)
    for tensor in (total, h, mean, rstd, d_x, d_branch, d_gain, d_bias):
        assert tensor.isfinite().all()
