"""An exponential average of the weights, kept on the CPU (Ramesh et al. 2021, appendix B.2).

The paper copies the parameters from the GPU every 25 updates, while training goes on, and averages
the copies with a decay of 0.99. It does not say how the average begins: ours is the first copy itself,
with no correction for its weight (0.99^k after k more copies: below 1 % after 11,500 updates).
"""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor


class Average:
    """The average of this rank's shards of the fp32 weights: the same list of tensors, in the same order, at each call.

    Each rank averages what it owns, so that nothing is sent. The host holds two copies of the shards: the average,
    and the memory they arrive in, pinned if they come from a GPU (shards on a CPU need it only for `averaged`).
    """

    def __init__(self, every: int, decay: float) -> None:
        """every: updates between copies (the paper: 25); decay: of the average at each copy (the paper: 0.99)."""
        self.every, self.decay = every, decay
        self._average: list[Tensor] = []  # (n,) fp32 each; empty until the first copy
        self._arrived: list[Tensor] = []
        self._stream: torch.cuda.Stream | None = None  # copies run on it, beside the training
        self._copied: torch.cuda.Event | None = None  # the end of the last one
        self._thread = ThreadPoolExecutor(1, "weight average")  # starts at its first work
        self._blending: Future[None] | None = None

    def before_step(self) -> None:
        """Call before the optimizer writes to the shards: the GPU, not the host, waits until a copy under way is out.

        A whole forward and backward pass have hidden it by then.
        """
        if self._stream is not None and self._copied is not None:
            torch.cuda.current_stream(self._stream.device).wait_event(self._copied)

    def update(self, step: int, shards: list[Tensor]) -> None:
        """Call after update `step` (from 0); every `every`-th call adds the shards to the average.

        ValueError if the shards are not those of the average.
        """
        if (step + 1) % self.every:
            return
        self._settle()
        if self._average:
            self._refuse_others(shards)
        if any(shard.is_cuda for shard in shards):
            self._blending = self._thread.submit(self._blend, self._fetch(shards))
        else:
            self._add(shards)

    def state(self) -> list[Tensor]:
        """The average, a CPU tensor a shard; empty before the first copy.

        It is not copied: write it before the next update.
        """
        self._settle()
        return self._average

    def restore(self, state: list[Tensor]) -> None:
        """Go on from a state, of which a copy is taken."""
        self._settle()
        self._average = [tensor.to("cpu", torch.float32, copy=True) for tensor in state]

    @contextmanager
    def averaged(self, shards: list[Tensor]) -> Iterator[None]:
        """The average stands in the shards inside, and the weights again, to the last bit, after it.

        Before the first copy there is no average, and the weights stay. Nothing may be trained inside.
        ValueError if the shards are not those of the average.
        """
        self._settle()
        if not self._average:
            yield
            return
        self._refuse_others(shards)
        weights = self._landing(shards)
        _copy(shards, weights)
        _copy(self._average, shards)
        try:
            yield
        finally:
            _copy(weights, shards)

    def _fetch(self, shards: list[Tensor]) -> torch.cuda.Event:
        """Start to copy the shards to the host, behind what the GPU already has to do; the event of its end."""
        device = shards[0].device
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)
        self._copied = torch.cuda.Event(blocking=True)  # the thread sleeps till then instead of spinning
        self._stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self._stream):
            _copy(shards, self._landing(shards), non_blocking=True)
            self._copied.record(self._stream)
        return self._copied

    def _landing(self, shards: list[Tensor]) -> list[Tensor]:
        if not self._arrived:
            self._arrived = [
                torch.empty(shard.shape, dtype=torch.float32, pin_memory=shard.is_cuda) for shard in shards
            ]
        return self._arrived

    def _blend(self, copied: torch.cuda.Event) -> None:
        """On the thread: wait for the copy, and add it."""
        copied.synchronize()
        self._add(self._arrived)

    @torch.no_grad()
    def _add(self, shards: list[Tensor]) -> None:
        if not self._average:
            self._average = [shard.detach().to(torch.float32, copy=True) for shard in shards]
            return
        for mean, shard in zip(self._average, shards, strict=True):
            mean.lerp_(shard, 1 - self.decay)

    def _settle(self) -> None:
        """Wait for the thread; raises what it raised."""
        if self._blending is not None:
            self._blending.result()
            self._blending = None

    def _refuse_others(self, shards: list[Tensor]) -> None:
        there, here = [tuple(mean.shape) for mean in self._average], [tuple(shard.shape) for shard in shards]
        if there != here:
            raise ValueError(f"the average is of shards of shapes {there}, these have {here}")


@torch.no_grad()
def _copy(sources: list[Tensor], targets: list[Tensor], non_blocking: bool = False) -> None:
    for source, target in zip(sources, targets, strict=True):
        target.copy_(source, non_blocking=non_blocking)
