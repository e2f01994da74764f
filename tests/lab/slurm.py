"""The claims about SLURM, on a real SLURM: several nodes on this host, gone at the end. Run by `make lab`, as root.

    python -m tests.lab.slurm

Needs the packages slurm-wlm and munge. Nothing in /etc or /var is touched: keys, sockets, configuration and ports are
of one temporary folder. One line a claim, with seconds; exit code 1 if one fails. About 10 minutes on 2 CPU cores.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime
from pathlib import Path
from types import FrameType

ROOT = Path(__file__).resolve().parents[2]
NODES, CPUS = 3, 2
NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol", "scancel")
UP_SECONDS, COMMAND_SECONDS = 30.0, 120.0
POLL_SECONDS = 0.5

# proctrack, task: without cgroups, which a container may not have. MinJobAge: ended jobs are asked for to the end.
CONF = """
ClusterName=lab
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={at}/munge.sock
CredType=cred/munge
SlurmctldPort={port}
SlurmctldPidFile={at}/slurmctld.pid
SlurmdPidFile={at}/slurmd.%n.pid
StateSaveLocation={at}/state
SlurmdSpoolDir={at}/spool.%n
SlurmctldLogFile={at}/slurmctld.log
SlurmdLogFile={at}/slurmd.%n.log
SwitchType=switch/none
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=20
MinJobAge=7200
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=1
"""
NODE = (
    "NodeName=n{number} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={cpus} Boards=1 SocketsPerBoard=1 "
    "CoresPerSocket={cpus} ThreadsPerCore=1 RealMemory=4000 State=UNKNOWN\n"
)


MADE = ("data/images", "data/vocab", "runs/dvae", "data/tokens", "runs/train", "runs/scorer", "samples", "ranked")


class Failed(Exception):
    """A claim that does not hold."""


@contextmanager
def slurm() -> Iterator[dict[str, str]]:
    """A cluster of NODES nodes; the environment in which its commands find it."""
    with ExitStack() as stack:
        at = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="slurm-lab-")))
        (at / "munge.key").write_bytes(os.urandom(128))
        (at / "munge.key").chmod(0o600)
        (at / "state").mkdir()
        host, ports = socket.gethostname().split(".")[0], free_ports(NODES + 1)
        conf = CONF.format(at=at, host=host, port=ports[0])
        for number in range(1, NODES + 1):
            conf += NODE.format(number=number, host=host, port=ports[number], cpus=CPUS)
        conf += f"PartitionName=main Nodes=n[1-{NODES}] Default=YES MaxTime=INFINITE State=UP\n"
        (at / "slurm.conf").write_text(conf)
        paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = os.environ | {"SLURM_CONF": str(at / "slurm.conf"), "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
        munge = ["munged", "--foreground", "--force", f"--key-file={at / 'munge.key'}", f"--socket={at / 'munge.sock'}"]
        munge += [f"--pid-file={at / 'munged.pid'}", f"--log-file={at / 'munged.log'}", f"--seed-file={at / 'seed'}"]
        stack.enter_context(daemon(munge, environment, at))
        wait_until(lambda: (at / "munge.sock").exists(), "munged", UP_SECONDS)
        stack.enter_context(daemon(["slurmctld", "-D", "-c"], environment, at))
        for number in range(1, NODES + 1):
            stack.enter_context(daemon(["slurmd", "-D", "-N", f"n{number}"], environment, at))
        stack.callback(end_all_jobs, environment)
        wait_until(lambda: idle_nodes(environment) == NODES, "idle nodes", UP_SECONDS)
        yield environment


@contextmanager
def daemon(command: list[str], environment: dict[str, str], at: Path) -> Iterator[None]:
    """A process in the foreground of a session of its own, until the end."""
    with open(at / f"{Path(command[0]).name}.out", "ab") as log:
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def ask(command: list[str], environment: dict[str, str]) -> str:
    """What a command prints. Failed if it fails."""
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=COMMAND_SECONDS, check=False
    )
    if done.returncode:
        raise Failed(f"{' '.join(command)} ended with {done.returncode}: {done.stdout[-500:]}{done.stderr[-1500:]}")
    return done.stdout


def smalti(words: list[str], environment: dict[str, str]) -> str:
    return ask([sys.executable, "-m", "pretrain.cli", *words], environment)


def idle_nodes(environment: dict[str, str]) -> int:
    done = subprocess.run(
        ["sinfo", "--noheader", "--states=idle", "--format=%D"],
        env=environment, capture_output=True, text=True, timeout=COMMAND_SECONDS, check=False,
    )  # fmt: skip
    return sum(int(line) for line in done.stdout.split())


def end_all_jobs(environment: dict[str, str]) -> None:
    """No process of a job outlives the cluster."""
    ask(["scancel", "--user=root", "--signal=KILL", "--full"], environment)
    ask(["scancel", "--user=root"], environment)
    wait_until(lambda: not ask(["squeue", "--noheader"], environment), "end of all jobs", 60)


def wait_until(condition: Callable[[], object], what: str, seconds: float) -> None:
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            raise Failed(f"no {what} in {seconds:.0f} s")
        time.sleep(POLL_SECONDS)


def jobs_of(folder: Path) -> dict[str, str]:
    """Name -> id of the jobs submitted last for a pipeline's folder."""
    lines = (folder / "jobs.jsonl").read_text().splitlines()
    return {record["name"]: record["job"] for record in map(json.loads, lines)}


def states_of(folder: Path, environment: dict[str, str]) -> dict[str, list[str]]:
    """Name -> states of its job or tasks. A job that waits two minutes after it queued itself again is let go on.

    Not in the second of its end: a node starts no job again whose credential was taken back in the same second.
    """
    jobs = jobs_of(folder)
    words = ["squeue", "--noheader", "--array", "--states=all", f"--jobs={','.join(jobs.values())}"]
    rows = [line.strip().split("|") for line in ask([*words, "--format=%F|%i|%T|%r|%S"], environment).splitlines()]
    for _, number, _, reason, starts in rows:
        if reason == "BeginTime" and starts[:1].isdigit():
            held = datetime.fromisoformat(starts) - datetime.now()
            if held.total_seconds() > 10:
                ask(["scontrol", "update", f"JobId={number}", "StartTime=now+3"], environment)
    return {name: [row[2] for row in rows if row[0] == number] for name, number in jobs.items()}


def wait_for_jobs(folder: Path, environment: dict[str, str], seconds: float) -> dict[str, list[str]]:
    """Until none waits or runs; their states."""
    alive, found = {"PENDING", "RUNNING", "COMPLETING", "CONFIGURING"}, {}

    def over() -> bool:
        found.clear()
        found.update(states_of(folder, environment))
        return not any(alive & set(states) for states in found.values())

    wait_until(over, f"end of the jobs in {folder}", seconds)
    return dict(found)


def require_completed(folder: Path, states: dict[str, list[str]]) -> None:
    bad = {name: state for name, state in states.items() if set(state) != {"COMPLETED"}}
    if bad:
        logs = sorted((folder / "logs").glob(f"{next(iter(bad))}-*"))
        tails = "\n".join(f"--- {path}\n{path.read_text()[-1500:]}" for path in logs)
        raise Failed(f"jobs did not complete: {bad}\n{tails}")


def fingerprint(folder: Path) -> str:
    return json.loads((folder / "manifest.json").read_text())["fingerprint"]


def write_settings(path: Path, sections: dict[str, dict[str, object]]) -> str:
    lines = []
    for name, values in sections.items():
        lines += [f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in values.items()), ""]
    path.write_text("\n".join(lines))
    return str(path)


def whole_pipeline(at: Path, environment: dict[str, str]) -> str:
    """`smalti pipeline slurm emoji` runs everything, training on two nodes"""
    folder = at / "whole"
    words = ["emoji", f"folder={folder}", "train.nodes=2", "train.processes_per_node=1"]
    smalti(["pipeline", "slurm", *words], environment)
    states = wait_for_jobs(folder, environment, 1500)
    require_completed(folder, states)
    for name in (
        "data/images",
        "data/vocab",
        "runs/dvae",
        "data/tokens",
        "runs/train",
        "runs/scorer",
        "samples",
        "ranked",
    ):
        fingerprint(folder / name)
    pictures = len(list((folder / "ranked").glob("*/*.png")))
    if not pictures:
        raise Failed("no picture was ranked")
    return f"{sum(map(len, states.values()))} jobs completed, {pictures} pictures ranked"


def time_limit(at: Path, environment: dict[str, str]) -> str:
    """A job that reaches its time limit saves, queues itself again, and ends with the weights of one without limit"""
    data, step = at / "whole" / "data", seconds_a_step(at / "whole" / "runs" / "train")
    n_steps = max(50, round(100 / step))  # more than fits between the start of a job and its signal
    base = (
        f"emoji tokens={data}/tokens vocab={data}/vocab n_steps={n_steps} save_every={n_steps} evaluate_every={n_steps}"
    )
    starts = {}
    for name, limit in (("limited", "2"), ("unlimited", "60")):
        folder = at / name
        slurm = {"time": limit, "signal_seconds": 45, "processes_per_node": 2}
        words = {"words": f"{base} out={folder}/run"}
        settings = write_settings(at / f"{name}.toml", {"slurm": slurm, "train": words})
        smalti(["pipeline", "slurm", settings, f"folder={folder}"], environment)
        require_completed(folder, wait_for_jobs(folder, environment, 1200))
        log = "".join(path.read_text() for path in (folder / "logs").glob("train-*.log"))
        starts[name] = log.count(" starts on ")
    if starts["limited"] < 2 or starts["unlimited"] != 1:
        raise Failed(f"starts of the two jobs: {starts}")
    for name in ("model.safetensors", "ledger.jsonl"):
        if (at / "limited/run" / name).read_bytes() != (at / "unlimited/run" / name).read_bytes():
            raise Failed(f"{name} differs")
    return f"{n_steps} steps, {starts['limited']} starts; model.safetensors and ledger.jsonl equal, byte for byte"


def told_to_end(at: Path, environment: dict[str, str]) -> str:
    """A job whose script gets SIGTERM saves, ends with 75, and is not queued again"""
    data, folder = at / "whole" / "data", at / "told"
    words = f"emoji tokens={data}/tokens vocab={data}/vocab n_steps=100000 save_every=100000 out={folder}/run"
    slurm = {"time": "30", "processes_per_node": 2}
    settings = write_settings(at / "told.toml", {"slurm": slurm, "train": {"words": words}})
    smalti(["pipeline", "slurm", settings, f"folder={folder}"], environment)
    metrics = folder / "run" / "metrics.jsonl"
    wait_until(lambda: metrics.is_file() and metrics.stat().st_size, "first steps", 300)
    ask(["scancel", "--batch", "--signal=TERM", jobs_of(folder)["train"]], environment)
    wait_for_jobs(folder, environment, 120)
    log = "".join(path.read_text() for path in (folder / "logs").glob("train-*.log"))
    saved = sorted(path.name for path in (folder / "run" / "checkpoints").glob("global_step*"))
    if log.count(" starts on ") != 1 or " ends with code 75\n" not in log or len(saved) != 1:
        raise Failed(f"checkpoints: {saved}; {log[-1500:]}")
    return f"saved {saved[0]}"


def seconds_a_step(run: Path) -> float:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    seconds = sorted(record["perf/step_seconds"] for record in records if "perf/step_seconds" in record)
    return seconds[len(seconds) // 2]


def cancelled_task(at: Path, environment: dict[str, str]) -> str:
    """A cancelled array task stops the merge; submitted again, the result is that of one process"""
    folder, whole = at / "array", at / "whole"
    images, vocab, dvae = f"images={folder}/data/images", f"vocab={folder}/data/vocab", f"dvae={whole}/runs/dvae"
    stages: dict[str, dict[str, object]] = {
        "slurm": {"time": "30"},
        "preprocess": {"words": f"emoji out={folder}/data", "tasks": 3},
        "tokenise": {"words": f"{images} {vocab} {dvae} out={folder}/data/tokens", "tasks": 3},
    }
    settings = write_settings(at / "array.toml", stages)
    cancelled = []
    for stage, made in (("preprocess", "data/images"), ("tokenise", "data/tokens")):
        smalti(["pipeline", "slurm", settings, f"folder={folder}"], environment)
        wait_until(lambda stage=stage: "RUNNING" in states_of(folder, environment)[stage], f"running {stage}", 300)
        ask(["scancel", f"{jobs_of(folder)[stage]}_1"], environment)
        states = wait_for_jobs(folder, environment, 600)
        if "CANCELLED" not in states[stage] or set(states[f"{stage}-merge"]) != {"CANCELLED"}:
            raise Failed(f"after the cancelled task of {stage}: {states}")
        if (folder / made / "manifest.json").exists():
            raise Failed(f"{made} is called finished though a task of it was cancelled")
        cancelled.append(stage)
    smalti(["pipeline", "slurm", settings, f"folder={folder}"], environment)
    require_completed(folder, wait_for_jobs(folder, environment, 600))
    alone = at / "alone"
    smalti(["preprocess", "emoji", f"out={alone}"], environment)
    smalti(["tokenise", f"images={alone}/images", f"vocab={alone}/vocab", dvae, f"out={alone}/tokens"], environment)
    for name in ("images", "vocab", "tokens"):
        if fingerprint(folder / "data" / name) != fingerprint(alone / name):
            raise Failed(f"{name} differs from that of one process")
    return f"{' and '.join(cancelled)} rerun; fingerprints of images, vocab and tokens equal"


CLAIMS = (whole_pipeline, time_limit, told_to_end, cancelled_task)


def main() -> int:
    """Try every claim; the exit code."""
    missing = [name for name in NEEDED if not shutil.which(name)]
    if os.geteuid() or missing:
        print(f"this needs root and {', '.join(NEEDED)}; missing: {', '.join(missing) or 'root'}", file=sys.stderr)
        return 1
    signal.signal(signal.SIGTERM, _leave)
    failed = 0
    with tempfile.TemporaryDirectory(prefix="slurm-work-") as folder, slurm() as environment:
        for claim in CLAIMS:
            start = time.monotonic()
            try:
                told = f"ok    {claim.__doc__}: {claim(Path(folder), environment)}"
            except (Failed, OSError, KeyError, ValueError, subprocess.TimeoutExpired) as error:
                told, failed = f"FAIL  {claim.__doc__}: {error}", failed + 1
            print(f"{time.monotonic() - start:6.0f} s  {told}", flush=True)
    return int(failed > 0)


def _leave(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)  # so that everything is put away


if __name__ == "__main__":
    sys.exit(main())
