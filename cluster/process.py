"""Where this process stands in the job: rank, device, process group.

The only reader of the launcher's environment (RANK, WORLD_SIZE, LOCAL_RANK and kin). Works the same
under plain `python` (a world of one), `smalti launch`, `torchrun`, `deepspeed` and `srun`.
"""

import os
import re
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from cluster.settings import UserError

T = TypeVar("T")

TIMEOUT = "SMALTI_TIMEOUT_MINUTES"  # a launcher's word on how long a rank waits for the others
LAUNCH = "SMALTI_LAUNCH"  # marks every process of one launch, so that a launcher finds its own on another host
PORTS = range(20000, 30000)  # below what Linux gives to outgoing connections (ip_local_port_range: 32768 and up)


@dataclass(frozen=True)
class Launched:
    """Where a launcher put this process; address and port of rank 0 are "" and 0 where nobody said them."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    address: str = ""
    port: int = 0

    def variables(self) -> dict[str, str]:
        """As torch and DeepSpeed read it from the environment."""
        return {
            "RANK": str(self.rank), "WORLD_SIZE": str(self.world_size), "LOCAL_RANK": str(self.local_rank),
            "LOCAL_WORLD_SIZE": str(self.local_world_size), "MASTER_ADDR": self.address, "MASTER_PORT": str(self.port),
        }  # fmt: skip


def read_launch(environment: Mapping[str, str]) -> Launched:
    """What the environment says: RANK and kin of torchrun and DeepSpeed, else those of an srun step of several tasks.

    SLURM's own variables leak into whatever is started inside a job, so they count only where no launcher has spoken.
    UserError if the numbers make no sense.
    """
    if "RANK" in environment or "WORLD_SIZE" in environment:
        world_size = _number(environment, "WORLD_SIZE", 1)
        local = _number(environment, "LOCAL_SIZE", world_size)  # DeepSpeed's name for it
        found = Launched(
            _number(environment, "RANK", 0), world_size, _number(environment, "LOCAL_RANK", 0),
            _number(environment, "LOCAL_WORLD_SIZE", local),
            environment.get("MASTER_ADDR", ""), _number(environment, "MASTER_PORT", 0),
        )  # fmt: skip
    elif _number(environment, "SLURM_STEP_NUM_TASKS", 1) > 1 and "SLURM_PROCID" in environment:
        found = _read_srun(environment)
    else:
        return Launched()
    if not 0 <= found.rank < found.world_size:
        told = f"RANK={found.rank} must be below WORLD_SIZE={found.world_size}"
        raise UserError(f"{told}; check the launcher's environment")
    return found


def _read_srun(environment: Mapping[str, str]) -> Launched:
    """The task of an srun step; names as in srun(1), "output environment variables"."""
    world_size = _number(environment, "SLURM_STEP_NUM_TASKS", 1)
    tasks = tasks_per_node(environment.get("SLURM_STEP_TASKS_PER_NODE", str(world_size)))
    node = _number(environment, "SLURM_NODEID", 0)
    if not 0 <= node < len(tasks):
        raise UserError(f"SLURM_NODEID={node} is none of the {len(tasks)} nodes in SLURM_STEP_TASKS_PER_NODE")
    job, step = _number(environment, "SLURM_JOB_ID", 0), _number(environment, "SLURM_STEP_ID", 0)
    port = PORTS[(7 * job + step) % len(PORTS)]  # the steps of a job, and the jobs of a node, should not share one
    return Launched(
        _number(environment, "SLURM_PROCID", 0), world_size, _number(environment, "SLURM_LOCALID", 0), tasks[node],
        environment.get("MASTER_ADDR") or first_host(environment.get("SLURM_STEP_NODELIST", "")),
        _number(environment, "MASTER_PORT", port),
    )  # fmt: skip


def tasks_per_node(text: str) -> list[int]:
    """SLURM's run lengths, spelt out: "2(x3),1" is [2, 2, 2, 1]. UserError if it is not that."""
    counts: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if not found:
            raise UserError(f"SLURM_STEP_TASKS_PER_NODE={text!r} must look like 2(x3),1")
        counts += [int(found[1])] * int(found[2] or 1)
    return counts


def first_host(text: str) -> str:
    """The first of SLURM's folded host names: "node[01-04,7],x1" begins with node01. UserError if there is none."""
    found = re.match(r"(?:[^,\[\]]|\[[^\]]*\])+(?=,|$)", text)
    first = re.sub(r"\[(\w+)[^\]]*\]", r"\1", found[0]) if found else ""
    if not first:
        raise UserError(f"SLURM_STEP_NODELIST={text!r} names no host; export MASTER_ADDR")
    return first


def environment_with(changes: Mapping[str, str]) -> dict[str, str]:
    """This process's environment for one that it starts, changed."""
    return os.environ | dict(changes)


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
    """Join the job's process group (NCCL on GPUs, gloo on CPUs) and leave it at the end.

    timeout_minutes: how long a rank waits for the others before it gives up, unless the launcher says.
    """
    launched = read_launch(os.environ)
    device = _pick_device(launched.local_rank)
    _tell_others(launched, device)
    _join_group("nccl" if device.type == "cuda" else "gloo", launched, timedelta(minutes=_timeout(timeout_minutes)))
    try:
        yield Place(launched.rank, launched.world_size, device)
        dist.barrier()
    finally:
        dist.destroy_process_group()


@contextmanager
def meeting_place(on_cpu: bool) -> Iterator[Place]:
    """The place of a stage whose ranks work apart and meet once at its end (`meet`); a group only if there are several.

    The group is gloo's, on GPUs too, and waits a month: shares differ in size, and a rank that dies is told at once.
    """
    launched = read_launch(os.environ)
    device = torch.device("cpu") if on_cpu else _pick_device(launched.local_rank)
    if launched.world_size > 1:
        _tell_others(launched, device)
        _join_group("gloo", launched, timedelta(days=30))
    try:
        yield Place(launched.rank, launched.world_size, device)
    finally:
        if launched.world_size > 1:
            dist.destroy_process_group()


def meet(place: Place) -> None:
    """Wait until every rank of a `meeting_place` has come here; UserError if one never will."""
    try:
        wait_for_all(place)
    except RuntimeError:  # gloo's word for a closed connection
        raise UserError(
            "another process of this job ended before its work was done: see what it said, then run this command again"
        ) from None


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
    """Give this rank its part of the cores that it may use, so that ranks on one host do not fight. Collective.

    srun may have bound each to cores of its own; other launchers let all ranks of a host use all.
    """
    here, mine = socket.gethostname(), os.sched_getaffinity(0)
    sharers = sum(host == here and not mine.isdisjoint(cores) for host, cores in gathered(place, (here, mine)))
    torch.set_num_threads(max(1, len(mine) // sharers))


def launched_rank() -> int:
    """The rank that the launcher gave, before any group is joined; 0 without a launcher, or where it makes no sense."""
    try:
        return read_launch(os.environ).rank
    except UserError:
        return 0


def computes_bf16(place: Place) -> bool:
    """True if every rank's device multiplies bfloat16 matrices in hardware."""
    if place.device.type == "cuda":
        here = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        here = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return not largest_of(place, int(not here))


def _number(environment: Mapping[str, str], name: str, default: int) -> int:
    text = environment.get(name, str(default))
    try:
        return int(text)
    except ValueError:
        raise UserError(f"environment variable {name}={text!r} must be a whole number") from None


def _timeout(minutes: float) -> float:
    text = os.environ.get(TIMEOUT, str(minutes))
    try:
        told = float(text)
    except ValueError:
        told = 0.0
    if not 0 < told < float("inf"):
        raise UserError(f"environment variable {TIMEOUT}={text!r} must be a number above 0")
    return told


def n_accelerators() -> int:
    """GPUs that this process may use; 0 on a machine without."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _pick_device(local_rank: int) -> torch.device:
    count = n_accelerators()
    if not count:
        return torch.device("cpu")
    index = 0 if count == 1 else local_rank  # srun --gpus-per-task=1 shows each process only its own
    if index >= count:
        raise UserError(f"local rank {local_rank} has no GPU: this process sees {count}; start fewer a host")
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def _tell_others(launched: Launched, device: torch.device) -> None:
    """Let DeepSpeed and torch, which read the environment, find what we found, whoever the launcher was."""
    if launched.world_size > 1:
        os.environ.update(launched.variables())
    os.environ["LOCAL_RANK"] = str(launched.local_rank if device.index is None else device.index)


def _join_group(backend: str, launched: Launched, timeout: timedelta) -> None:
    if launched.world_size == 1:  # needs no address and no port
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        return
    if not launched.address or not launched.port:
        raise UserError("MASTER_ADDR and MASTER_PORT must say where rank 0 listens; a launcher sets them")
    try:
        dist.init_process_group(backend, timeout=timeout)
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        raise UserError(_why_not_joined(launched, str(error))) from None
    except RuntimeError as error:  # the store was reached, but the backend has no way to the others
        said = re.sub(r"^\[[^]]*\] *", "", str(error).strip()).partition("\n")[0]
        interfaces = "GLOO_SOCKET_IFNAME / NCCL_SOCKET_IFNAME"
        raise UserError(f"rank {launched.rank} cannot connect to the others: {said}; see {interfaces}") from None


def _why_not_joined(launched: Launched, said: str) -> str:
    """One line about a process group that did not come about."""
    where = f"{launched.address}:{launched.port}"
    if "EADDRINUSE" in said:
        return f"port {launched.port} of {launched.address} is taken, by another job perhaps; choose another"
    if launched.rank:
        return f"rank {launched.rank} did not reach rank 0 at {where}: {said.splitlines()[0]}"
    return f"the {launched.world_size} processes did not all reach rank 0 at {where}: {said.splitlines()[0]}"
