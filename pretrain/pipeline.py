"""Submit all stages, from raw pairs to ranked pictures, as SLURM jobs that wait for each other.

    smalti pipeline slurm emoji
    smalti pipeline slurm FILE.toml train.nodes=16 --dry-run

A section a stage: `words` are those of its verb, the rest what SLURM gives it. preprocess, tokenise and sample may be
arrays (tasks=N), each followed by the job that puts the parts together. Nothing is submitted unless all words of all
stages are right; --dry-run writes the scripts, and submit.sh that submits them, into FOLDER/scripts and stops.
Submitted again after a failure, finished stages take no time. `smalti status FOLDER` says how far it is.
"""

import shlex
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from cluster.command import Command, run_command
from cluster.manifest import write_bytes, write_json
from cluster.settings import SettingError, UserError, section, setting
from cluster.slurm.job import JOBS, Job, SlurmConfig, ask_slurm, submit, words_of, write_script
from cluster.slurm.queue import refuse_twice
from pretrain.cli import VERBS, command_of

RECORD = "pipeline.json"  # in the pipeline's folder: its stages and where each writes
HERE = "{folder}"  # in a stage's words: the pipeline's folder


@dataclass(frozen=True)
class StageConfig:
    """A stage's words, and where it asks for other things than section `slurm` does (empty, 0 or -1: the same)."""

    words: str = setting("", "for the verb; {folder} is the pipeline's; empty: the stage is left out")
    tasks: int = setting(0, "preprocess, tokenise, sample: an array of so many jobs; 0: one job")
    time: str = setting("", "limit of one start")
    nodes: int = setting(0, "machines")
    gpus_per_node: int = setting(-1, "GPUs of each machine")
    processes_per_node: int = setting(-1, "processes on each machine")
    cpus_per_process: int = setting(-1, "cores of each process")
    memory: str = setting("", "of each machine")
    partition: str = setting("", "queue")
    constraint: str = setting("", "features that nodes must have")
    extra: str = setting("", "more #SBATCH lines, besides those of slurm.extra")

    def __post_init__(self) -> None:
        if self.tasks < 0:
            raise SettingError(f"tasks={self.tasks} must be at least 0")

    def over(self, general: SlurmConfig) -> SlurmConfig:
        """What the stage asks for. SettingError as of SlurmConfig."""
        texts = {"time": self.time, "memory": self.memory, "partition": self.partition, "constraint": self.constraint}
        counts = {
            "gpus_per_node": self.gpus_per_node,
            "processes_per_node": self.processes_per_node,
            "cpus_per_process": self.cpus_per_process,
        }
        changes: dict[str, object] = {name: text for name, text in texts.items() if text}
        changes |= {name: count for name, count in counts.items() if count != -1}
        changes |= {"nodes": self.nodes} if self.nodes else {}
        changes |= {"extra": f"{general.extra};{self.extra}"} if self.extra else {}
        return replace(general, **changes)  # type: ignore[arg-type]


@dataclass(frozen=True)
class PipelineConfig:
    """Stages, in the order of the main path."""

    folder: str = setting("pipeline", "folder of scripts, logs and the record of jobs")
    dry_run: bool = setting(False, "write the scripts, submit nothing")
    slurm: SlurmConfig = section(SlurmConfig)
    preprocess: StageConfig = section(StageConfig)
    dvae: StageConfig = section(StageConfig)
    tokenise: StageConfig = section(StageConfig)
    train: StageConfig = section(StageConfig)
    scorer: StageConfig = section(StageConfig)
    sample: StageConfig = section(StageConfig)
    rerank: StageConfig = section(StageConfig)


@dataclass(frozen=True)
class Stage:
    """A stage of the path: those it reads from, and the verb that puts the parts of its array together.

    joined_by: takes the stage's words; "" if the stage cannot be an array. alone: it runs in one process.
    """

    after: tuple[str, ...] = ()
    joined_by: str = ""
    alone: bool = False


STAGES = {  # by verb
    "preprocess": Stage((), "preprocess merge"),
    "dvae": Stage(("preprocess",)),
    "tokenise": Stage(("preprocess", "dvae"), "tokenise merge"),
    "train": Stage(("tokenise",)),
    "scorer": Stage(("preprocess",), alone=True),
    "sample": Stage(("train",), "sample"),
    "rerank": Stage(("sample", "scorer"), alone=True),
}


@dataclass(frozen=True)
class Planned:
    """A job before it is submitted: those it waits for are names, not yet ids."""

    job: Job
    after: tuple[str, ...]


def pipeline(config: PipelineConfig) -> None:
    """Submit the stages, or write their scripts."""
    folder, jobs = Path(config.folder), planned(config)
    if not config.dry_run:
        refuse_twice(folder)
    folder.mkdir(parents=True, exist_ok=True)
    outs = {name: command_of(name).settings(words_for(config, name)).out for name in stages_of(config)}
    write_json(folder / RECORD, {"stages": outs})
    if config.dry_run:
        _write(folder, jobs)
        return
    numbers: dict[str, str] = {}
    try:
        for one in jobs:
            number = submit(replace(one.job, after=tuple(numbers[name] for name in one.after)))
            numbers[one.job.name] = number
            print(f"{number:>10}  {_shown(one)}", flush=True)
    except BaseException as error:  # Ctrl-C too, or nobody reads what is printed: a part of a pipeline is of no use
        if numbers:
            ask_slurm(["scancel", *numbers.values()])
            told = f"the {len(numbers)} jobs submitted before it were cancelled"
            if isinstance(error, UserError):
                raise UserError(f"{error}; {told}") from None
            print(f"smalti pipeline slurm: {told}", file=sys.stderr)
        raise
    print(f"logs: {folder / 'logs'}; how far it is: smalti status {shlex.quote(config.folder)}")


def planned(config: PipelineConfig) -> list[Planned]:
    """All jobs, each after those it waits for. SettingError naming the stage whose words or needs are wrong."""
    folder, given = Path(config.folder), stages_of(config)
    found: list[Planned] = []
    last: dict[str, tuple[str, ...]] = {}  # stage -> jobs after which what it writes is there
    if not given:
        raise SettingError(f"no stage has words: fill in the sections {', '.join(STAGES)}")
    for name, stage in STAGES.items():
        waits = tuple(dict.fromkeys(job for before in stage.after for job in last[before]))
        last[name] = waits
        if name not in given:
            continue
        stage_config, words, needs = stage_of(config, name), words_for(config, name), needs_of(config, name)
        job = Job(name, VERBS[name], words, folder, needs, stage_config.tasks)
        found.append(Planned(job, waits))
        if job.array:
            ending = words if stage.joined_by == name else [*words, f"tasks={job.array}"]
            joining = Job(f"{name}-merge", VERBS[stage.joined_by], ending, folder, in_one_process(needs))
            found.append(Planned(joining, (name,)))
        last[name] = (found[-1].job.name,)
    return found


def stages_of(config: PipelineConfig) -> list[str]:
    """Names of the stages that have words."""
    return [name for name in STAGES if stage_of(config, name).words.strip()]


def stage_of(config: PipelineConfig, name: str) -> StageConfig:
    return {
        "preprocess": config.preprocess,
        "dvae": config.dvae,
        "tokenise": config.tokenise,
        "train": config.train,
        "scorer": config.scorer,
        "sample": config.sample,
        "rerank": config.rerank,
    }[name]


def words_for(config: PipelineConfig, name: str) -> list[str]:
    """A stage's words, which its verb has taken. SettingError naming the stage if it does not."""
    stage_config = stage_of(config, name)
    try:
        words = [word.replace(HERE, config.folder) for word in words_of("words", stage_config.words)]
        command_of(name).settings(words)
    except SettingError as error:
        raise SettingError(f"{name}.words: {error}") from None
    return words


def needs_of(config: PipelineConfig, name: str) -> SlurmConfig:
    """What a stage asks of SLURM. SettingError naming the stage if it cannot be."""
    stage_config = stage_of(config, name)
    if stage_config.tasks and not STAGES[name].joined_by:
        arrays = ", ".join(other for other in STAGES if STAGES[other].joined_by)
        raise SettingError(f"{name}.tasks={stage_config.tasks}: only {arrays} are divided into tasks; use {name}.nodes")
    if STAGES[name].alone and (stage_config.nodes > 1 or stage_config.processes_per_node > 1):
        raise SettingError(f"{name}.nodes={stage_config.nodes}, {name}.processes_per_node="
                           f"{stage_config.processes_per_node}: {name} runs in one process")  # fmt: skip
    try:
        needs = stage_config.over(config.slurm)
    except SettingError as error:
        raise SettingError(f"{name}.{error}") from None
    return in_one_process(needs) if STAGES[name].alone else needs


def in_one_process(needs: SlurmConfig) -> SlurmConfig:
    """On one node, with a GPU if there were some: what is left to be drawn, or trained, is for it."""
    return replace(needs, nodes=1, processes_per_node=1, gpus_per_node=min(1, needs.gpus_per_node))


def _write(folder: Path, jobs: list[Planned]) -> None:
    """All scripts, and submit.sh, which submits them in order and keeps the record that `submit` keeps."""
    lines = ["#!/bin/bash", "# Run it in the folder where `smalti pipeline slurm` was run.", "set -e"]
    record = shlex.quote(str(folder / JOBS))
    for one in jobs:
        path = write_script(one.job)
        waits = ":".join(f"${_variable(name)}" for name in one.after)
        options = f" --dependency=afterok:{waits} --kill-on-invalid-dep=yes" if waits else ""
        variable, job = _variable(one.job.name), one.job
        lines.append(f"{variable}=$(sbatch --parsable{options} {shlex.quote(str(path))})")
        lines.append(f"{variable}=${{{variable}%%;*}} # without the name of the cluster")
        told = f'{{"job": "%s", "name": "{job.name}", "array": {job.array}, "time": %s}}\\n'
        lines.append(f"""printf '{told}' "${variable}" "$(date +%s)" >> {record}""")
        lines.append(f'echo "${variable} {job.name}"')
        print(f"{path}  {_shown(one)}")
    write_bytes(folder / "scripts" / "submit.sh", "\n".join([*lines, ""]).encode())
    print(f"nothing is submitted; `bash {shlex.quote(str(folder / 'scripts' / 'submit.sh'))}` does it")


def _shown(one: Planned) -> str:
    config, tasks = one.job.config, f"{one.job.array} x " if one.job.array else ""
    where = f"{tasks}{config.nodes} nodes x {config.n_processes} processes"
    return f"{one.job.name:<17} {where}" + (f", after {', '.join(one.after)}" if one.after else "")


def _variable(name: str) -> str:
    return name.replace("-", "_")


PRESETS = Path(__file__).parent / "configs" / "pipeline"
COMMAND = Command("pipeline slurm", PipelineConfig, PRESETS, pipeline, __doc__)

if __name__ == "__main__":
    sys.exit(run_command(COMMAND, sys.argv[1:]))
