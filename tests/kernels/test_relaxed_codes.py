"""The door to relaxed codes on a CPU: against the definition, whatever the shape and memory order."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, library
from torch.utils.checkpoint import checkpoint

from kernels import reference
from kernels import relaxed_codes as door
from tests.kernels.relaxed_codes_cases import Case, assert_relaxed_codes, make, run

LARGE = (2, 3, 3, 8192)  # 18 rows of the paper's codebook


@pytest.mark.parametrize("temperature", [1.0, 0.0625])
@pytest.mark.parametrize("shape", [(2,), (5, 7), (2, 3, 3, 1000), LARGE], ids=str)
def test_the_door_equals_the_definition(shape: tuple[int, ...], temperature: float) -> None:
    assert_relaxed_codes(make(shape, torch.float32, temperature))


def test_a_single_code_is_certain() -> None:
    results = run(door.relaxed_codes, make((3, 1), torch.float32, 0.5))
    assert results["weights"].eq(1).all() and results["kl"].eq(0).all() and results["d_logits"].eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_other_precisions_of_the_logits(dtype: torch.dtype) -> None:
    assert_relaxed_codes(make((2, 3, 3, 40), dtype, 0.7))


@pytest.mark.parametrize("piece", [1, 40, 100, 161])
def test_pieces_of_any_number_of_rows_give_the_same(piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make((3, 5, 40), torch.float32, 0.5)
    whole = run(door.relaxed_codes, case)
    monkeypatch.setattr(door, "PIECE", piece)
    for name, value in run(door.relaxed_codes, case).items():
        torch.testing.assert_close(value, whole[name], rtol=1e-6, atol=1e-7)


def test_the_gradient_is_the_derivative() -> None:
    random = torch.Generator().manual_seed(3)
    logits = torch.randn(2, 3, 5, generator=random, dtype=torch.float64).requires_grad_()
    uniform = torch.rand(2, 3, 5, generator=random, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: door.relaxed_codes(x, uniform, 0.6), [logits])


@pytest.mark.parametrize("used", ["weights", "kl"])
def test_either_result_may_go_unused(used: str) -> None:
    case = make((4, 9), torch.float64, 0.6)
    gradients = []
    for function in (reference.relaxed_codes, door.relaxed_codes):
        logits = case.logits.clone().requires_grad_()
        weights, kl = function(logits, case.uniform, case.temperature)
        (weights if used == "weights" else kl).backward(case.d_weights if used == "weights" else case.d_kl)
        gradients.append(logits.grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-10, atol=1e-12)


def test_a_codebook_that_stands_in_any_memory_order() -> None:
    case = make((2, 3, 4, 24), torch.float32, 0.5)
    expected = run(door.relaxed_codes, case)

    def turned(tensor: Tensor, layout: Any) -> Tensor:
        return tensor.permute(0, 3, 1, 2).contiguous(memory_format=layout).permute(0, 2, 3, 1)

    for layout in (torch.channels_last, torch.contiguous_format):
        d_kl = case.d_kl.mT.contiguous().mT
        moved = Case(turned(case.logits, layout), case.uniform, turned(case.d_weights, layout), d_kl, 0.5)
        got = run(door.relaxed_codes, moved)
        assert all(torch.equal(value, expected[name]) for name, value in got.items())
        assert got["weights"].permute(0, 3, 1, 2).is_contiguous(memory_format=torch.channels_last)


def test_torch_sees_well_formed_operators() -> None:
    case = make((2, 3, 7), torch.float32, 0.5)
    logits = case.logits.requires_grad_()
    library.opcheck(door._forward, (logits, case.uniform, 0.5))
    weights, _, *kept = door._forward(logits.detach(), case.uniform, 0.5)
    library.opcheck(door._backward, (case.d_weights, case.d_kl, weights, logits.detach(), *kept, 0.5))


@pytest.mark.parametrize("way", ["checkpointed", "compiled"])
def test_checkpointing_and_compiling_give_the_same_bits(way: str) -> None:
    def both(logits: Tensor, uniform: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        return door.relaxed_codes(logits.tanh(), uniform, temperature)

    ways: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
        "checkpointed": lambda *inputs: checkpoint(both, *inputs, use_reentrant=False),
        "compiled": torch.compile(both, backend="aot_eager", fullgraph=True),
    }
    case = make((3, 11), torch.float32, 0.5)
    expected, got = run(both, case), run(ways[way], case)
    assert all(torch.equal(value, expected[name]) for name, value in got.items())


def test_noise_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="uniform"):
        door.relaxed_codes(torch.zeros(2, 4), torch.full((4,), 0.5), 1.0)
