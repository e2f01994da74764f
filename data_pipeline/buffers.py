"""Memory of large batches, used again: fresh memory costs more than turning a picture into numbers does.

The system hands out fresh memory page by page, and clears each; for a batch of 64 pictures of 256 x 256
that takes as long as two thirds of decoding them.
"""

import threading
import weakref

import numpy as np
import torch
from torch import Tensor


class Buffers:
    """Float32 tensors whose memory goes round: a tensor's is taken again once no tensor looks at it any more."""

    def __init__(self, limit: int) -> None:
        self.limit = limit  # what is wanted beyond is fresh memory
        self._arrays: list[np.ndarray] = []
        self._lent: list[weakref.ref[np.ndarray]] = []  # of each array what the tensors on it keep alive
        self._lock = threading.Lock()

    def empty(self, shape: tuple[int, ...]) -> Tensor:
        """A tensor with anything in it."""
        with self._lock:
            free = (n for n, lent in enumerate(self._lent) if lent() is None and self._arrays[n].shape == shape)
            n = next(free, len(self._arrays))
            if n == self.limit:
                return torch.empty(shape)
            if n == len(self._arrays):
                self._arrays.append(np.empty(shape, np.float32))
                self._lent.append(weakref.ref(self._arrays[n]))
            view = self._arrays[n].view()
            self._lent[n] = weakref.ref(view)
            return torch.from_numpy(view)
