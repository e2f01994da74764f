"""What each process of a job finds out about its machine before a launch, and what is to be thought of it.

`facts_here` looks, on every rank; the `judge_...` functions compare what all ranks found, and are pure. What ranks can
only find out together is in checks_together.py.
"""

import math
import platform
import re
import resource
import shutil
import socket
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch.utils.cpp_extension import get_default_build_root

from cluster.manifest import installed_versions
from cluster.process import Place, environment_with

GIB = 2**30
FRAGMENTS = 0.03  # of a GPU's memory, lost between tensors: assumed, as pretrain/plan_machines.py does
LIBRARIES = 1 * GIB  # of a GPU's, for cuBLAS and NCCL, when a context is there already: assumed
GPU_SHARED_MEMORY = 1 * GIB  # of /dev/shm; NCCL's manual, "Troubleshooting", asks for --shm-size=1g in containers
DRIVER = Path("/proc/driver/nvidia/version")
NEEDED = ("torch", "deepspeed", "numpy", "sentencepiece")


@dataclass(frozen=True)
class Finding:
    """What a check came to. fix: it would stop or spoil the run, and `advice` is what to do about it."""

    what: str
    state: Literal["ok", "fix", "skip"]
    value: str
    advice: str = ""

    def line(self) -> str:
        return f"{self.state:<4}  {self.what}: {self.value}" + (f" -> {self.advice}" if self.advice else "")


@dataclass(frozen=True)
class Accelerator:
    """A rank's GPU."""

    name: str
    identity: str  # no other on any host has it
    free: int
    total: int


@dataclass(frozen=True)
class Facts:
    """What a rank found. None: it could not be seen."""

    rank: int
    host: str
    versions: dict[str, str]
    accelerator: Accelerator | None = None
    memory: int | None = None  # bytes of the host's that are left
    open_files: int | None = None
    shared_memory: int | None = None  # bytes free in /dev/shm
    locks: dict[str, float] = field(default_factory=dict)  # in the folder of torch's extensions -> seconds old

    @property
    def where(self) -> str:
        return f"rank {self.rank} on {self.host}"


def facts_here(place: Place, more_versions: dict[str, str]) -> Facts:
    """This rank's. more_versions: what else must be alike on all ranks, by name."""
    return Facts(
        place.rank,
        host_name(),
        versions(place) | more_versions,
        accelerator(place),
        available_memory(),
        resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        free_bytes(Path("/dev/shm")),
        old_locks(Path(environment_with({}).get("TORCH_EXTENSIONS_DIR") or get_default_build_root())),
    )


def host_name() -> str:
    return socket.gethostname()


def versions(place: Place) -> dict[str, str]:
    """Of what decides results, and of what ranks must have alike to understand each other."""
    found = installed_versions() | {"python": platform.python_version()}
    if place.device.type == "cuda":
        found["CUDA"] = str(torch.version.cuda)
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
        text = DRIVER.read_text() if DRIVER.is_file() else ""
        number = re.search(r"\d+\.\d+(\.\d+)?", text)
        found["driver"] = number[0] if number else "unknown"
    return found


def accelerator(place: Place) -> Accelerator | None:
    if place.device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(place.device)
    about = torch.cuda.get_device_properties(place.device)
    return Accelerator(about.name, str(getattr(about, "uuid", f"{host_name()} {place.device}")), free, total)


def available_memory(root: Path = Path("/")) -> int | None:
    """Bytes that processes of this host, or of this job's share of it (a cgroup), can still take; None where the
    system does not tell. What was read from files, and not lately, is let go when it is needed."""
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        left = [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
        groups = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    for group in groups:
        number, kinds, path = group.split(":", 2)
        if number == "0":
            top, limit, used, cache = root / "sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"
        elif "memory" in kinds.split(","):
            top, limit, used = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            cache = "total_inactive_file"
        else:
            continue
        for folder in (here := top / path.lstrip("/"), *here.parents):
            if folder.is_relative_to(top) and (most := _number_in(folder / limit)) is not None:
                taken = (_number_in(folder / used) or 0) - _counted_in(folder / "memory.stat", cache)
                left.append(max(0, most - max(0, taken)))
    return min(left, default=None)


def _number_in(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # no such limit, or "max"
        return None


def _counted_in(path: Path, name: str) -> int:
    """A figure of a cgroup's statistics; 0 where there is none."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith(f"{name} "))


def free_bytes(path: Path) -> int | None:
    """Free on the file system that holds a path, which need not exist yet; None if the system does not tell."""
    try:
        while not path.exists() and path != path.parent:
            path = path.parent
        return shutil.disk_usage(path).free
    except OSError:
        return None


def old_locks(folder: Path) -> dict[str, float]:
    """Locks that somebody holds who builds an extension of torch, or held when he was killed -> seconds old."""
    found = {}
    for path in [*folder.glob("*/lock"), *folder.glob("*/*/lock")]:
        try:
            found[str(path)] = max(0.0, time.time() - path.stat().st_mtime)
        except OSError:  # it was just let go
            continue
    return found


def judge_versions(facts: Sequence[Facts]) -> Finding:
    """All alike, and all there."""
    usual = {}
    for name in dict.fromkeys(name for one in facts for name in one.versions):
        counts = Counter(one.versions.get(name, "unknown") for one in facts)
        usual[name] = counts.most_common(1)[0][0]
        if len(counts) > 1:
            others = [one for one in facts if one.versions.get(name, "unknown") != usual[name]]
            theirs = ", ".join(sorted({one.versions.get(name, "unknown") for one in others}))
            value = f"{name} {theirs} on {_places(others)}, {usual[name]} on the other {len(facts) - len(others)}"
            return Finding("versions", "fix", value, f"give all hosts the same {name}")
    if missing := [name for name in NEEDED if usual.get(name) == "not installed"]:
        return Finding("versions", "fix", f"{', '.join(missing)} not installed", "pip install it on every host")
    told = ", ".join(f"{name} {version}" for name, version in usual.items() if version != "not installed")
    return Finding("versions", "ok", told if len(facts) == 1 else f"{told} on all ranks")


def judge_accelerators(facts: Sequence[Facts], need: int | None) -> Finding:
    """One GPU a rank, with room for what the plan says a rank needs (None: not known)."""
    with_gpu = [one for one in facts if one.accelerator]
    found = [one.accelerator for one in facts if one.accelerator]
    if not found:
        return Finding("accelerators", "ok", "none: it runs on CPUs")
    if len(found) < len(facts):
        missing = [one for one in facts if not one.accelerator]
        return Finding(
            "accelerators", "fix", f"no GPU for {_places(missing)}, though others have one",
            "compare nvidia-smi and CUDA_VISIBLE_DEVICES there with the other hosts",
        )  # fmt: skip
    counts = Counter(gpu.identity for gpu in found)
    if twice := [one for one in with_gpu if one.accelerator and counts[one.accelerator.identity] > 1]:
        advice = "start as many processes on a host as it has GPUs, each with a LOCAL_RANK of its own"
        return Finding("accelerators", "fix", f"{_places(twice)} share a GPU", advice)
    kinds = ", ".join(f"{count} x {name}" for name, count in Counter(gpu.name for gpu in found).items())
    worst = min(with_gpu, key=lambda one: one.accelerator.free if one.accelerator else 0)
    free = min(gpu.free for gpu in found)
    room = int((1 - FRAGMENTS) * free) - LIBRARIES
    told = f"{kinds}, {gigabytes(free)} GB free at least"
    if need is None:
        return Finding("accelerators", "ok", f"{told} (what is needed is not known without a plan)")
    if room < need:
        return Finding(
            "accelerators", "fix", f"{kinds}, {gigabytes(free)} GB free on {worst.where}, of which {gigabytes(room)} "
            f"for tensors; {gigabytes(need)} planned",
            "end what else runs there (nvidia-smi), or ask `smalti plan` what would fit",
        )  # fmt: skip
    return Finding("accelerators", "ok", f"{told}, {gigabytes(need)} planned")


def judge_memory(facts: Sequence[Facts], need: int | None) -> Finding:
    """What the ranks of each host need together, against what is left there."""
    by_host: dict[str, list[Facts]] = {}
    for one in facts:
        by_host.setdefault(one.host, []).append(one)
    if any(one.memory is None for one in facts):
        return Finding("host memory", "skip", "this system does not tell how much is left")
    left = {host: min(one.memory or 0 for one in here) for host, here in by_host.items()}
    if need is None:
        least = gigabytes(min(left.values()))
        return Finding("host memory", "ok", f"{least} GB left at least (what is needed is not known without a plan)")
    for host, here in by_host.items():
        if left[host] < need * len(here):
            value = f"{gigabytes(left[host])} GB left on {host}; {gigabytes(need * len(here))} planned"
            advice = "fewer ranks or parts of a batch there (accumulate), or end what else runs"
            return Finding("host memory", "fix", f"{value} for its {len(here)} ranks", advice)
    host = min(by_host, key=lambda name: left[name] - need * len(by_host[name]))
    planned = f"{gigabytes(need * len(by_host[host]))} planned for {len(by_host[host])} ranks"
    return Finding("host memory", "ok", f"{gigabytes(left[host])} GB left on {host}, {planned}")


def judge_open_files(facts: Sequence[Facts], need: int) -> Finding:
    limits = [(math.inf if one.open_files in (None, resource.RLIM_INFINITY) else one.open_files, one) for one in facts]
    least, worst = min(limits, key=lambda pair: pair[0] or 0)
    if least is not None and least < need:
        value = f"{least:.0f} on {worst.where}; {need} may be needed"
        return Finding("open files", "fix", value, f"ulimit -n {max(need, 65_536)} before the launch, on every host")
    return Finding("open files", "ok", f"{least or 0:.0f} allowed at least, {need} may be needed")


def judge_shared_memory(facts: Sequence[Facts]) -> Finding:
    """GPUs of a host that have no other way to each other meet in /dev/shm."""
    known = [one for one in facts if one.shared_memory is not None]
    if len(known) < len(facts):
        return Finding("/dev/shm", "skip", "there is none on every host")
    worst = min(known, key=lambda one: one.shared_memory or 0)
    least = worst.shared_memory or 0
    together = Counter(one.host for one in facts if one.accelerator)
    if max(together.values(), default=0) > 1 and least < GPU_SHARED_MEMORY:
        advice = "give the container more: --shm-size=1g (docker), or mount a larger tmpfs"
        return Finding("/dev/shm", "fix", f"{gigabytes(least)} GB free on {worst.host}", advice)
    return Finding("/dev/shm", "ok", f"{gigabytes(least)} GB free at least")


def judge_locks(facts: Sequence[Facts]) -> Finding:
    """A process that is killed while it compiles leaves its lock, and all that come later wait for it for ever."""
    for one in facts:
        for path, seconds in one.locks.items():
            value = f"{path} on {one.host} is {seconds / 60:.0f} minutes old"
            return Finding("extensions", "fix", value, f"rm {path} there, unless something is being compiled just now")
    return Finding("extensions", "ok", "no lock is left in torch's folder of extensions")


def ranks_in_words(ranks: Iterable[int]) -> str:
    """Ascending ranks, with runs as 2-5."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    text = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
    return ("rank " if len(runs) == 1 and runs[0][0] == runs[0][1] else "ranks ") + text


def gigabytes(n_bytes: float) -> str:
    """10^9 bytes, with two digits behind the point where they matter."""
    return f"{n_bytes / 1e9:,.2f}" if n_bytes < 1e10 else f"{n_bytes / 1e9:,.1f}"


def _places(facts: Sequence[Facts]) -> str:
    hosts = list(dict.fromkeys(one.host for one in facts))
    named = ", ".join(hosts[:8]) + (f" and {len(hosts) - 8} more hosts" if len(hosts) > 8 else "")
    return f"{ranks_in_words(one.rank for one in facts)} ({named})"
