"""Start a program on the hosts of a hostfile with DeepSpeed's launcher over pdsh, and watch over the connections.

DeepSpeed alone waits for ever when a host is lost, and kills what it is told to stop (both tried). Here a broken
connection is noticed, the host is named and the job ended; a signal reaches the ranks, which save.
"""

import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from signal import SIGINT, SIGKILL, Signals
from threading import Thread
from typing import IO

from cluster.hostfile import chosen_slots, read_hostfile
from cluster.launch import PLANNED, MeetingConfig, Program, exit_code, record
from cluster.launch_local import POLL_SECONDS, heard
from cluster.manifest import write_bytes
from cluster.process import LAUNCH, PORTS, environment_with
from cluster.settings import SettingError, UserError, setting

ALIVE_QUESTIONS = 3  # without an answer: the connection is broken
SSH_SECONDS = 30.0  # for one short command on a host
END_SECONDS = 60.0  # for the other hosts to end by themselves, when one has failed
PASSED_NAMES = (  # beginnings of names that the processes need as they are here; DeepSpeed adds PYTHON...
    "NCCL_", "GLOO_", "TORCH_", "OMP_", "MKL_", "TRITON_", "DS_", "LD_LIBRARY_PATH",
)  # fmt: skip
PLAIN = re.compile(r"[\w@+=:,./-]*")  # what neither a shell nor pdsh reads as anything else
NOT_PASSED = ("DS_ENV_FILE",)  # where DeepSpeed finds the file that we write
BROKEN = re.compile(r"pdsh@\S+: (\S+): ssh exited with exit code (\d+)")
SSH_FAILED = 255  # ssh(1): an error of the connection, not the command's code


@dataclass(frozen=True)
class HostfileConfig(MeetingConfig):
    """A launch on several hosts over ssh."""

    hostfile: str = setting("hostfile", "DeepSpeed's: a line `node1 slots=8` per host")
    include: str = setting("", "hosts and slots to use, as node1@node2:0,2; empty: all")
    exclude: str = setting("", "hosts and slots to leave out")
    address: str = setting("", "of the first host, as the others reach it; empty: the first that it names itself")
    env: str = setting("", "more variables for the processes, NAME or NAME=VALUE with commas between; no secrets")
    ssh_port: int = setting(0, "of all hosts; 0: ssh's own settings")
    lost_after_seconds: int = setting(45, "a host that is silent for so long is lost, and the job is ended")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.ssh_port < 2**16:
            raise SettingError(f"ssh_port={self.ssh_port} must be from 1 to {2**16 - 1}, or 0")
        if self.lost_after_seconds < ALIVE_QUESTIONS:
            raise SettingError(f"lost_after_seconds={self.lost_after_seconds} must be at least {ALIVE_QUESTIONS}")
        for one in self.named():
            if not re.fullmatch(r"[A-Za-z_]\w*(=.*)?", one):
                raise SettingError(f"env: {one!r} must be NAME or NAME=VALUE")

    def named(self) -> list[str]:
        """The parts of `env`."""
        return [part.strip() for part in self.env.split(",") if part.strip()]

    @property
    def ssh_words(self) -> list[str]:
        """For every ssh: it ends when the host is silent."""
        every = self.lost_after_seconds // ALIVE_QUESTIONS
        alive = (f"ServerAliveInterval={every}", f"ServerAliveCountMax={ALIVE_QUESTIONS}", "ConnectTimeout=10")
        return [word for option in alive for word in ("-o", option)]

    def slots(self) -> dict[str, list[int]]:
        """Hosts and slots to use. SettingError as `read_hostfile` and `chosen_slots` raise it."""
        return chosen_slots(read_hostfile(Path(self.hostfile)), self.include, self.exclude)

    def without(self, hosts: list[str]) -> str:
        """The word for the same launch without these hosts."""
        chosen = (self.include or self.exclude).split("@")
        kept = [part for part in chosen if part and part.partition(":")[0] not in hosts]
        return f"include={'@'.join(kept)}" if self.include else f"exclude={'@'.join([*kept, *hosts])}"


def launch_hosts(config: HostfileConfig, program: Program) -> int:
    """Run the program on all chosen slots; its exit code. UserError naming the hosts that do not answer."""
    slots = config.slots()
    program.refuse_company(sum(len(numbers) for numbers in slots.values()))
    port = config.port or random.choice(PORTS)
    mark = f"{time.time_ns():x}"  # of this launch's processes
    lines = environment_lines(config, mark)
    command = deepspeed_command(config, program, port)
    names = [line.partition("=")[0] for line in lines]
    appended = " ".join([*config.ssh_words, environment_with({}).get("PDSH_SSH_ARGS_APPEND", "")]).strip()
    if config.dry_run:
        hosts_told = ", ".join(f"{host}: {len(numbers)}" for host, numbers in slots.items())
        print(f"on {hosts_told}, each with these variables, which stand in FILE with their values:")
        print("".join(f"    {name}\n" for name in names), end="")
        print(f"DS_ENV_FILE=FILE PDSH_SSH_ARGS_APPEND={shlex.quote(appended)} {shlex.join(command)}")
        return 0
    if not shutil.which("pdsh"):
        raise UserError("there is no command pdsh here, which DeepSpeed's launcher needs: install the package pdsh")
    port_words = ["-p", str(config.ssh_port)] if config.ssh_port else []
    hosts = Hosts(list(slots), ["-o", "BatchMode=yes", *config.ssh_words, *port_words], mark)
    if silent := hosts.silent():
        raise UserError(f"no ssh connection to {', '.join(silent)}; try `ssh {silent[0]} true`, which must not ask")
    if folder := record(program, replace(config, env=",".join(part.partition("=")[0] for part in config.named()))):
        write_bytes(folder / "environment.txt", "".join(f"{name}\n" for name in names).encode())
    with tempfile.TemporaryDirectory() as private:  # values may be secret, and a run folder is for others to read
        file = Path(private).resolve() / "environment"
        write_bytes(file, "".join(f"{line}\n" for line in lines).encode())
        changes = {"DS_ENV_FILE": str(file), "PDSH_SSH_ARGS_APPEND": appended}
        return Watched(command, environment_with(changes), hosts, config).run()


def deepspeed_command(config: HostfileConfig, program: Program, port: int) -> list[str]:
    """DeepSpeed's launcher, with the words as the hosts' shells must read them.

    SettingError for what it would put into a shell's line as it is, and a shell would read otherwise.
    """
    unquoted = {"this folder": str(Path.cwd()), "this Python": sys.executable, "address": config.address}
    for name, text in unquoted.items():
        if not PLAIN.fullmatch(text):
            raise SettingError(f"{name}, {text!r}, has characters that DeepSpeed's launcher cannot pass to a host")
    options = {"include": config.include, "exclude": config.exclude, "master_addr": config.address}
    options |= {"ssh_port": str(config.ssh_port or "")}
    return [
        sys.executable, "-u", "-m", "deepspeed.launcher.runner", f"--hostfile={config.hostfile}",
        f"--master_port={port}", *(f"--{name}={value}" for name, value in options.items() if value),
        "--launcher=pdsh", "--force_multi", "--no_ssh_check", "--no_local_rank", "--log_level=warning",
        "--module", program.module, *(for_remote_shell(word) for word in program.words),
    ]  # fmt: skip


def for_remote_shell(word: str) -> str:
    """A word as DeepSpeed's pdsh launcher must get it, which puts words with a space between double quotes, with a
    backslash before those inside, and leaves the others to the shell as they are; pdsh reads %% as %."""
    word = word.replace("%", "%%")
    if " " in word:
        return re.sub(r"[\\$`]", r"\\\g<0>", word)
    return word if re.fullmatch(r"[\w@%+=:,./-]+", word) else "'" + word.replace("'", "'\"'\"'") + "'"


def environment_lines(config: HostfileConfig, mark: str) -> list[str]:
    """What DeepSpeed gives the processes beside PYTHON...: the user's own .deepspeed_env first, and then ours."""
    here = environment_with({})
    own = [Path(here["DS_ENV_FILE"])] if here.get("DS_ENV_FILE") else []
    lines = [line for path in own or (Path.home() / ".deepspeed_env", Path(".deepspeed_env")) for line in _lines(path)]
    values = {name: value for name, value in here.items() if name.startswith(PASSED_NAMES) and name not in NOT_PASSED}
    for part in config.named():
        name, equals, value = part.partition("=")
        if not equals and name not in here:
            raise SettingError(f"env: {name} has no value here")
        values[name] = value if equals else here[name]
    values |= config.timeout | {LAUNCH: mark}
    return lines + [f"{name}={_escaped(name, value)}" for name, value in values.items()]


def _lines(path: Path) -> list[str]:
    """Of an environment file. SettingError naming the line that would end DeepSpeed with a traceback."""
    if not path.is_file():
        return []
    lines = [line for line in path.read_text().splitlines() if line.strip()]
    for line in lines:
        if "=" not in line:
            raise SettingError(f"{path}: {line!r} must be NAME=VALUE")
    return lines


def _escaped(name: str, value: str) -> str:
    """A value as DeepSpeed writes it between double quotes in a shell's line."""
    if not value.isprintable():
        raise SettingError(f"env: the value of {name} must be one line")
    return re.sub(r"[\\\"$`]", r"\\\g<0>", value).replace("%", "%%")


@dataclass
class Hosts:
    """The hosts of a launch, reached by ssh."""

    names: list[str]
    ssh_words: list[str]
    mark: str

    def ask(self, host: str, script: str) -> bool:
        """Run a shell's line on a host; False if ssh does not get there or the line fails."""
        words = ["ssh", *self.ssh_words, host, script]
        try:
            done = subprocess.run(
                words, stdin=subprocess.DEVNULL, capture_output=True, timeout=SSH_SECONDS, check=False
            )
        except subprocess.TimeoutExpired:
            return False
        return done.returncode == 0

    def ask_all(self, hosts: list[str], script: str) -> dict[str, bool]:
        """The same on several at once."""
        with ThreadPoolExecutor(max_workers=64) as pool:
            return dict(zip(hosts, pool.map(lambda host: self.ask(host, script), hosts), strict=True))

    def silent(self) -> list[str]:
        """Those that do not answer."""
        return [host for host, answers in self.ask_all(self.names, "true").items() if not answers]

    def tell_ranks(self, interrupt: bool) -> bool:
        """Tell the first host's ranks to save and end; theirs is the word for all. SIGUSR1, as DeepSpeed sends SIGTERM
        to the other ranks of a host when one has ended, and a rank ends at once when it gets the same signal twice."""
        signal = "INT" if interrupt else "USR1"
        return self.ask(self.names[0], _kill_script(self.mark, signal, only_ranks=True))

    def end(self, hosts: list[str]) -> None:
        """Kill what this launch runs on these hosts."""
        self.ask_all(hosts, _kill_script(self.mark, "KILL", only_ranks=False))


def _kill_script(mark: str, signal: str, only_ranks: bool) -> str:
    """A shell's line that finds the processes of a launch by what stands in their environment."""
    its_own = "grep -qsz '^RANK=' $f && " if only_ranks else ""
    found = f"$(grep -slz '^{LAUNCH}={mark}$' /proc/[0-9]*/environ)"
    return f"for f in {found}; do p=${{f#/proc/}}; {its_own}kill -{signal} ${{p%/environ}}; done; true"


@dataclass
class Watched:
    """DeepSpeed's launcher, in a session of its own, until all its hosts have ended."""

    command: list[str]
    environment: dict[str, str]
    hosts: Hosts
    config: HostfileConfig
    ended: list[tuple[str, int]] = field(default_factory=list)  # hosts that failed, and their codes, in order
    told: list[Signals] = field(default_factory=list)  # signals, in order

    def run(self) -> int:
        """The exit code. UserError naming a host that was lost."""
        with heard(self.told.append):
            process = subprocess.Popen(
                self.command, env=self.environment, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE,
                start_new_session=True,
            )  # fmt: skip
            assert process.stderr
            listener = Thread(target=self._listen, args=(process.stderr,), daemon=True)
            try:
                listener.start()
                self._watch(process)
            finally:
                if process.poll() is None:
                    self.hosts.end(self.hosts.names)
                    os.killpg(process.pid, SIGKILL)
                    process.wait()
        listener.join(SSH_SECONDS)
        if process.returncode < 0:
            return 128 - process.returncode
        return exit_code(code for _, code in self.ended) or process.returncode  # which is 0 where pdsh was killed

    def _listen(self, stream: IO[bytes]) -> None:
        """Show what the hosts and pdsh say, and note which hosts pdsh says have failed."""
        for raw in stream:
            line = raw.decode(errors="replace")
            with suppress(OSError):  # the terminal may have been closed
                sys.stderr.write(line)
                sys.stderr.flush()
            if found := BROKEN.search(line):
                self.ended.append((found[1], int(found[2])))

    def _watch(self, process: subprocess.Popen[bytes]) -> None:
        until, obeyed = float("inf"), 0
        while process.poll() is None:
            while len(self.told) > obeyed:  # the first tells the ranks, and the same one again ends all
                if self.told[obeyed] in self.told[:obeyed]:
                    self.hosts.end(self.hosts.names)
                elif not obeyed:
                    self.hosts.tell_ranks(interrupt=self.told[0] == SIGINT)
                obeyed += 1
            failed = [(host, code) for host, code in self.ended if code not in PLANNED]
            if lost := [host for host, code in failed if code == SSH_FAILED]:
                self._lost(process, lost[0])
            if failed:
                until = min(until, time.monotonic() + END_SECONDS)
            if time.monotonic() > until:
                self.hosts.end(self.hosts.names)
                until = time.monotonic() + END_SECONDS
            time.sleep(POLL_SECONDS)

    def _lost(self, process: subprocess.Popen[bytes], host: str) -> None:
        """End the others, which would wait for it for long, and say which it is: raises UserError."""
        silent = self.hosts.silent()
        self.hosts.end([name for name in self.hosts.names if name not in silent])
        with suppress(subprocess.TimeoutExpired):
            process.wait(END_SECONDS)
        if not silent:
            raise UserError(f"the connection to {host} broke, though it answers now: the same command goes on")
        if len(silent) == len(self.hosts.names):
            raise UserError(
                "no host answers any more: is it the network of this machine? The processes may still run there; when "
                "they have ended, the same command goes on from the last checkpoint"
            )
        raise UserError(
            f"host {', '.join(silent)} does not answer any more, so the others were ended; the same command with "
            f"{self.config.without(silent)} goes on from the last checkpoint"
        )
