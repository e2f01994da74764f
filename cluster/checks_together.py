"""What the processes of a job can only find out together before a launch: do they meet, is a folder the same to all, do
clocks agree, and how fast are the links. The three that take a `place` are collective, and rank 0's answer counts.
"""

import contextlib
import errno
import os
import secrets
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from cluster.checks import Finding, ranks_in_words
from cluster.process import Launched, Place, gathered, wait_for_all
from cluster.topology import Topology, take_seat

PATIENCE_SECONDS = 10.0  # until a file that one host wrote is seen by the others; NFS keeps old lists for seconds
MOST_SKEW_SECONDS = 1.0  # logs, file times and SLURM's limits are compared between hosts: more confuses people
PROBE_SECONDS = 3.0
ROUNDS = 5  # of which the best counts: the first ones open connections
SLOW = 0.5  # of what is assumed of a link: below it something is wrong, not only noisy

OUT = "out"
NAME_THE_NETWORK = "name the network that joins the hosts: GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME"
ONE_FOLDER = "it must be one folder on a file system that all hosts share"


def why_apart(launched: Launched, host: str, seconds: float, said: str) -> Finding | None:
    """Why a rank of this host could not join the others, after it failed to; said: torch's words.

    None if others will tell it better: this one reached rank 0.
    """
    where = f"{launched.address} port {launched.port}"

    def broken(value: str, advice: str) -> Finding:
        return Finding("rendezvous", "fix", f"rank {launched.rank} on {host}: {value}", advice)

    if not launched.address or not launched.port:
        advice = "export MASTER_ADDR and MASTER_PORT, or start it with smalti launch, torchrun or deepspeed"
        return broken("nobody said where to meet", advice)
    if "is taken" in said:
        return broken(f"port {launched.port} is taken there by another program", "choose another MASTER_PORT")
    if "cannot connect to the others" in said:
        said = said[said.index("cannot") :].partition("; see ")[0]
        return broken(said, NAME_THE_NETWORK)
    if launched.rank == 0:
        came = said.rpartition(". ")[2] if "clients joined" in said else said
        return broken(
            f"at {where} not all {launched.world_size} ranks came in {seconds:.0f} s ({came.rstrip('.')})",
            "see the lines of the others; of those that say nothing, whether they were started at all",
        )
    try:
        socket.getaddrinfo(launched.address, launched.port, type=socket.SOCK_STREAM)
    except OSError as error:
        advice = "mend DNS or the hosts file there, or give an IP address as MASTER_ADDR"
        return broken(f"{launched.address} has no address ({error.strerror})", advice)
    try:
        socket.create_connection((launched.address, launched.port), PROBE_SECONDS).close()
    except ConnectionRefusedError:
        advice = "start rank 0 there at the same time; is MASTER_ADDR its host, and MASTER_PORT the same for all?"
        return broken(f"nobody listens at {where}", advice)
    except OSError as error:
        advice = f"open port {launched.port} in the firewall, or name an address of rank 0 that {host} reaches"
        return broken(f"no way to {where} ({_words_of(error)})", advice)
    if "clients joined" in said or "timed out" in said.lower():
        return None
    return broken(
        f"it reaches {where}, but not the other ranks ({said})",
        NAME_THE_NETWORK,
    )


def shared_folder(place: Place, folder: Path, hosts: Sequence[str]) -> Finding:
    """Can all ranks write into a folder, and is it the same one? Leaves nothing behind."""
    nonce = gathered(place, secrets.token_hex(8))[0]
    made: list[Path] = []
    own = folder / f".doctor-{nonce}-{place.rank}"
    try:
        problem = ""
        if place.is_main:
            problem = _attempt(lambda: made.extend(_make(folder))) or _attempt(lambda: _write(own, nonce))
        if told := gathered(place, problem)[0]:
            value = f"{folder} on {hosts[0]}: {told}"
            return Finding(OUT, "fix", value, "name a folder that you may write to: out=DIR")
        if not place.is_main:
            problem = _sees(folder, [f".doctor-{nonce}-0"], nonce) or _attempt(lambda: _write(own, nonce))
        problems = gathered(place, problem)
        if bad := [rank for rank, text in enumerate(problems) if text]:
            value = f"{folder} on {ranks_in_words(bad)} ({hosts[bad[0]]}): {problems[bad[0]]}"
            return Finding(OUT, "fix", value, f"{ONE_FOLDER} and may write to")
        names = [f".doctor-{nonce}-{rank}" for rank in range(place.world_size)]
        missing = gathered(place, _sees(folder, names, nonce) if place.is_main else "")[0]
        if missing:
            value = f"{folder} on {hosts[0]}: {missing}, which another rank wrote"
            return Finding(OUT, "fix", value, ONE_FOLDER)
        seen = "" if place.world_size == 1 else f", and what each of {place.world_size} ranks writes there is seen"
        return Finding(OUT, "ok", f"{folder} can be written{seen}")
    finally:
        with contextlib.suppress(OSError):
            own.unlink(missing_ok=True)
        with contextlib.suppress(RuntimeError):  # a rank is lost: it cleans for itself
            wait_for_all(place)
        _clear(folder, nonce, made)


def clocks(place: Place, hosts: Sequence[str], now: Callable[[], float] = time.time) -> Finding:
    """How far the clock of each host is from that of rank 0: asked for the time, it answers between two looks here."""
    firsts = [rank for rank, host in enumerate(hosts) if rank and hosts.index(host) == rank]
    if not firsts:
        return Finding("clocks", "skip", "all ranks are on one host")
    ahead: dict[int, tuple[float, float]] = {}
    for rank in firsts:
        for _ in range(ROUNDS):
            if place.is_main:
                ahead[rank] = min(ahead.get(rank, (0.0, float("inf"))), _ask(place, rank, now), key=lambda one: one[1])
            elif place.rank == rank:
                _answer(place, now)
    if not place.is_main:
        return Finding("clocks", "ok", "")
    worst = max(firsts, key=lambda rank: abs(ahead[rank][0]))
    seconds, doubt = ahead[worst]
    if abs(seconds) - doubt > MOST_SKEW_SECONDS:
        value = f"{hosts[worst]} is {abs(seconds):,.1f} s {'ahead of' if seconds > 0 else 'behind'} {hosts[0]}"
        return Finding("clocks", "fix", value, "let NTP set the clock there: timedatectl set-ntp true")
    told = f"at most {1000 * abs(seconds):.1f} ms apart on {len(firsts) + 1} hosts (+- {1000 * doubt:.1f})"
    return Finding("clocks", "ok", told)


def bandwidths(
    place: Place, topology: Topology, hosts: Sequence[str], assumed: tuple[float, float] | None, n_bytes: int
) -> list[Finding]:
    """GB/s that each rank sends in an all-gather and an all-reduce among the ranks that share a copy of the state, and
    among those that hold the same part of it; all groups at once, as in training.

    assumed: of a rank inside its host, and of a whole host to the others; None: nothing is.
    """
    if place.world_size == 1:
        return [Finding("bandwidth", "skip", "one rank sends nothing")]
    found, seat = [], take_seat(topology, place.rank)
    for what, group, size, members in (
        ("bandwidth of shards", seat.shard_group, topology.shard_size, topology.shard_ranks),
        ("bandwidth of replicas", seat.replica_group, topology.n_replicas, topology.replica_ranks),
    ):
        if group is not None:
            rates = _measured(place, group, size, n_bytes)
            groups = [members(rank) for rank in range(topology.world_size)]
            found.append(judge_bandwidth(what, rates, size, groups, hosts, assumed))
    return found


def judge_bandwidth(
    what: str,
    rates: dict[str, list[float]],
    size: int,
    groups: Sequence[Sequence[int]],
    hosts: Sequence[str],
    assumed: tuple[float, float] | None,
) -> Finding:
    """rates: GB/s of each rank, by kind; groups: of each rank those that it was measured with."""
    slowest = {kind: min(values) for kind, values in rates.items()}
    crosses = any(hosts[rank] != hosts[group[0]] for group in groups for rank in group)
    told = ", ".join(f"{rate:,.2f} GB/s a rank in an {kind}" for kind, rate in slowest.items())
    value = f"{told}, among {size} {'across hosts' if crosses else 'on a host'}"
    if assumed is None:
        return Finding(what, "ok", f"{value} (the plan assumes nothing of these devices)")
    want = assumed[1] / _rings(groups, hosts) if crosses else assumed[0]
    value = f"{value} (the plan assumes {want:,.2f})"
    if max(slowest.values()) >= SLOW * want:
        return Finding(what, "ok", value)
    kind = max(slowest, key=lambda name: slowest[name])
    rank = min(range(len(hosts)), key=lambda one: rates[kind][one])
    return Finding(
        what, "fix", f"{value}; slowest: rank {rank} on {hosts[rank]}",
        "see with NCCL_DEBUG=INFO which way is taken, or plan with intra_gb_s and inter_gb_s as they are",
    )  # fmt: skip


def _rings(groups: Sequence[Sequence[int]], hosts: Sequence[str]) -> int:
    """Groups that share the way out of a host, at most."""
    return max(len({tuple(groups[rank]) for rank in range(len(hosts)) if hosts[rank] == host}) for host in set(hosts))


def _measured(place: Place, group: dist.ProcessGroup, size: int, n_bytes: int) -> dict[str, list[float]]:
    """By the ring's formulas: of S bytes an all-gather sends S (n - 1) / n from each rank, an all-reduce twice that."""
    whole = torch.zeros(n_bytes // 4 // size * size, device=place.device)
    part = torch.zeros(len(whole) // size, device=place.device)
    sent = 4 * len(whole) * (size - 1) / size
    gather = _best(place, lambda: dist.all_gather_single(whole, part, group))
    reduce = _best(place, lambda: dist.all_reduce(whole, group=group))
    rates = {"all-gather": sent / gather / 1e9, "all-reduce": 2 * sent / reduce / 1e9}
    return {kind: gathered(place, rate) for kind, rate in rates.items()}


def _best(place: Place, work: Callable[[], object]) -> float:
    """Seconds of the best of a few rounds that all ranks begin together."""
    best = float("inf")
    for _ in range(ROUNDS):
        wait_for_all(place)
        _finish(place)
        begun = time.perf_counter()
        work()
        _finish(place)
        best = min(best, time.perf_counter() - begun)
    return best


def _finish(place: Place) -> None:
    if place.device.type == "cuda":
        torch.cuda.synchronize(place.device)


def _ask(place: Place, rank: int, now: Callable[[], float]) -> tuple[float, float]:
    """Seconds by which that rank's clock is ahead of this one's, and the most by which that may be wrong."""
    theirs = torch.zeros((), dtype=torch.float64, device=place.device)
    before, begun = now(), time.perf_counter()
    dist.send(theirs, rank)
    dist.recv(theirs, rank)
    answer = theirs.item()
    way = (time.perf_counter() - begun) / 2
    return answer - (before + way), way


def _answer(place: Place, now: Callable[[], float]) -> None:
    asked = torch.zeros((), dtype=torch.float64, device=place.device)
    dist.recv(asked, 0)
    asked.item()  # it has come
    dist.send(torch.tensor(now(), dtype=torch.float64, device=place.device), 0)


def _make(folder: Path) -> list[Path]:
    """Make a folder; the folders that were made for it, innermost first."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def _write(path: Path, text: str) -> None:
    path.write_text(text)


def _sees(folder: Path, names: Sequence[str], text: str) -> str:
    """Wait until files are there, with this text; what is wrong, if anything."""
    until = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            missing = set(names) - set(os.listdir(folder))  # a list, which a shared file system answers afresh
            missing |= {name for name in names if name not in missing and (folder / name).read_text() != text}
        except OSError as error:
            if error.errno != errno.ENOENT:
                return _words_of(error)
            missing = set(names)
        if not missing:
            return ""
        if time.monotonic() > until:
            return f"it does not see {min(missing)} in {PATIENCE_SECONDS:.0f} s"
        time.sleep(0.05)


def _attempt(work: Callable[[], object]) -> str:
    try:
        work()
    except OSError as error:
        return _words_of(error)
    return ""


def _words_of(error: OSError) -> str:
    return error.strerror or str(error) or type(error).__name__


def _clear(folder: Path, nonce: str, made: Sequence[Path]) -> None:
    """Rank 0 made what it now removes; the others have made nothing."""
    with contextlib.suppress(OSError):
        if made:
            for path in folder.glob(f".doctor-{nonce}-*"):
                path.unlink(missing_ok=True)
        for path in made:
            path.rmdir()
