"""What the kernels of the boundary and of relaxed codes use of an H100, compiled without one.

Sizes are the paper's: M=3968 and a codebook of 8192. Limits are what was measured with triton 3.9 plus a
tenth; a kernel that needs more keeps fewer rows in flight. A backward at 128 registers is at its limit.
"""

from typing import Any

import pytest

from kernels import boundary_triton, relaxed_codes_triton
from tests.kernels.machine_code import SHARED_LIMIT, Resources, machine_code

FLOAT = "*fp32"


def assert_lean(resources: Resources, registers: int, shared: int) -> None:
    assert resources.spills == 0 and resources.stack == 0
    assert resources.registers <= registers
    assert resources.shared <= shared < SHARED_LIMIT


def pointers(names: str, dtype: str = FLOAT) -> dict[str, str]:
    return dict.fromkeys(names.split(), dtype)


@pytest.mark.parametrize("half", ["*bf16", "*fp16"])
@pytest.mark.parametrize("width", [3968, 8192])
def test_the_boundary_forward_fits(width: int, half: str) -> None:
    block, warps = boundary_triton.block_and_warps(width)
    types = pointers("X GAIN BIAS TOTAL MEAN RSTD") | pointers("BRANCH H", half) | {"M": "i32:16"}
    constants: dict[str, Any] = {"EPS": 1e-5, "HAS_BRANCH": True, "BLOCK": block}
    used = machine_code(boundary_triton.forward_kernel, types, constants, num_warps=warps)
    assert_lean(used, registers=48, shared=2 * block)


@pytest.mark.parametrize("half", ["*bf16", "*fp16"])
@pytest.mark.parametrize("width", [512, 3968, 8192])
def test_the_boundary_backward_fits(width: int, half: str) -> None:
    block, warps = boundary_triton.block_and_warps(width)
    floats = "D_TOTAL TOTAL MEAN RSTD GAIN LEAVE_SCALE ENTER_SCALE D_X D_GAIN D_BIAS"
    types = pointers(floats) | pointers("D_H D_BRANCH", half)
    types |= {"ROWS": "i32", "M": "i32:16", "ROWS_PER_PROGRAM": "i32"}
    switches = dict.fromkeys(("HAS_TOTAL", "HAS_BRANCH", "LEAVES_SCALED", "ENTERS_SCALED"), True)
    limit = boundary_triton.REGISTERS
    constants = switches | {"BLOCK": block}
    used = machine_code(boundary_triton.backward_kernel, types, constants, num_warps=warps, maxnreg=limit)
    assert_lean(used, registers=limit, shared=4 * block)


def test_leaving_alone_fits() -> None:
    types = pointers("D_TOTAL SCALE") | {"D_BRANCH": "*bf16", "N": "i32:16"}
    used = machine_code(boundary_triton.leave_backward_kernel, types, {"BLOCK": 4096}, num_warps=8)
    assert_lean(used, registers=29, shared=0)


@pytest.mark.parametrize(("codebook", "registers"), [(1000, 80), (8192, 72)])
def test_relaxed_codes_fit(codebook: int, registers: int) -> None:
    block, warps = relaxed_codes_triton.block_and_warps(codebook)
    numbers = {"K": "i32" if codebook % 16 else "i32:16", "LOG_K": "fp32", "COLDNESS": "fp32"}
    forward = pointers("LOGITS UNIFORM WEIGHTS KL LSE MEAN") | numbers
    used = machine_code(relaxed_codes_triton.forward_kernel, forward, {"BLOCK": block}, num_warps=warps)
    assert_lean(used, registers, shared=64)
    backward = pointers("D_WEIGHTS WEIGHTS LOGITS D_KL LSE MEAN D_LOGITS") | numbers
    used = machine_code(relaxed_codes_triton.backward_kernel, backward, {"BLOCK": block}, num_warps=warps)
    assert_lean(used, registers, shared=64)
