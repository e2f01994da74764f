"""Submit a verb as a SLURM job, which is told to save before its time limit and queues itself again.

    smalti launch slurm partition=gpu nodes=4 gpus_per_node=8 time=12:00:00 train dalle-12b
    smalti launch slurm --dry-run nodes=2 train emoji

Needs no ssh: srun starts the processes. `--dry-run` prints the job's script. Its logs and the script itself lie in
the verb's `out`.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from cluster.command import run_command
from cluster.launch import LaunchConfig, Program, record
from cluster.settings import SettingError, setting
from cluster.slurm.job import Job, SlurmConfig, script, submit
from cluster.slurm.queue import refuse_twice
from pretrain.cli import command_of
from pretrain.launch import PRESETS, LaunchCommand, launched_by


@dataclass(frozen=True)
class LaunchSlurmConfig(LaunchConfig, SlurmConfig):
    """A launch through SLURM."""

    name: str = setting("", "of the job; empty: the verb's")
    tasks: int = setting(0, "tasks of a job array, for verbs that have the settings tasks and task; 0: no array")
    after: str = setting("", "ids of jobs that must have ended well before, with commas between")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tasks < 0:
            raise SettingError(f"tasks={self.tasks} must be at least 0")


def launch_slurm(config: LaunchSlurmConfig, program: Program) -> int:
    """Submit the program, or print its script; 0."""
    program.refuse_company(config.nodes * config.n_processes)
    if config.tasks:
        refuse_undivided(program, config.tasks)
    job = Job(
        name=config.name or program.verb.replace(" ", "-"),
        module=program.module,
        words=list(program.words),
        folder=(program.folder or Path()).resolve(),
        config=config,
        array=config.tasks,
        after=tuple(part.strip() for part in config.after.split(",") if part.strip()),
    )
    if config.dry_run:
        print(script(job), end="")
        return 0
    if program.folder:
        refuse_twice(job.folder, job.name, job.after)
    record(program, config)
    print(f"job {submit(job)}: {program.verb}, logs in {job.folder / 'logs'}")
    return 0


def refuse_undivided(program: Program, tasks: int) -> None:
    """SettingError if a program is not shared by tasks."""
    if program.verb.endswith(" merge"):
        raise SettingError(f"tasks={tasks}: {program.verb} is one job, which ends what the tasks began")
    try:
        command_of(program.verb).settings([*program.words, f"tasks={tasks}", "task=0"])
    except SettingError as error:
        raise SettingError(f"tasks={tasks}: {program.verb} is not shared by tasks: {error}") from None


COMMAND = LaunchCommand("launch slurm", LaunchSlurmConfig, PRESETS / "slurm", launched_by(launch_slurm), __doc__)

if __name__ == "__main__":
    sys.exit(run_command(COMMAND, sys.argv[1:]))
