"""A SLURM job that runs a verb: its script, and how it is submitted.

The script needs nothing of ours but the program itself: `sbatch SCRIPT` runs it as it stands. Before its time limit it
lets the program save, and queues itself again. Logs lie in FOLDER/logs, by job and by rank.
"""

import json
import re
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass, fields
from pathlib import Path

from cluster.manifest import write_bytes
from cluster.settings import SettingError, UserError, require_at_least_one, setting

TEMPLATE = Path(__file__).parent / "job.sh"
JOBS = "jobs.jsonl"  # in a folder: every job submitted for it
WAIT_SECONDS = 600  # that srun waits for the other ranks when one has ended, before it ends them
SBATCH_SECONDS = 60.0  # for the controller to answer
NAME = re.compile(r"[\w.-]+")
DURATION = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d{1,2}))?(?::(\d{1,2}))?")  # what sbatch takes as --time
MEMORY = re.compile(r"\d+[KMGT]?")
DIRECTIVE = re.compile(r"(?:#SBATCH\s+)?(-.+)")


@dataclass(frozen=True)
class SlurmConfig:
    """What a job asks SLURM for. Empty and 0: the cluster's own default."""

    partition: str = setting("", "queue")
    account: str = setting("", "who pays")
    qos: str = setting("", "quality of service")
    constraint: str = setting("", "features that nodes must have, as a100&nvlink")
    time: str = setting("24:00:00", "limit of one start: MINUTES, HH:MM:SS or DAYS-HH:MM:SS")
    nodes: int = setting(1, "machines")
    gpus_per_node: int = setting(0, "GPUs of each machine")
    processes_per_node: int = setting(0, "processes on each machine; 0: one per GPU, or 1")
    cpus_per_process: int = setting(0, "cores of each process")
    memory: str = setting("", "of each machine, as 64G")
    container: str = setting("", "image for srun --container-image, as pyxis has it")
    srun: str = setting("", "more words for srun, as --container-mounts=/data")
    setup: str = setting("", "shell lines before the program, as 'module load cuda', or a file FILE.sh with such lines")
    extra: str = setting("", "more #SBATCH lines with ; between, as '--mail-type=END; --exclusive'")
    python: str = setting("", "Python of the nodes; empty: the one that runs this, or the container's")
    signal_seconds: int = setting(120, "before its time limit a job is told to save")
    requeue: bool = setting(True, "a job that was stopped, or lost a node, queues again")
    restarts: int = setting(100, "times a job queues itself again")

    def __post_init__(self) -> None:
        require_at_least_one(self, ("nodes", "signal_seconds"))
        for name in ("gpus_per_node", "processes_per_node", "cpus_per_process", "restarts"):
            if getattr(self, name) < 0:
                raise SettingError(f"{name}={getattr(self, name)} must be at least 0")
        for name in (one.name for one in fields(self)):
            value = getattr(self, name)
            if isinstance(value, str) and name != "setup" and not value.isprintable():
                raise SettingError(f"{name}={value!r} must be one line")
        limit = seconds_of(self.time)
        if 0 < limit <= self.signal_seconds:
            raise SettingError(
                f"signal_seconds={self.signal_seconds} must be below the time limit, time={self.time!r} ({limit} s)"
            )
        if self.memory and not MEMORY.fullmatch(self.memory):
            raise SettingError(f"memory={self.memory!r} must be a whole number and K, M, G or T, as 64G")
        if self.setup.endswith(".sh") and not Path(self.setup).is_file():
            raise SettingError(f"setup={self.setup!r}: there is no such file")
        for name in ("srun", "extra"):
            words_of(name, getattr(self, name))
        self.extra_directives()

    def extra_directives(self) -> list[str]:
        """The words of each further #SBATCH line. SettingError if one is no option."""
        lines = [line.strip() for line in self.extra.split(";") if line.strip()]
        found = [DIRECTIVE.fullmatch(line) for line in lines]
        if None in found:
            raise SettingError(f"extra: {lines[found.index(None)]!r} is no option of sbatch; it should begin with --")
        return [match[1] for match in found if match]

    @property
    def n_processes(self) -> int:
        """On each machine."""
        return self.processes_per_node or self.gpus_per_node or 1

    @property
    def interpreter(self) -> str:
        return self.python or ("python" if self.container else sys.executable)

    @property
    def setup_lines(self) -> str:
        return Path(self.setup).read_text().rstrip() if self.setup.endswith(".sh") else self.setup


@dataclass(frozen=True)
class Job:
    """`python -m MODULE words` on the nodes that `config` asks for."""

    name: str
    module: str
    words: list[str]
    folder: Path  # its script, its logs and the record of its jobs lie here
    config: SlurmConfig
    array: int = 0  # tasks, each given tasks=ARRAY task=ITS_NUMBER; 0: a job without tasks
    after: tuple[str, ...] = ()  # ids of jobs that must have ended well before

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name):
            raise SettingError(f"a job's name has letters, digits, '.', '_' and '-', not {self.name!r}")
        if not str(self.folder).isprintable():  # what came behind a line break would be run
            raise SettingError(f"a job's folder must be one line of printable characters, not {str(self.folder)!r}")

    @property
    def path(self) -> Path:
        """Where its script is written."""
        return self.folder / "scripts" / f"{self.name}.sh"


def script(job: Job) -> str:
    """The job's bash script."""
    parts = {
        "directives": "\n".join(f"#SBATCH {line}" for line in directives(job)),
        "setup": job.config.setup_lines,
        "command": command(job),
        "restarts": str(job.config.restarts if job.config.requeue else 0),
    }
    return re.sub(r"@(\w+)@", lambda match: parts[match[1]], TEMPLATE.read_text())


def directives(job: Job) -> list[str]:
    """What stands behind #SBATCH, line by line."""
    config = job.config
    asked = {
        "job-name": job.name,
        "output": f"{log_name(job)}.log",
        "open-mode": "append",
        "partition": config.partition,
        "account": config.account,
        "qos": config.qos,
        "constraint": config.constraint,
        "time": config.time,
        "nodes": str(config.nodes),
        "ntasks-per-node": str(config.n_processes),
        "gpus-per-node": str(config.gpus_per_node or ""),
        "cpus-per-task": str(config.cpus_per_process or ""),
        "mem": config.memory,
        "signal": f"B:USR1@{config.signal_seconds}",
        "array": f"0-{job.array - 1}" if job.array else "",
        "dependency": f"afterok:{':'.join(job.after)}" if job.after else "",
        "kill-on-invalid-dep": "yes" if job.after else "",
    }
    given = [f"--{name}={shlex.quote(value)}" for name, value in asked.items() if value]
    return [*given, "--requeue" if config.requeue else "--no-requeue", *config.extra_directives()]


def command(job: Job) -> str:
    """The line that runs the program on all nodes. A rank's end ends no other: they may be saving."""
    config = job.config
    words = [
        "srun", "--kill-on-bad-exit=0", f"--wait={WAIT_SECONDS}", "--open-mode=append",
        f"--output={log_name(job)}-%t.log",
    ]  # fmt: skip
    words += [f"--cpus-per-task={config.cpus_per_process}"] if config.cpus_per_process else []  # it does not inherit it
    words += [f"--container-image={config.container}"] if config.container else []
    words += words_of("srun", config.srun)
    words += [config.interpreter, "-m", job.module, *job.words]
    task = f' tasks={job.array} task="$SLURM_ARRAY_TASK_ID"' if job.array else ""
    return shlex.join(words) + task


def log_name(job: Job) -> str:
    """Path of a job's logs up to the rank, as SLURM writes patterns."""
    folder = str(job.folder / "logs").replace("%", "%%")
    return f"{folder}/{job.name}-{'%A_%a' if job.array else '%j'}"


def write_script(job: Job) -> Path:
    """Write it, and make the folder of its logs, without which SLURM would lose them."""
    for folder in (job.path.parent, job.folder / "logs"):
        folder.mkdir(parents=True, exist_ok=True)
    write_bytes(job.path, script(job).encode())
    return job.path


def submit(job: Job) -> str:
    """Give the job to SLURM; its id. UserError in SLURM's own words if it is refused."""
    number = ask_slurm(["sbatch", "--parsable", str(write_script(job))]).strip().split(";")[0]
    with open(job.folder / JOBS, "a") as file:
        file.write(json.dumps({"job": number, "name": job.name, "array": job.array, "time": time.time()}) + "\n")
    return number


def ask_slurm(words: list[str]) -> str:
    """What a command of SLURM prints. UserError if there is no such command, or it fails."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=SBATCH_SECONDS, check=False)
    except FileNotFoundError:
        raise UserError(f"there is no command {words[0]} here: run this on a login node of a SLURM cluster") from None
    except subprocess.TimeoutExpired:
        raise UserError(f"{words[0]} gave no answer in {SBATCH_SECONDS:.0f} s; is slurmctld up?") from None
    if done.returncode:
        said = " ".join(line.strip() for line in done.stderr.splitlines() if line.strip())
        raise UserError(said or f"{words[0]} ended with code {done.returncode}")
    return done.stdout


def seconds_of(limit: str) -> int:
    """Seconds of a time limit as sbatch reads it; 0 is no limit. SettingError if it is none."""
    match = DURATION.fullmatch(limit)
    if not match:
        raise SettingError(f"time={limit!r} must be MINUTES, HH:MM:SS or DAYS-HH:MM:SS")
    days, *rest = match.groups()
    numbers = [int(part) for part in rest if part is not None]
    if days is not None:  # DAYS-HOURS, DAYS-HOURS:MINUTES, DAYS-HOURS:MINUTES:SECONDS
        hours, minutes, seconds = (numbers + [0, 0])[:3]
    elif len(numbers) == 3:
        hours, minutes, seconds = numbers
    else:  # MINUTES, MINUTES:SECONDS
        hours, (minutes, seconds) = 0, (numbers + [0])[:2]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def words_of(name: str, text: str) -> list[str]:
    """A setting's words. SettingError if a quote is left open."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise SettingError(f"{name}={text!r}: {str(error).lower()}") from None
