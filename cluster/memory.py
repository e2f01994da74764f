"""What a process does with memory that it has freed."""

import ctypes

from cluster.process import Place

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h of glibc
NEVER, NONE = -1, 0


def keep_freed_memory(place: Place) -> None:
    """On a CPU, keep freed memory for the tensors to come; nothing happens on a GPU, or without glibc's malloc.

    glibc maps every allocation above 32 MB anew and unmaps it when it is freed, and each time the kernel clears its
    pages: 7 to 19 % of a training step (measured on 2 cores: the dVAE emoji-128 and of the published size, the
    transformer between them). Kept, memory comes in pieces that do not always fit, and a process may hold half as
    much again (measured: 2 to 46 %); so a run that recomputes activations to save memory should not ask for it.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if place.device.type == "cpu" and mallopt:
        mallopt(M_MMAP_MAX, NONE)
        mallopt(M_TRIM_THRESHOLD, NEVER)
