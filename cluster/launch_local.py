"""Start a program in several processes on this machine, pass signals on to them, and end as they end.

torchrun ends with 1 whatever its workers ended with, and the `deepspeed` command that is told to stop leaves its
workers behind (both tried): a job script could not tell "saved, start again" (75) from a failure.
"""

import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType

import torch.distributed as dist

from cluster.launch import PLANNED, MeetingConfig, Program, exit_code, record
from cluster.process import Launched, environment_with, n_accelerators
from cluster.settings import SettingError, UserError, setting
from cluster.watch import SIGNALS

HERE = "127.0.0.1"
HEARD = (*SIGNALS, signal.SIGHUP)
POLL_SECONDS = 0.2
LAST_WORDS_SECONDS = 15.0  # for the others to say what they lost, when one has failed


@dataclass(frozen=True)
class LocalConfig(MeetingConfig):
    """A launch on this machine."""

    processes: int = setting(0, "processes; 0: one per GPU, or 1")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.processes < 0:
            raise SettingError(f"processes={self.processes} must be at least 0")


def launch_local(config: LocalConfig, program: Program) -> int:
    """Run the program in `processes` processes; its exit code. UserError if the port is taken."""
    gpus = n_accelerators()
    count = config.processes or (gpus if program.together else 0) or 1
    program.refuse_company(count)
    if gpus and count > gpus:
        raise SettingError(f"processes={count} must be at most the {gpus} GPUs that are here")
    if config.dry_run:
        print(f"{count} processes" + ("" if config.port else "; a free port takes the place of MASTER_PORT=0"))
        for environment in environments(config, count, config.port):
            print(" ".join(f"{name}={value}" for name, value in environment.items()), shlex.join(program.command()))
        return 0
    store = _meeting_place(config.port)
    record(program, config)
    return run_processes(program.command(), environments(config, count, store.port))


def environments(config: LocalConfig, count: int, port: int) -> list[dict[str, str]]:
    """What each process finds in its environment beside ours. This process keeps the store that they meet at."""
    shared = config.timeout | {"TORCHELASTIC_USE_AGENT_STORE": "True"}
    return [Launched(rank, count, rank, count, HERE, port).variables() | shared for rank in range(count)]


def _meeting_place(port: int) -> dist.TCPStore:
    """A store of ours that the processes meet at: its port cannot be taken between our choice and their start."""
    try:
        return dist.TCPStore(HERE, port, is_master=True, wait_for_workers=False)
    except dist.DistNetworkError as error:
        if "EADDRINUSE" in str(error):
            raise UserError(f"port={port} is taken by another process; leave it 0 for a free one") from None
        raise UserError(f"port={port}: {str(error).splitlines()[0]}") from None


def run_processes(command: list[str], environments: list[dict[str, str]]) -> int:
    """Run a command once per environment, each in a session of its own, so that a signal reaches it through us alone.

    When one fails, the others have a while to end by themselves; none is left behind, nor is what they started.
    Returns the exit code.
    """
    processes: list[subprocess.Popen[bytes]] = []
    codes: list[int] = []

    def pass_on(number: signal.Signals) -> None:
        for process in processes:
            if process.returncode is None:  # not poll(): it may be what the signal interrupted
                with suppress(ProcessLookupError):
                    process.send_signal(number)

    try:
        with heard(pass_on):
            for environment in environments:
                processes.append(
                    subprocess.Popen(
                        command, env=environment_with(environment), stdin=subprocess.DEVNULL, start_new_session=True
                    )
                )
            _wait(processes, codes)
    finally:
        for process in processes:
            if process.returncode is None:  # not poll(): one that has just ended may have left workers
                _end_session(process)
                process.wait()
    return exit_code(codes)


def _wait(processes: list[subprocess.Popen[bytes]], codes: list[int]) -> None:
    """Until all have ended, or the time is over that the others have after a failure; `codes` in order of the ends."""
    running = list(processes)
    until = float("inf")
    while running and time.monotonic() < until:
        for process in [one for one in running if one.poll() is not None]:
            running.remove(process)
            _end_session(process)
            codes.append(process.returncode)
            if process.returncode not in (0, *PLANNED):
                until = min(until, time.monotonic() + LAST_WORDS_SECONDS)
        time.sleep(POLL_SECONDS)


def _end_session(process: subprocess.Popen[bytes]) -> None:
    """Kill a process that leads a session, if it still runs, and the workers that it has, or left behind."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


@contextmanager
def heard(act: Callable[[signal.Signals], None]) -> Iterator[None]:
    """Call `act` with each signal to pass on; what a closed terminal sends is heard as SIGTERM, unless under nohup.

    It is heard once: the kernel sends it, and so does a shell, but a rank that gets a signal twice ends at once.
    """

    def hear(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
            number = signal.SIGTERM
        act(signal.Signals(number))

    under_nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    before = {number: signal.signal(number, hear) for number in HEARD if number != signal.SIGHUP or not under_nohup}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
