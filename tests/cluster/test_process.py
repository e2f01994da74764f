"""Where a process finds its place: the launchers' variables, SLURM's, and what it says when it is left alone."""

import os
import socket
import subprocess
import sys

import pytest
import torch

from cluster.process import (
    LAUNCH,
    PORTS,
    TIMEOUT,
    Launched,
    Place,
    environment_with,
    first_host,
    launched_rank,
    read_launch,
    share_cores,
    tasks_per_node,
)
from cluster.settings import UserError

TORCHRUN = {
    "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29400",
}  # fmt: skip
SRUN = {
    "SLURM_PROCID": "4", "SLURM_LOCALID": "0", "SLURM_NODEID": "2", "SLURM_STEP_NUM_TASKS": "5",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),1", "SLURM_STEP_NODELIST": "node[01-02,7]", "SLURM_JOB_ID": "1234",
    "SLURM_STEP_ID": "0", "SLURM_NTASKS": "5",
}  # fmt: skip
MEET = """
import sys
from cluster.process import gathered, joined_place
from cluster.settings import UserError
try:
    with joined_place() as place:
        print(gathered(place, place.rank), place.rank)
except UserError as error:
    sys.exit(str(error))
"""


def met(code: str = MEET, words: tuple[str, ...] = (), **variables: str) -> subprocess.Popen[str]:
    """A process that joins its group with these variables, prints the ranks and its own, or says why not."""
    environment = {"PATH": "", "PYTHONPATH": ":".join(sys.path), "OMP_NUM_THREADS": "1"} | variables
    return subprocess.Popen(
        [sys.executable, "-c", code, *words], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def test_without_a_launcher_there_is_one_process() -> None:
    assert read_launch({}) == Launched(0, 1, 0, 1, "", 0)


def test_torchruns_variables_are_read() -> None:
    assert read_launch(TORCHRUN) == Launched(5, 8, 1, 4, "10.0.0.1", 29400)


def test_what_is_read_is_written_the_same() -> None:
    assert read_launch(TORCHRUN).variables() == TORCHRUN


def test_deepspeed_says_local_size() -> None:
    """It names the processes of a host LOCAL_SIZE: four hosts of one process each must not share a host's cores."""
    deepspeed = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "LOCAL_SIZE": "1"}
    assert read_launch(deepspeed).local_world_size == 1
    assert read_launch({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "3"}).local_world_size == 4


def test_srun_gives_the_place_of_each_task() -> None:
    assert read_launch(SRUN) == Launched(4, 5, 0, 1, "node01", PORTS[7 * 1234 % len(PORTS)])
    other = SRUN | {"SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_NODEID": "0"}
    assert read_launch(other) == Launched(1, 5, 1, 2, "node01", PORTS[7 * 1234 % len(PORTS)])


def test_address_and_port_that_a_job_script_exports_count() -> None:
    said = read_launch(SRUN | {"MASTER_ADDR": "10.0.0.9", "MASTER_PORT": "4000"})
    assert (said.address, said.port) == ("10.0.0.9", 4000)


def test_the_steps_of_a_job_meet_at_different_ports() -> None:
    ports = {read_launch(SRUN | {"SLURM_STEP_ID": str(step)}).port for step in range(5)}
    assert len(ports) == 5
    assert ports <= set(PORTS)


def test_slurms_variables_that_leak_into_a_launchers_workers_do_not_count() -> None:
    assert read_launch(SRUN | TORCHRUN) == read_launch(TORCHRUN)


@pytest.mark.parametrize("left_out", ["SLURM_STEP_NUM_TASKS", "SLURM_PROCID"])
def test_a_batch_script_is_no_step_of_several_tasks(left_out: str) -> None:
    """It has SLURM_PROCID=0 and SLURM_NTASKS=5, but is one process."""
    assert read_launch({name: value for name, value in SRUN.items() if name != left_out}) == Launched()


def test_a_step_of_one_task_is_one_process() -> None:
    assert read_launch(SRUN | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}) == Launched()


@pytest.mark.parametrize(
    ("text", "counts"), [("2(x3),1", [2, 2, 2, 1]), ("4", [4]), ("1,2,1(x2)", [1, 2, 1, 1]), ("8(x128)", [8] * 128)]
)
def test_run_lengths_are_spelt_out(text: str, counts: list[int]) -> None:
    assert tasks_per_node(text) == counts


@pytest.mark.parametrize(
    ("text", "host"),
    [
        ("node01", "node01"), ("node[01-04,7],x1", "node01"), ("a-1.b,c", "a-1.b"), ("n[7,9]", "n7"),
        ("r[1-2]n[03-04]", "r1n03"), ("n[2-3]-ib,m1", "n2-ib"),
    ],
)  # fmt: skip
def test_the_first_host_of_a_folded_list(text: str, host: str) -> None:
    assert first_host(text) == host


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK='x' must be a whole number"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 must be below WORLD_SIZE=2"),
        ({"RANK": "1"}, "RANK=1 must be below WORLD_SIZE=1"),
        (SRUN | {"SLURM_STEP_NODELIST": ""}, "names no host"),
        (SRUN | {"SLURM_STEP_NODELIST": "n[1-2"}, "names no host"),
        (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "2(x2"}, "must look like"),
        (SRUN | {"SLURM_NODEID": "3"}, "SLURM_NODEID=3 is none of the 3 nodes"),
    ],
)
def test_variables_that_make_no_sense_are_named(changes: dict[str, str], told: str) -> None:
    with pytest.raises(UserError) as caught:
        read_launch(changes)
    assert told in str(caught.value)


def test_the_rank_of_an_error_line_is_known_before_any_group(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SRUN.items():
        monkeypatch.setenv(name, value)
    assert launched_rank() == 4
    monkeypatch.setenv("RANK", "many")
    assert launched_rank() == 0


def test_an_environment_for_others_is_a_changed_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEPT", "1")
    changed = environment_with({LAUNCH: "mark"})
    assert (changed["KEPT"], changed[LAUNCH]) == ("1", "mark")
    assert LAUNCH not in environment_with({})


def test_two_tasks_of_srun_meet_and_the_first_to_come_waits() -> None:
    step = {
        "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_NODEID": "0", "SLURM_JOB_ID": "7",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
    }  # fmt: skip
    late = met(**step, SLURM_PROCID="1", SLURM_LOCALID="1")  # nobody listens yet
    first = met(**step, SLURM_PROCID="0", SLURM_LOCALID="0")
    said = [one.communicate(timeout=120) for one in (first, late)]
    assert [out for out, _ in said] == ["[0, 1] 0\n", "[0, 1] 1\n"], said


@pytest.mark.parametrize(
    ("rank", "told"), [("0", "the 2 processes did not all reach rank 0 at 127.0.0.1"), ("1", "rank 1 did not reach")]
)
def test_who_comes_alone_gives_up_after_the_launchers_time(rank: str, told: str) -> None:
    alone = {"RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    process = met(**alone, **{TIMEOUT: "0.02"})
    _, error = process.communicate(timeout=120)
    assert process.returncode == 1
    assert error.splitlines()[-1].startswith(told), error


def test_a_port_that_is_taken_is_named() -> None:
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = str(other.getsockname()[1])
        process = met(RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        _, error = process.communicate(timeout=120)
    assert error.splitlines()[-1] == f"port {port} of 127.0.0.1 is taken, by another job perhaps; choose another"


@pytest.mark.parametrize("text", ["soon", "0", "-1", "nan", "inf"])
def test_a_time_that_is_none_is_refused(text: str) -> None:
    process = met(**{TIMEOUT: text})
    _, error = process.communicate(timeout=120)
    assert error == f"environment variable {TIMEOUT}={text!r} must be a number above 0\n"


def test_a_network_interface_that_is_not_there_is_one_line_on_every_rank() -> None:
    """The ranks meet at the store, and only then does gloo look for its interface."""
    pair = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), TIMEOUT: "1"}
    both = [met(RANK=rank, **pair, GLOO_SOCKET_IFNAME="no-such0") for rank in ("0", "1")]
    for rank, error in enumerate([one.communicate(timeout=120)[1] for one in both]):
        line = error.splitlines()[-1]
        assert "Traceback" not in error
        assert line.startswith(f"rank {rank} ") and "Unable to find address for: no-such0" in line
        assert "GLOO_SOCKET_IFNAME" in line and "NCCL_SOCKET_IFNAME" in line


SHARE = """
import os, sys, torch
from unittest.mock import patch
from cluster.process import gathered, joined_place, share_cores
with joined_place() as place:
    for hosts, masks in eval(sys.argv[1]):
        cores = patch.object(os, "sched_getaffinity", lambda _: set(masks[place.rank]))
        with cores, patch("socket.gethostname", lambda: hosts[place.rank]):
            share_cores(place)
        print(gathered(place, torch.get_num_threads()), end=" ")
"""


def test_ranks_divide_the_cores_that_they_have_in_common() -> None:
    cases = [
        ("aa", (range(8), range(8)), [4, 4]),  # torchrun binds nobody
        ("aa", (range(4), range(4, 8)), [4, 4]),  # srun may give each its own
        ("ab", (range(8), range(8)), [8, 8]),
        ("aa", (range(8), range(2)), [4, 1]),
        ("aa", ([0], [0]), [1, 1]),
    ]
    pair = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    words = (repr([case[:2] for case in cases]),)
    both = [met(RANK=rank, **pair, code=SHARE, words=words) for rank in ("0", "1")]
    said = [one.communicate(timeout=120) for one in both]
    assert [out for out, _ in said] == ["".join(f"{threads} " for *_, threads in cases)] * 2, said


def test_a_process_without_company_has_all_its_cores(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 5})
    before = torch.get_num_threads()
    try:
        share_cores(place)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_several_processes_without_an_address_say_so() -> None:
    process = met(RANK="0", WORLD_SIZE="2")
    _, error = process.communicate(timeout=120)
    assert error.startswith("MASTER_ADDR and MASTER_PORT must say where rank 0 listens")
