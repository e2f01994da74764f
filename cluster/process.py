"""Where this process stands in the job: rank, device, process group.

The only reader of the launcher's environment (RANK, WORLD_SIZE, LOCAL_RANK and kin). Works the same
under plain `python` (a world of one), `torchrun` and `deepspeed`.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from cluster.settings import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Place:
    """One process of R = world_size."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """True on the one rank that writes shared files and shows progress."""
        return self.rank == 0


@contextmanager
def joined_place(timeout_minutes: float = 30.0) -> Iterator[Place]:
    """Join the job's process group (NCCL on GPUs, gloo on CPUs) and leave it at the end."""
    rank, world_size = _read("RANK", 0), _read("WORLD_SIZE", 1)
    if not 0 <= rank < world_size:
        raise UserError(f"RANK={rank} must be below WORLD_SIZE={world_size}; check the launcher's environment")
    device = _pick_device(_read("LOCAL_RANK", 0))
    _join_group("nccl" if device.type == "cuda" else "gloo", rank, world_size, timedelta(minutes=timeout_minutes))
    try:
        yield Place(rank, world_size, device)
        dist.barrier()
    finally:
        dist.destroy_process_group()


def lone_place() -> Place:
    """The place of a stage that runs in one process and needs no group."""
    return Place(0, 1, _pick_device(0))


def largest_of(place: Place, value: int) -> int:
    """The largest of all ranks' values, on every rank."""
    if place.world_size == 1:
        return value
    answer = torch.tensor(value, device=place.device)
    dist.all_reduce(answer, op=dist.ReduceOp.MAX)
    return int(answer.item())


def sum_over_ranks(place: Place, values: dict[str, float]) -> dict[str, float]:
    """Each value summed over the ranks, in float64."""
    if place.world_size == 1:
        return values
    total = torch.tensor(list(values.values()), dtype=torch.float64, device=place.device)
    dist.all_reduce(total)
    return dict(zip(values, total.tolist(), strict=True))


def mean_over_ranks(place: Place, values: dict[str, float]) -> dict[str, float]:
    """Each value averaged over the ranks."""
    return {name: total / place.world_size for name, total in sum_over_ranks(place, values).items()}


def gathered(place: Place, value: T) -> list[T]:
    """Every rank's value, in the order of the ranks, on every rank; for what is small and rare."""
    values: list[T] = [value] * place.world_size
    if place.world_size > 1:
        dist.all_gather_object(values, value)
    return values


def wait_for_all(place: Place) -> None:
    """A barrier, when there is anybody to wait for."""
    if place.world_size > 1:
        dist.barrier()


def share_cores(place: Place) -> None:
    """Give this rank its part of the machine's cores, so that ranks on one host do not fight."""
    local = _read("LOCAL_WORLD_SIZE", place.world_size)
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local))


def launched_rank() -> int:
    """The rank that the launcher gave, before any group is joined; 0 without a launcher."""
    text = os.environ.get("RANK", "0")
    return int(text) if text.isdigit() else 0


def computes_bf16(place: Place) -> bool:
    """True if every rank's device multiplies bfloat16 matrices in hardware."""
    if place.device.type == "cuda":
        here = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        here = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return not largest_of(place, int(not here))


def _read(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    try:
        return int(text)
    except ValueError:
        raise UserError(f"environment variable {name}={text!r} must be a whole number") from None


def _pick_device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _join_group(backend: str, rank: int, world_size: int, timeout: timedelta) -> None:
    if world_size == 1:  # needs no address and no port
        os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed insists on it
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    else:
        dist.init_process_group(backend, timeout=timeout)
