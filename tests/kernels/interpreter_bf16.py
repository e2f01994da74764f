"""bf16 arithmetic for Triton's interpreter, which keeps bf16 as raw 16-bit words and adds those.

Operands go up to fp32 exactly; results come down by round to nearest even, as the hardware does. The
interpreter's own cast from fp32 cuts the last bits off, which doubles the error of what a kernel stores.
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
    """fp32 values as a bf16 handle. Rounding would carry some NaNs over into zero, so NaN is set apart."""
    values = np.asarray(values, np.float32)
    words = values.view(np.uint32)
    rounded = (words + 0x7FFF + ((words >> 16) & 1)) >> 16
    return interpreter.TensorHandle(np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16), tl.bfloat16)


def patch() -> None:
    """Replace the interpreter's dot, binary and unary operations, and its casts between fp32 and bf16."""
    builder = interpreter.InterpreterBuilder
    dot, binary, unary, cast = builder.create_dot, builder.binary_op, builder.unary_op, builder.cast_impl

    def patched_dot(self: Any, a: Any, b: Any, acc: Any, *rest: Any) -> Any:
        return dot(self, up(a), up(b), acc, *rest)

    def patched_binary(self: Any, left: Any, right: Any, op: Any) -> Any:
        if left.dtype.scalar != tl.bfloat16:
            return binary(self, left, right, op)
        out = op(up(left).data, up(right).data)
        return interpreter.TensorHandle(out, tl.int1) if out.dtype == bool else down(out)

    def patched_unary(self: Any, value: Any, op: Any) -> Any:
        return unary(self, value, op) if value.dtype.scalar != tl.bfloat16 else down(op(up(value).data))

    def patched_cast(self: Any, value: Any, to: Any) -> Any:
        if (value.dtype.scalar, to.scalar) == (tl.float32, tl.bfloat16):
            return down(value.data)
        return up(value) if (value.dtype.scalar, to.scalar) == (tl.bfloat16, tl.float32) else cast(self, value, to)

    builder.create_dot, builder.binary_op, builder.unary_op = patched_dot, patched_binary, patched_unary
    builder.cast_impl = patched_cast
