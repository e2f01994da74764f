"""bf16 arithmetic for Triton's interpreter, which keeps bf16 as raw 16-bit words and adds those.

Operands go up to fp32 exactly; results come down by round to nearest even, as the hardware does.
"""

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def up(handle: Any) -> Any:
    """A bf16 handle as the fp32 handle of the same values; others as they are."""
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def down(values: np.ndarray) -> Any:
    """fp32 values as a bf16 handle."""
    words = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return interpreter.TensorHandle(((words + 0x7FFF + ((words >> 16) & 1)) >> 16).astype(np.uint16), tl.bfloat16)


def patch() -> None:
    """Replace the interpreter's dot, binary and unary operations."""
    builder = interpreter.InterpreterBuilder
    dot, binary, unary = builder.create_dot, builder.binary_op, builder.unary_op

    def patched_dot(self: Any, a: Any, b: Any, acc: Any, *rest: Any) -> Any:
        return dot(self, up(a), up(b), acc, *rest)

    def patched_binary(self: Any, left: Any, right: Any, op: Any) -> Any:
        if left.dtype.scalar != tl.bfloat16:
            return binary(self, left, right, op)
        out = op(up(left).data, up(right).data)
        return interpreter.TensorHandle(out, tl.int1) if out.dtype == bool else down(out)

    def patched_unary(self: Any, value: Any, op: Any) -> Any:
        return unary(self, value, op) if value.dtype.scalar != tl.bfloat16 else down(op(up(value).data))

    builder.create_dot, builder.binary_op, builder.unary_op = patched_dot, patched_binary, patched_unary
