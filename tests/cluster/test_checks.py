"""What is made of what ranks found about their machines, and why a rank could not join; without any other process."""

import os
import resource
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster import checks_together
from cluster.checks import (
    GIB,
    Accelerator,
    Facts,
    Finding,
    available_memory,
    facts_here,
    free_bytes,
    judge_accelerators,
    judge_locks,
    judge_memory,
    judge_open_files,
    judge_shared_memory,
    judge_versions,
    old_locks,
    ranks_in_words,
)
from cluster.checks_together import judge_bandwidth, shared_folder, why_apart
from cluster.process import Launched, Place

VERSIONS = {"torch": "2.13.0", "deepspeed": "0.19.8", "numpy": "2.4.6", "sentencepiece": "0.2.3"}


def ranks(count: int = 4, per_host: int = 2, **of_all: Any) -> list[Facts]:
    return [Facts(rank, f"node{rank // per_host}", VERSIONS, **of_all) for rank in range(count)]


def gpus(free: int = 70 * GIB) -> list[Facts]:
    return [replace(one, accelerator=Accelerator("H100", f"gpu {one.rank}", free, 80 * GIB)) for one in ranks()]


def test_a_finding_is_a_line_that_says_what_to_do() -> None:
    assert Finding("disk", "ok", "9 GB free").line() == "ok    disk: 9 GB free"
    assert Finding("disk", "fix", "1 GB free", "make room").line() == "fix   disk: 1 GB free -> make room"


def test_what_a_rank_finds_here_is_judged_well(place: Place) -> None:
    facts = [facts_here(place, {"code": "1"})]
    assert judge_versions(facts).state == "ok" and "code 1" in judge_versions(facts).value
    assert judge_memory(facts, 1).state == ("ok" if facts[0].memory else "skip")
    assert judge_memory(facts, 2**60).state == ("fix" if facts[0].memory else "skip")


def test_one_rank_with_another_version_is_named() -> None:
    facts = ranks()
    assert judge_versions(facts).state == "ok"
    facts[2] = replace(facts[2], versions=VERSIONS | {"deepspeed": "0.19.6"})
    found = judge_versions(facts)
    assert found.state == "fix" and found.value == "deepspeed 0.19.6 on rank 2 (node1), 0.19.8 on the other 3"
    facts[2] = replace(facts[2], versions={"torch": "2.13.0"})
    assert judge_versions(facts).value.startswith("deepspeed unknown on rank 2")


def test_what_is_installed_nowhere_is_named() -> None:
    found = judge_versions([replace(one, versions=VERSIONS | {"deepspeed": "not installed"}) for one in ranks()])
    assert found.state == "fix" and "deepspeed not installed" in found.value


def test_a_rank_without_a_gpu_or_with_anothers_is_named() -> None:
    assert judge_accelerators(ranks(), 10).state == "ok"
    assert judge_accelerators(gpus(), 60 * GIB).state == "ok"
    lacking = gpus()
    lacking[3] = replace(lacking[3], accelerator=None)
    assert "rank 3 (node1)" in judge_accelerators(lacking, 1).value
    shared = gpus()
    shared[1] = replace(shared[1], accelerator=shared[0].accelerator)
    assert "ranks 0-1 (node0) share" in judge_accelerators(shared, 1).value


def test_a_gpu_with_too_little_room_is_named_and_libraries_have_their_part() -> None:
    crowded = gpus()
    crowded[2] = replace(crowded[2], accelerator=Accelerator("H100", "gpu 2", 50 * GIB, 80 * GIB))
    found = judge_accelerators(crowded, 60 * GIB)
    assert found.state == "fix" and "rank 2 on node1" in found.value
    assert judge_accelerators(gpus(64 * GIB), 61 * GIB).state == "ok"
    assert judge_accelerators(gpus(64 * GIB), 62 * GIB).state == "fix"  # though 62.08 are left of it without fragments
    assert judge_accelerators(crowded, None).state == "ok"


def test_the_ranks_of_a_host_share_its_memory() -> None:
    facts = ranks(memory=100)
    assert judge_memory(facts, 50).state == "ok"
    assert "node0" in judge_memory(facts, 51).value and judge_memory(facts, 51).state == "fix"
    facts[3] = replace(facts[3], memory=99)
    assert "node1" in judge_memory(facts, 50).value
    facts[3] = replace(facts[3], memory=None)
    assert judge_memory(facts, 1).state == "skip"


def test_memory_that_is_left_is_that_of_the_jobs_share(tmp_path: Path) -> None:
    """A cgroup limits all that are below it, whichever version of cgroups there is; cached files are not lost to it."""

    def write(path: str, text: str) -> None:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)

    assert available_memory(tmp_path) is None
    write("proc/meminfo", "MemTotal: 900 kB\nMemAvailable:  700 kB\n")
    write("proc/self/cgroup", "0::/job/step\n")
    assert available_memory(tmp_path) == 700 * 1024
    write("sys/fs/cgroup/job/step/memory.max", "max\n")
    write("sys/fs/cgroup/job/memory.max", "5000\n")
    write("sys/fs/cgroup/job/memory.current", "1000\n")
    assert available_memory(tmp_path) == 4000
    write("sys/fs/cgroup/job/memory.stat", "file 900\ninactive_file 600\nactive_file 300\n")
    assert available_memory(tmp_path) == 4600
    write("proc/self/cgroup", "9:cpu:/x\n4:memory:/job1\n")
    write("sys/fs/cgroup/memory/job1/memory.limit_in_bytes", "3000\n")
    assert available_memory(tmp_path) == 3000
    write("sys/fs/cgroup/memory/job1/memory.usage_in_bytes", "2000\n")
    write("sys/fs/cgroup/memory/job1/memory.stat", "inactive_file 10\ntotal_inactive_file 1500\n")
    assert available_memory(tmp_path) == 2500


def test_limits_below_what_is_needed_are_named() -> None:
    facts = ranks(open_files=1024)
    assert judge_open_files(facts, 1024).state == "ok"
    assert judge_open_files(facts, 1025).state == "fix"
    assert judge_open_files(ranks(open_files=resource.RLIM_INFINITY), 1025).state == "ok"
    small = [replace(one, shared_memory=64 * 2**20) for one in gpus()]
    assert judge_shared_memory(small).state == "fix"
    assert judge_shared_memory(ranks(shared_memory=64 * 2**20)).state == "ok"  # only GPUs meet there
    assert judge_shared_memory(ranks()).state == "skip"


def test_a_lock_that_was_left_is_named_with_its_age(tmp_path: Path) -> None:
    facts = ranks(1)
    assert judge_locks(facts).state == "ok" and old_locks(tmp_path / "nowhere") == {}
    lock = tmp_path / "py311_cpu" / "cpu_adam" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    os.utime(lock, (0, lock.stat().st_mtime - 600))
    found = judge_locks([replace(facts[0], locks=old_locks(tmp_path))])
    assert found.state == "fix" and f"{lock} on node0 is 10 minutes old" in found.value


def test_room_is_looked_for_where_a_folder_will_be(tmp_path: Path) -> None:
    assert free_bytes(tmp_path / "a" / "b") == free_bytes(tmp_path) != 0


def test_runs_of_ranks_are_short() -> None:
    assert ranks_in_words([4, 2, 3, 7]) == "ranks 2-4, 7" and ranks_in_words([5]) == "rank 5"


@pytest.fixture
def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        number: int = free.getsockname()[1]
        return number


def apart(launched: Launched, said: str) -> str:
    found = why_apart(launched, "node1", 5.0, said)
    return found.line() if found else ""


def test_a_rank_that_stands_apart_says_address_and_port(port: int) -> None:
    here = Launched(1, 4, 1, 4, "127.0.0.1", port)
    late = f"rank 1 did not reach rank 0: timed out after 4000ms while trying to connect to (127.0.0.1, {port})"
    assert f"nobody listens at 127.0.0.1 port {port}" in apart(here, late)
    assert "no.such.host has no address" in apart(replace(here, address="no.such.host.invalid"), late).replace(
        ".invalid", ""
    )
    assert "nobody said where" in apart(replace(here, address=""), late)
    assert "is taken" in apart(replace(here, rank=0), f"port {port} of 127.0.0.1 is taken, by another job perhaps")
    assert "not all 4 ranks came in 5 s (1/4 clients joined)" in apart(
        replace(here, rank=0), "Timed out after 5 seconds waiting for clients. 1/4 clients joined."
    )


def test_a_rank_that_reaches_rank_0_leaves_it_to_that_one_or_blames_the_network(port: int) -> None:
    here = Launched(1, 4, 1, 4, "127.0.0.1", port)
    with socket.create_server(("127.0.0.1", port)):
        assert apart(here, "The client socket has timed out") == ""
        assert "GLOO_SOCKET_IFNAME" in apart(here, "Gloo connectFullMesh failed")


def test_an_address_that_does_not_answer_is_no_way(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(*where: Any) -> socket.socket:
        raise TimeoutError("timed out")

    monkeypatch.setattr(socket, "create_connection", lost)
    told = apart(Launched(1, 4, 1, 4, "127.0.0.1", port), "timed out")
    assert f"no way to 127.0.0.1 port {port} (timed out)" in told and "firewall" in told


def test_a_folder_that_can_be_written_is_left_as_it_was(tmp_path: Path, place: Place) -> None:
    assert shared_folder(place, tmp_path / "a" / "b", ["here"]).state == "ok"
    assert not list(tmp_path.iterdir())
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "kept").touch()
    assert shared_folder(place, tmp_path / "run", ["here"]).state == "ok"
    assert [path.name for path in tmp_path.rglob("*")] == ["run", "kept"]


def test_a_folder_that_cannot_be_made_or_written_is_named(
    tmp_path: Path, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    found = shared_folder(place, tmp_path / "file" / "run", ["here"])
    assert found.state == "fix" and "Not a directory" in found.value and "out=DIR" in found.advice

    def full(path: Path, text: str) -> None:
        path.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checks_together, "_write", full)
    found = shared_folder(place, tmp_path / "new" / "run", ["here"])
    assert found.state == "fix" and "No space left" in found.value
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_link_is_held_against_what_the_plan_assumes() -> None:
    hosts = ["node0", "node0", "node1", "node1"]
    rates = {"all-gather": [100.0, 90.0, 80.0, 95.0], "all-reduce": [70.0] * 4}
    inside, across = [[0, 1], [0, 1], [2, 3], [2, 3]], [[0, 2], [1, 3], [0, 2], [1, 3]]

    def judged(groups: list[list[int]], assumed: tuple[float, float] | None) -> Finding:
        return judge_bandwidth("bandwidth", rates, 2, groups, hosts, assumed)

    assert judged(inside, None).state == "ok" and "on a host" in judged(inside, None).value
    assert judged(inside, (160.0, 0.0)).state == "ok"
    slow = judged(inside, (161.0, 0.0))
    assert slow.state == "fix" and "slowest: rank 2 on node1" in slow.value
    assert judged(across, (1e9, 320.0)).state == "ok" and "across hosts" in judged(across, None).value
    assert judged(across, (0.0, 321.0)).state == "fix"  # two rings share the way out of a host
    flat = [list(range(4))] * 4
    assert judged(flat, (0.0, 160.0)).state == "ok" and judged(flat, (0.0, 161.0)).state == "fix"  # one ring has it


def test_a_network_that_is_not_there_is_told_with_the_variables_that_name_it() -> None:
    said = "rank 0 cannot connect to the others: Unable to find address for: eth9; see GLOO_SOCKET_IFNAME"
    found = why_apart(Launched(0, 2, 0, 2, "127.0.0.1", 4711), "node0", 0.1, said)
    assert found is not None and found.state == "fix"
    assert found.value == "rank 0 on node0: cannot connect to the others: Unable to find address for: eth9"
    assert "GLOO_SOCKET_IFNAME" in found.advice
