"""AdamW whose moments may be kept in 16 bits, and whose gradient may come as the factors of PowerSGD."""

from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from kernels.low_bit import adam_update, decompressed_adam_update
from kernels.low_bit_reference import AdamStep

Moments = Literal["fp32", "bf16", "16-bit"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "16-bit": torch.int16}
# What a moment decays by in a step must be more than half its distance to the number below, or it would be
# rounded back to where it was and never decay. That is 2^-(1 + bits of mantissa) of it: of mean, of variance.
LEAST_DECAY = {"fp32": (0.0, 0.0), "bf16": (2.0**-8, 2.0**-8), "16-bit": (2.0**-10, 2.0**-11)}


class Factors(NamedTuple):
    """The gradient p q^T: p (N, R), q (K, R). `error` (N, K) is what the compression has not yet sent.

    error is float32, bfloat16 or int16 of 1-6-9 codes; the gradient is taken off it, divided by n_replicas.
    """

    p: Tensor
    q: Tensor
    error: Tensor
    n_replicas: int


class AdamW(torch.optim.Optimizer):
    """AdamW for contiguous float32 parameters, as DeepSpeed's ZeRO holds them: one flat tensor a group.

    Options of a group, besides those of torch.optim.AdamW:
    moments        "fp32"; "bf16"; or "16-bit": the mean as 1-6-9 numbers, the variance as 0-6-10, whose codes
                   the int16 tensors of the state hold (Ramesh et al. 2021, B.2: for all but gains, biases,
                   embeddings and unembeddings)
    variance_clip  the running variance is cut to this before it is used or stored; 0 is no cut (there: 5)

    With "fp32" and no cut, the update is torch's own fused one. As in torch, loading a state brings the options
    it was saved with, moments among them. ValueError for unknown moments, and for a beta so near to 1 that
    moments of that precision would never decay.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        moments: Moments = "fp32",
        variance_clip: float = 0.0,
    ) -> None:
        options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**options, "moments": moments, "variance_clip": variance_clip})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        if group["moments"] not in get_args(Moments):
            raise ValueError(f"moments {group['moments']!r} is not one of {', '.join(get_args(Moments))}")
        for number, (beta, least) in enumerate(zip(group["betas"], LEAST_DECAY[group["moments"]], strict=True), 1):
            if 1 - beta <= least:
                raise ValueError(
                    f"beta{number} {beta}: {group['moments']} moments never decay unless it is < {1 - least}"
                )

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Options that a state saved by torch.optim.AdamW does not have are this optimiser's defaults."""
        super().__setstate__(state)
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As of torch, which would turn codes into floats, for it casts every state to its parameter's dtype."""
        super().load_state_dict({**state_dict, "state": {}})
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        params = [param for group in self.param_groups for param in group["params"]]
        for number, param in zip(numbers, params, strict=True):
            for name, value in state_dict["state"].get(number, {}).items():
                self.state[param][name] = value.to("cpu" if name == "step" else param.device)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient; returns what `closure` does, which is called first."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self.advance(param, group)
                    self.step_parameter(param, group, param.grad)
        return loss

    def advance(self, param: Tensor, group: dict[str, Any]) -> None:
        """Count one more update of `param`; its slices are then updated by `step_parameter`, each once.

        ValueError if its moments are not stored as its group says.
        """
        state, dtype = self.state[param], DTYPES[group["moments"]]
        if not state:
            state["step"] = torch.zeros(())  # on the CPU, where it is read, whatever the parameter's device
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros(param.shape, dtype=dtype, device=param.device)  # code 0 is 0.0
        for name in ("exp_avg", "exp_avg_sq"):
            if state[name].dtype != dtype:
                raise ValueError(f"{name} is stored as {state[name].dtype}; {group['moments']} moments are {dtype}")
        state["step"] += 1

    @torch.no_grad()
    def step_parameter(
        self,
        param: Tensor,
        group: dict[str, Any],
        gradient: Tensor | Factors,
        grad_factor: float = 1.0,
        start: int = 0,
    ) -> None:
        """Update as much of `param`, taken as flat, as `gradient` has numbers, from number `start` on.

        gradient: float32 of any shape, or factors, to be multiplied by grad_factor (of gradient clipping).
        `advance` goes before. ValueError if the slice does not fit, or as kernels.low_bit has it.
        """
        state, (beta1, beta2) = self.state[param], group["betas"]
        how = AdamStep(
            group["lr"], beta1, beta2, group["eps"], group["weight_decay"], int(state["step"]),
            group["variance_clip"], grad_factor,
        )  # fmt: skip
        shape = (gradient.p.shape[0], gradient.q.shape[0]) if isinstance(gradient, Factors) else gradient.shape
        stop = start + torch.Size(shape).numel()
        if not 0 <= start <= stop <= param.numel():
            raise ValueError(f"numbers {start} to {stop} of a parameter that has {param.numel()}")
        tensors = (param, state["exp_avg"], state["exp_avg_sq"])
        w, m, v = (tensor.view(-1)[start:stop].view(shape) for tensor in tensors)
        if isinstance(gradient, Factors):
            decompressed_adam_update(*gradient, w, m, v, how)
        else:
            adam_update(w, gradient.contiguous(), m, v, how)
