"""Attention under a sparsity pattern on a CPU: pieces of torch's flash kernel, merged by log-sum-exp.

An image slot's keys are all text, one dense piece, and a band of image slots. Bands become dense too:
a column is causal attention over the transposed grid; for row and conv, blocks of whole rows look at
windows of whole rows, their own and those before, under a small mask. Columns, blocks and windows are
strided views of the packed projection, overlapping where they must: nothing is copied.

Every piece's backward is given the output and the log-sum-exp of the whole, so that its gradients
are exact shares of the whole's and are only added up.
"""

from collections.abc import Iterator
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.layout import Sparsity

BLOCK_SLOTS = 32  # queries of a block: fewer leave the products too small, more mask out too many (measured)

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def forward(qkv: Tensor, sparsity: Sparsity) -> tuple[Tensor, Tensor]:
    """qkv (B, S, 3, H, D) -> output (B, S, H, D), natural log-sum-exp of the scores (B, H, S) float32."""
    b, s, _, h, d = qkv.shape
    out = qkv.new_empty(b, s, h, d)
    lse = qkv.new_empty(b, h, s, dtype=torch.promote_types(qkv.dtype, torch.float32))
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, H, S, D)
    if sparsity.pattern == "dense":
        out.transpose(1, 2)[:], lse[:] = _flash(q, k, v, 0.0, True)
    else:
        for slices in _slices(q, k, v, out.transpose(1, 2), lse):
            _forward_slice(_band(sparsity, qkv.dtype), sparsity.layout.n_text, *slices)
    return out, lse


def backward(d_out: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, sparsity: Sparsity) -> Tensor:
    """Gradient of qkv (B, S, 3, H, D), from that of the output (B, S, H, D) and what `forward` gave."""
    d_qkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    dq, dk, dv = d_qkv.permute(2, 0, 3, 1, 4)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    out, d_out = out.transpose(1, 2), d_out.transpose(1, 2)
    if sparsity.pattern == "dense":
        dq[:], dk[:], dv[:] = _flash_backward(d_out, q, k, v, out, lse, 0.0, True)
    else:
        for slices in _slices(d_out, q, k, v, out, lse, dq, dk, dv):
            _backward_slice(_band(sparsity, qkv.dtype), sparsity.layout.n_text, *slices)
    return d_qkv


def _slices(*tensors: Tensor) -> Iterator[list[Tensor]]:
    """(B, H, S, ...) tensors as (B, S, ...) of each head or (H, S, ...) of each sample, whichever are fewer."""
    axis = 0 if tensors[0].shape[0] <= tensors[0].shape[1] else 1
    return ([x.select(axis, number) for x in tensors] for number in range(tensors[0].shape[axis]))


def _forward_slice(band: "Band", t: int, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> None:
    """Write out (Z, S, D) and lse (Z, S) from q, k, v (Z, S, D)."""
    image, image_lse = _flash(band.queries(q), band.keys(k), band.keys(v), 0.0, band.mask is None, attn_mask=band.mask)
    image, image_lse = band.merged(image), band.merged(image_lse)
    if not t:
        out[:], lse[:] = image, image_lse
        return
    text_k, text_v = k[:, None, :t], v[:, None, :t]
    (text, text_lse) = _flash(q[:, None, t:], text_k, text_v, 0.0, False)
    share = torch.sigmoid(text_lse[:, 0] - image_lse)[..., None]  # of the text in the sum of both
    out[:, t:] = torch.lerp(image.to(share.dtype), text[:, 0].to(share.dtype), share)
    lse[:, t:] = torch.logaddexp(text_lse[:, 0], image_lse)
    text, text_lse = _flash(q[:, None, :t], text_k, text_v, 0.0, True)
    out[:, :t], lse[:, :t] = text[:, 0], text_lse[:, 0]


def _backward_slice(
    band: "Band", t: int, d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    dq: Tensor, dk: Tensor, dv: Tensor,
) -> None:  # fmt: skip
    """Write the gradients dq, dk, dv (Z, S, D)."""
    image_q, image_k, image_v = _flash_backward(
        band.queries(d_out), band.queries(q), band.keys(k), band.keys(v), band.queries(out),
        band.queries(lse).contiguous(), 0.0, band.mask is None, attn_mask=band.mask,
    )  # fmt: skip
    band.fold(image_k, dk[:, t:])
    band.fold(image_v, dv[:, t:])
    if not t:
        dq[:] = band.merged(image_q)
        return
    text_k, text_v = k[:, None, :t], v[:, None, :t]
    share_q, share_k, share_v = _flash_backward(
        d_out[:, None, t:], q[:, None, t:], text_k, text_v, out[:, None, t:], lse[:, None, t:], 0.0, False
    )
    torch.add(share_q[:, 0], band.merged(image_q), out=dq[:, t:])
    text_q, own_k, own_v = _flash_backward(
        d_out[:, None, :t], q[:, None, :t], text_k, text_v, out[:, None, :t], lse[:, None, :t], 0.0, True
    )
    dq[:, :t] = text_q[:, 0]
    torch.add(share_k[:, 0], own_k[:, 0], out=dk[:, :t])
    torch.add(share_v[:, 0], own_v[:, 0], out=dv[:, :t])


class Columns:
    """Image slots (Z, I) by column: each column's slots see those above."""

    mask = None

    def __init__(self, sparsity: Sparsity) -> None:
        self.n_text, self.grid = sparsity.layout.n_text, (sparsity.layout.rows, sparsity.layout.columns)

    def queries(self, x: Tensor) -> Tensor:
        """(Z, S, ...) -> (Z, columns, rows, ...), a view."""
        return x[:, self.n_text :].unflatten(1, self.grid).transpose(1, 2)

    keys = queries

    def merged(self, x: Tensor) -> Tensor:
        """The inverse of `queries`, image slots only."""
        return x.transpose(1, 2).flatten(1, 2)

    def fold(self, share: Tensor, out: Tensor) -> None:
        """Write the keys' gradients to out (Z, I, D)."""
        out.copy_(self.merged(share))


class Windows:
    """Image slots (Z, I) by blocks of whole rows, each looking at its own rows and the `back` before.

    Windows of the first blocks reach into the text (or into zeros, where there is less of it); the
    mask hides that.
    """

    def __init__(self, sparsity: Sparsity, dtype: torch.dtype) -> None:
        rows, width = sparsity.layout.rows, sparsity.layout.columns
        wide_enough = (r for r in range(1, rows + 1) if rows % r == 0 and (r * width >= BLOCK_SLOTS or r == rows))
        self.n_text, self.rows, self.width = sparsity.layout.n_text, rows, width
        self.own = next(wide_enough)
        self.back = -(-sparsity.reach // width)
        q = torch.arange(sparsity.layout.n_image).view(-1, self.own * width, 1)
        k = q[:, :1] - self.back * width + torch.arange((self.back + self.own) * width)
        seen = sparsity.sees(q - k) & (k >= 0)
        self.mask: Tensor | None = torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, -torch.inf)[None]

    def queries(self, x: Tensor) -> Tensor:
        """(Z, S, ...) -> (Z, blocks, own rows * W, ...), a view."""
        return x[:, self.n_text :].unflatten(1, (-1, self.own * self.width))

    def keys(self, x: Tensor) -> Tensor:
        """(Z, S, D) -> (Z, blocks, (back + own) * W, D), overlapping; a view if there is text enough."""
        start = self.n_text - self.back * self.width
        x = x[:, start:] if start >= 0 else F.pad(x[:, self.n_text :], (0, 0, self.back * self.width, 0))
        return x.unfold(1, (self.back + self.own) * self.width, self.own * self.width).transpose(2, 3)

    def merged(self, x: Tensor) -> Tensor:
        """The inverse of `queries`, image slots only."""
        return x.flatten(1, 2)

    def fold(self, share: Tensor, out: Tensor) -> None:
        """Sum the windows' gradients (Z, blocks, (back + own) * W, D) into out (Z, I, D)."""
        share = share.unflatten(2, (-1, self.width))
        own = out.unflatten(1, (-1, self.own, self.width))
        own.copy_(share[:, :, self.back :])
        by_row = out.unflatten(1, (self.rows, self.width))
        for row in range(self.back):  # of a window; in block b it is image row b * own + row - back
            first = -((row - self.back) // self.own)  # the first block in which it is one
            others = share[:, first:, row]
            by_row[:, first * self.own + row - self.back :: self.own][:, : others.shape[1]] += others


Band = Columns | Windows


@cache
def _band(sparsity: Sparsity, dtype: torch.dtype) -> Band:
    return Columns(sparsity) if sparsity.pattern == "column" else Windows(sparsity, dtype)
