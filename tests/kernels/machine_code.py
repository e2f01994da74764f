"""Compile a Triton kernel for a GPU that is not there, and count what its machine code uses."""

import pathlib
import re
import subprocess
import tempfile
from dataclasses import dataclass
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOLS = pathlib.Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
SHARED_LIMIT = 232_448  # bytes of shared memory that a block may use on an H100


@dataclass(frozen=True)
class Resources:
    """Per-thread registers and stack, spilling instructions, bytes of shared memory, tensor-core instructions."""

    registers: int
    stack: int
    spills: int
    shared: int
    wgmma: int
    mma: int


def machine_code(kernel: Any, types: dict[str, str], constants: dict[str, Any], **options: int) -> Resources:
    """Compile for sm_90. types: of each run-time argument, '*bf16', '*fp32', 'i32', 'fp32' ...; pointers and
    every 'i32' whose value is a multiple of 16 may be given as 'i32:16', pointers are taken as aligned.
    options: num_warps, num_stages; products and sums are fused, as all launches ask. Shared memory over
    the limit is not refused here: assert it."""
    names = kernel.arg_names
    assert {parameter.name for parameter in kernel.params if parameter.is_constexpr} == set(constants)
    signature = {name: "constexpr" if name in constants else types[name].removesuffix(":16") for name in names}
    values = {(names.index(name),): value for name, value in constants.items()}
    aligned = [name for name in names if name in types and (types[name][0] == "*" or types[name].endswith(":16"))]
    hints = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(kernel, signature, values, hints)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"enable_fp_fusion": True} | options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _output(TOOLS / "cuobjdump", "--dump-resource-usage", file.name)
        code = _output(TOOLS / "nvdisasm", "-c", file.name)
    field = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    return Resources(
        registers=field["REG"],
        stack=field["STACK"],
        spills=_count(code, "LDL") + _count(code, "STL"),
        shared=compiled.metadata.shared,
        wgmma=_count(code, "HGMMA"),
        mma=_count(code, "HMMA"),
    )


def _output(*words: Any) -> str:
    return subprocess.run([str(word) for word in words], text=True, capture_output=True, check=True).stdout


def _count(code: str, instruction: str) -> int:
    return len(re.findall(rf"\b{instruction}[.\w]*\b", code))
