"""What the GPU benchmark times: each operator with its definition, its peers, and the least work it can do.

Bytes are those of each input read once and each output written once, counted off the tensors; log-sum-exps,
means and other numbers of a row are left out. FLOPs are those of matrix products over attended pairs only.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from kernels import reference
from kernels.attention import How, attention
from kernels.boundary import boundary
from kernels.layout import Sparsity
from kernels.reference import masked_attention, wide
from kernels.relaxed_codes import relaxed_codes

HALF = torch.bfloat16
SCALE = 2.0**9  # of the gradients inside a resblock; any power of two takes the same time

Named = dict[str, Tensor]


@dataclass(frozen=True)
class Contestant:
    """One way to compute an operator: a function of leaves, and the gradients of its outputs."""

    function: Callable[..., Any]
    leaves: tuple[Tensor, ...]
    d_outputs: tuple[Tensor, ...]
    # Outputs, and gradients of the leaves, under names and in shapes that all ways share.
    outputs: Callable[[Sequence[Tensor]], Named]
    gradients: Callable[[Sequence[Tensor]], Named]
    same: bool = True  # False for a baseline that computes another function

    def forward(self) -> tuple[Tensor, ...]:
        result = self.function(*self.leaves)
        return result if isinstance(result, tuple) else (result,)

    def backward(self, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(outputs, self.leaves, self.d_outputs)

    def double(self) -> "Contestant":
        """The same numbers in float64; meant for definitions, which compute in what they are given."""
        leaves = tuple(leaf.detach().double().requires_grad_() for leaf in self.leaves)
        return replace(self, leaves=leaves, d_outputs=tuple(d.double() for d in self.d_outputs))


@dataclass(frozen=True)
class Work:
    """The least that must be done."""

    n_bytes: int
    flops: int = 0


@dataclass(frozen=True)
class Case:
    """An operator at one size."""

    what: str
    ours: Contestant
    definition: Contestant  # on the same leaves, in their dtype
    peers: Mapping[str, Callable[[], Contestant]]  # made when their turn comes: that may fail
    forward: Work
    backward: Work


def sizes(*tensors: Tensor) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def normal(random: torch.Generator, *shape: int, dtype: torch.dtype = HALF, spread: float = 1.0) -> Tensor:
    """Random numbers on the device of the generator."""
    return (torch.randn(shape, generator=random, device=random.device) * spread).to(dtype)


def compiled(function: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """The function by torch.compile for its own shapes; on a CPU, where that takes a minute, as it is."""
    if device.type == "cpu":
        return function
    torch.compiler.reset()  # or the eighth compilation of one function would run uncompiled, without an error
    return torch.compile(function, dynamic=False)


def attention_case(sparsity: Sparsity, b: int, h: int, d: int, device: torch.device, how: How = "auto") -> Case:
    """Attention of qkv (B, S, 3, H, D) in bf16.

    Forward: q, k, v read, out written: 4 B S H D numbers; 4 D FLOPs a pair and head (two products).
    Backward: q, k, v, out, d_out read, dq, dk, dv written: 8 B S H D numbers; 10 D FLOPs (five products).
    """
    layout, random = sparsity.layout, torch.Generator(device).manual_seed(0)
    mask = sparsity.mask().to(device)
    s = layout.n_slots
    qkv = normal(random, b, s, 3, h, d).requires_grad_()
    d_out = normal(random, b, s, h, d)
    split = tuple(part.detach().contiguous().requires_grad_() for part in qkv.permute(2, 0, 3, 1, 4))

    def packed(function: Callable[[Tensor], Tensor]) -> Contestant:
        def named(gradients: Sequence[Tensor]) -> Named:
            return dict(zip(("dq", "dk", "dv"), gradients[0].unbind(2), strict=True))

        return Contestant(function, (qkv,), (d_out,), lambda outputs: {"out": outputs[0]}, named)

    def apart(function: Callable[..., Tensor], same: bool = True) -> Contestant:
        """A peer gets q, k and v as it likes them: each (B, H, S, D), contiguous."""

        def turned(names: Sequence[str]) -> Callable[[Sequence[Tensor]], Named]:
            return lambda tensors: {name: x.transpose(1, 2) for name, x in zip(names, tensors, strict=True)}

        gradients = turned(("dq", "dk", "dv"))
        return Contestant(function, split, (d_out.transpose(1, 2).contiguous(),), turned(("out",)), gradients, same)

    def defined(x: Tensor) -> Tensor:
        q, k, v = x.permute(2, 0, 3, 1, 4)
        return masked_attention(q, k, v, mask).transpose(1, 2)

    flops = 4 * d * int(mask.sum()) * b * h
    return Case(
        f"attention {sparsity.pattern}, B={b} H={h} D={d}, {layout.n_text}+{layout.rows}x{layout.columns}",
        packed(lambda x: attention(x, sparsity, how)),
        packed(defined),
        {
            "FlexAttention": lambda: apart(flex(sparsity, device)),
            "SDPA, boolean mask": lambda: apart(lambda q, k, v: masked_attention(q, k, v, mask)),
            "SDPA, dense causal (another function)": lambda: apart(dense_causal, same=False),
        },
        Work(sizes(qkv, d_out), flops),  # out is as large as its gradient
        Work(sizes(qkv, d_out, d_out, qkv), flops * 5 // 2),
    )


def dense_causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)


def flex(sparsity: Sparsity, device: torch.device) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """FlexAttention with a block mask from the same rule."""
    t, s = sparsity.layout.n_text, sparsity.layout.n_slots

    def allowed(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q >= k) & ((q < t) | (k < t) | sparsity.sees(q - k))

    block_mask = create_block_mask(allowed, None, None, s, s, device=device)
    return compiled(lambda q, k, v: flex_attention(q, k, v, block_mask=block_mask), device)


def plain_peers(definition: Contestant, device: torch.device) -> dict[str, Callable[[], Contestant]]:
    """The definition as it is and, on a GPU, as torch.compile fuses it."""
    peers = {"definition": lambda: definition}
    if device.type != "cpu":
        peers["definition, compiled"] = lambda: replace(definition, function=compiled(definition.function, device))
    return peers


def boundary_case(rows: int, width: int, device: torch.device) -> Case:
    """The resblock boundary with both scales: a float32 stream (rows, M), branch and h in bf16.

    Forward: x and branch read, x' and h written: 12 bytes a number. Backward: dx', dh and x' read, dx and
    dbranch written: 16 bytes a number.
    """
    random = torch.Generator(device).manual_seed(0)
    x, branch = normal(random, rows, width, dtype=torch.float32, spread=2.0), normal(random, rows, width)
    gain, bias = 1 + normal(random, width, spread=0.3), normal(random, width, spread=0.3)
    leaves = tuple(leaf.requires_grad_() for leaf in (x, branch, gain, bias))
    d_total, d_h = normal(random, rows, width, dtype=torch.float32), normal(random, rows, width, spread=SCALE)
    leave, enter = (torch.tensor(scale, device=device) for scale in (SCALE, SCALE))

    def named(*names: str) -> Callable[[Sequence[Tensor]], Named]:
        return lambda tensors: dict(zip(names, tensors, strict=True))

    def contestant(function: Callable[..., tuple[Tensor, Tensor]]) -> Contestant:
        gradients = named("d_x", "d_branch", "d_gain", "d_bias")
        return Contestant(
            lambda *inputs: function(*inputs, leave, enter), leaves, (d_total, d_h), named("total", "h"), gradients
        )

    definition = contestant(reference.boundary)
    return Case(
        f"boundary, {rows} rows of {width}",
        contestant(boundary),
        definition,
        plain_peers(definition, device),
        Work(sizes(x, branch, x, d_h)),
        Work(sizes(d_total, d_h, x, x, branch)),
    )


def relaxed_codes_case(rows: int, codebook: int, device: torch.device) -> Case:
    """Relaxed codes of bf16 logits (rows, K) with float32 noise, at temperature 1.

    Forward: logits and noise read, weights written: 8 bytes a number. Backward: d_weights, weights and
    logits read, d_logits written: 8 bytes a number.
    """
    random = torch.Generator(device).manual_seed(0)
    logits = (3 + normal(random, rows, codebook, spread=2.0)).requires_grad_()
    uniform = torch.rand(rows, codebook, generator=random, device=device).clamp_(1e-7, 1 - 1e-7)
    d_weights, d_kl = normal(random, rows, codebook), normal(random, rows, dtype=torch.float32)

    def contestant(function: Callable[[Tensor], tuple[Tensor, Tensor]]) -> Contestant:
        return Contestant(
            function, (logits,), (d_weights, d_kl),
            lambda outputs: dict(zip(("weights", "kl"), outputs, strict=True)),
            lambda gradients: {"d_logits": gradients[0]},
        )  # fmt: skip

    def defined(x: Tensor) -> tuple[Tensor, Tensor]:
        """In float32 of 16-bit logits, the weights then cast."""
        weights, kl = reference.relaxed_codes(x.to(wide(x)), uniform.to(wide(x)), 1.0)
        return weights.to(x.dtype), kl

    definition = contestant(defined)
    return Case(
        f"relaxed codes, {rows} rows of {codebook}",
        contestant(lambda x: relaxed_codes(x, uniform, 1.0)),
        definition,
        plain_peers(definition, device),
        Work(sizes(logits, uniform, d_weights)),
        Work(sizes(d_weights, d_weights, logits, logits)),
    )
