"""An exponential average of the weights on their own device (Ramesh et al. 2021, appendix A.2: decay 0.999)."""

import copy
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


class Average(Generic[M]):
    """A second module whose weights follow those of the first.

    The paper does not say how its average begins. Ours is the plain mean of all weights so far until that
    spans as many updates as the decay does: a short run is not held back by the weights it began with.
    """

    def __init__(self, model: M, decay: float) -> None:
        """decay: of the average at each update, below 1."""
        self.decay = decay
        self.model = copy.deepcopy(model).requires_grad_(False)
        self._weights: list[Tensor] = list(model.parameters())
        self._means: list[Tensor] = list(self.model.parameters())

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Call after update `step` (from 0)."""
        share = max(1 - self.decay, 1 / (step + 1))
        torch._foreach_lerp_(self._means, self._weights, share)

    def state(self) -> dict[str, Tensor]:
        return self.model.state_dict()

    def restore(self, state: dict[str, Tensor]) -> None:
        self.model.load_state_dict(state)
