"""What Triton's attention kernels use of an H100, by their machine code: no spills, tensor cores, room for others."""

from typing import Any

import pytest
import torch

from kernels.attention import attention
from kernels.layout import Layout, Pattern, Sparsity

pytest.importorskip("triton", reason="Triton is not installed here")
from kernels import attention_triton
from tests.kernels.machine_code import SHARED_LIMIT, Resources, machine_code

PAPER = Layout(256, 32, 32)  # Ramesh et al. 2021, appendix B.1; heads are 64 wide
ODD = Layout(37, 11, 13)  # every tile that a size can cut is cut
POINTER = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
KERNELS = {"forward": attention_triton._forward, "dq": attention_triton._dq, "dkv": attention_triton._dkv}
# An SM's 65,536 registers hold 4 programs of 128 threads with 128 registers each, or 3 with 168. Measured with
# Triton 3.9: forward 94-114, dq 94-98, dkv 134-150.
REGISTERS = {"forward": 128, "dq": 128, "dkv": 168}


def compiled(kernel: Any, constants: dict[str, Any], d: int, dtype: torch.dtype) -> Resources:
    types = {"scale": "fp32", "LSE": "*fp32", "DELTA": "*fp32", "n_z": "i32", "n_heads": "i32"}
    types |= dict.fromkeys(("QKV", "OUT", "D_OUT", "D_QKV"), POINTER[dtype])
    strides = dict.fromkeys((name for name in kernel.arg_names if "stride" in name), "i32:16")
    return machine_code(kernel, types | strides, constants, **attention_triton.options(d, dtype))


def assert_fits(used: Resources) -> None:
    assert used.spills == 0 and used.stack == 0, used
    assert used.shared <= SHARED_LIMIT, used


@pytest.mark.parametrize("pattern", ["row", "column", "conv"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_paper_size_leaves_room_for_three_or_four_programs_at_once(kernel: str, pattern: Pattern) -> None:
    constants = attention_triton.constants(Sparsity(pattern, PAPER), 64, torch.bfloat16)
    used = compiled(KERNELS[kernel], constants, 64, torch.bfloat16)
    assert_fits(used)
    assert used.registers <= REGISTERS[kernel], used
    assert used.shared <= SHARED_LIMIT // 4, used
    assert used.wgmma > 0 and used.mma == 0, used


@pytest.mark.parametrize(
    ("sparsity", "d", "dtype"),
    [
        (Sparsity("column", ODD), 128, torch.float16),
        (Sparsity("conv", ODD), 80, torch.bfloat16),
        (Sparsity("conv", ODD, half_window=True), 64, torch.float16),
        (Sparsity("dense", PAPER), 64, torch.bfloat16),
        (Sparsity("row", PAPER), 32, torch.bfloat16),
        (Sparsity("column", PAPER), 128, torch.float32),
        (Sparsity("conv", ODD), 64, torch.float32),
    ],
    ids=lambda value: f"{value.pattern}-{value.layout.n_slots}" if isinstance(value, Sparsity) else str(value),
)
@pytest.mark.parametrize("kernel", KERNELS)
def test_other_sizes_fit(kernel: str, sparsity: Sparsity, d: int, dtype: torch.dtype) -> None:
    """16 bits use wgmma alone; fp32 is summed by ordinary multiply-adds, which no count here shows."""
    used = compiled(KERNELS[kernel], attention_triton.constants(sparsity, d, dtype), d, dtype)
    assert_fits(used)
    assert (used.wgmma > 0) == (dtype != torch.float32) and used.mma == 0, used


def test_offsets_of_64_bits_fit() -> None:
    constants = attention_triton.constants(Sparsity("conv", PAPER), 64, torch.bfloat16, wide=True)
    assert_fits(compiled(attention_triton._dkv, constants, 64, torch.bfloat16))


@pytest.mark.parametrize("dtype", POINTER, ids=str)
def test_the_row_sums_of_the_backward_fit(dtype: torch.dtype) -> None:
    constants = {"S": 1280, "D": 128, "FEATURES": 128, "BLOCK": 64, "WIDE": False}
    assert_fits(compiled(attention_triton._delta, constants, 128, dtype))


def test_a_cpu_is_refused() -> None:
    with pytest.raises(ValueError, match="does not run on cpu; attention=auto does"):
        attention(torch.zeros(1, 6, 3, 1, 16), Sparsity("row", Layout(2, 2, 2)), "triton")
