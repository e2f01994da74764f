"""What the kernels of 16-bit floats and of Adam use of an H100, compiled without one.

Limits are what was measured with triton 3.9 plus a tenth; a kernel that needs more keeps fewer rows in flight.
"""

from typing import Any

import pytest

from kernels import low_bit_triton
from tests.kernels.machine_code import SHARED_LIMIT, Resources, machine_code

SCALARS = dict.fromkeys(["FACTOR", "BETA1", "REST1", "BETA2", "REST2", "DECAY", "STEP_SIZE", "EPS", "CLIP"], "fp32")
KINDS = {"*fp32": (0, 0), "*bf16": (0, 0), "*i16": (1, 2)}


def assert_lean(resources: Resources, registers: int, shared: int) -> None:
    assert resources.spills == 0 and resources.stack == 0
    assert resources.registers <= registers
    assert resources.shared <= shared < SHARED_LIMIT


@pytest.mark.parametrize(("moments", "registers"), [("*fp32", 60), ("*bf16", 64), ("*i16", 58)])
def test_an_update_fits(moments: str, registers: int) -> None:
    types = {"W": "*fp32", "G": "*fp32", "M": moments, "V": moments, "N": "i32:16"} | SCALARS
    m_kind, v_kind = KINDS[moments]
    constants = {"M_KIND": m_kind, "V_KIND": v_kind, "BLOCK": low_bit_triton.BLOCK}
    used = machine_code(low_bit_triton.adam_kernel, types, constants, num_warps=low_bit_triton.WARPS)
    assert_lean(used, registers, shared=4096)


@pytest.mark.parametrize("buffers", ["*fp32", "*bf16", "*i16"])
@pytest.mark.parametrize(("rank", "registers"), [("i32:16", 125), ("i32", 156)])
def test_an_update_by_factors_fits_and_multiplies_on_tensor_cores(buffers: str, rank: str, registers: int) -> None:
    """Two blocks of 8 warps are on a core at once, as with up to 128 registers, if the rank is a multiple of 16."""
    types: dict[str, Any] = dict.fromkeys(("P", "Q", "W"), "*fp32") | dict.fromkeys(("ERROR", "M", "V"), buffers)
    types |= {"N": "i32:16", "K": "i32:16", "R": rank, "SHARE": "fp32"} | SCALARS
    kinds = dict(zip(("M_KIND", "V_KIND"), KINDS[buffers], strict=True)) | {"ERROR_KIND": KINDS[buffers][0]}
    tile = {name: getattr(low_bit_triton, name) for name in ("TILE_N", "TILE_K", "TILE_R")}
    used = machine_code(
        low_bit_triton.decompressed_adam_kernel, types, kinds | tile,
        num_warps=low_bit_triton.TILE_WARPS, num_stages=low_bit_triton.STAGES,
    )  # fmt: skip
    assert_lean(used, registers, shared=32_768)
    assert used.wgmma > 0 and used.mma == 0


@pytest.mark.parametrize("signed", [True, False])
def test_coding_fits(signed: bool) -> None:
    constants = {"SIGNED": signed, "BLOCK": low_bit_triton.BLOCK}
    types = {"X": "*fp32", "CODES": "*i16", "N": "i32:16"}
    used = machine_code(low_bit_triton.decode_kernel, types, constants, num_warps=low_bit_triton.WARPS)
    assert_lean(used, registers=32, shared=4096)
    used = machine_code(
        low_bit_triton.encode_kernel, types | {"TOP": "fp32"}, constants, num_warps=low_bit_triton.WARPS
    )
    assert_lean(used, registers=34, shared=4096)
