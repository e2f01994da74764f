"""A pipeline is checked whole before any of it is submitted, and its jobs wait for what they read."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.command import run_command
from cluster.settings import SettingError, UserError
from cluster.slurm.queue import submitted
from pretrain import pipeline as stage
from pretrain.cli import command_of
from pretrain.pipeline import COMMAND, PipelineConfig, pipeline, planned, words_for
from pretrain.status import read_record

Sbatch = Callable[..., list[list[str]]]


@pytest.fixture
def slurm(monkeypatch: pytest.MonkeyPatch) -> Sbatch:
    """Pretends the commands of SLURM: sbatch gives the ids 101, 102 ...; returns all calls."""

    def pretend(refuse_at: int = 0, queue: str = "") -> list[list[str]]:
        calls: list[list[str]] = []

        def ask(words: list[str]) -> str:
            calls.append(words)
            count = sum(call[0] == "sbatch" for call in calls)
            if words[0] == "sbatch" and count == refuse_at:
                raise UserError("sbatch: error: no such partition")
            return queue if words[0] == "squeue" else f"{100 + count}\n"

        monkeypatch.setattr("cluster.slurm.job.ask_slurm", ask)
        monkeypatch.setattr("cluster.slurm.queue.ask_slurm", ask)
        monkeypatch.setattr(stage, "ask_slurm", ask)
        monkeypatch.setattr("cluster.slurm.queue.shutil.which", lambda name: name)
        return calls

    return pretend


def settings(folder: Path, *words: str) -> PipelineConfig:
    return COMMAND.settings(["emoji", f"folder={folder}", *words])


def test_a_job_waits_for_what_it_reads(tmp_path: Path) -> None:
    assert {one.job.name: one.after for one in planned(settings(tmp_path))} == {
        "preprocess": (),
        "preprocess-merge": ("preprocess",),
        "dvae": ("preprocess-merge",),
        "tokenise": ("preprocess-merge", "dvae"),
        "tokenise-merge": ("tokenise",),
        "train": ("tokenise-merge",),
        "scorer": ("preprocess-merge",),
        "sample": ("train",),
        "sample-merge": ("sample",),
        "rerank": ("sample-merge", "scorer"),
    }


def test_stages_without_words_are_left_out_and_their_waits_handed_on(tmp_path: Path) -> None:
    config = settings(tmp_path, "tokenise.words=", "train.words=", "scorer.words=", "preprocess.tasks=0")
    after = {one.job.name: one.after for one in planned(config)}
    assert after == {
        "preprocess": (), "dvae": ("preprocess",), "sample": ("preprocess", "dvae"), "sample-merge": ("sample",),
        "rerank": ("sample-merge", "preprocess"),
    }  # fmt: skip


def test_a_stage_asks_for_its_own_and_else_for_what_all_ask(tmp_path: Path) -> None:
    words = ["slurm.partition=gpu", "slurm.gpus_per_node=8", "slurm.extra=--exclusive", "train.nodes=4",
             "train.time=2-0", "train.extra=--mail-type=END", "preprocess.gpus_per_node=0",
             "preprocess.partition=cpu", "sample.processes_per_node=2"]  # fmt: skip
    jobs = {one.job.name: one.job.config for one in planned(settings(tmp_path, *words))}
    train = jobs["train"]
    assert (train.partition, train.nodes, train.time, train.gpus_per_node) == ("gpu", 4, "2-0", 8)
    assert train.extra_directives() == ["--exclusive", "--mail-type=END"]
    assert (jobs["preprocess"].partition, jobs["preprocess"].gpus_per_node) == ("cpu", 0)
    assert (jobs["dvae"].partition, jobs["dvae"].nodes, jobs["dvae"].n_processes) == ("gpu", 1, 8)


def test_what_runs_in_one_process_gets_one_and_one_gpu(tmp_path: Path) -> None:
    words = ["slurm.nodes=2", "slurm.gpus_per_node=8", "slurm.processes_per_node=8"]
    jobs = {one.job.name: one.job.config for one in planned(settings(tmp_path, *words))}
    for name in ("preprocess-merge", "tokenise-merge", "sample-merge", "scorer", "rerank"):
        assert (jobs[name].nodes, jobs[name].n_processes, jobs[name].gpus_per_node) == (1, 1, 1)


def test_an_array_is_joined_by_the_verb_that_joins_it(tmp_path: Path) -> None:
    jobs = {one.job.name: one.job for one in planned(settings(tmp_path))}
    assert (jobs["tokenise"].module, jobs["tokenise"].array) == ("dvae.tokenise", 2)
    merge = jobs["tokenise-merge"]
    assert (merge.module, merge.array) == ("dvae.tokenise_merge", 0)
    assert merge.words == [*jobs["tokenise"].words, "tasks=2"]
    assert jobs["sample-merge"].words == jobs["sample"].words


@pytest.mark.parametrize("name", list(stage.STAGES))
def test_the_preset_writes_where_the_next_stage_reads(name: str, tmp_path: Path) -> None:
    config = settings(tmp_path)
    outs = {one: command_of(one).settings(words_for(config, one)).out for one in stage.STAGES}
    made = {outs[one] for one in stage.STAGES} | {f"{outs['preprocess']}/{one}" for one in ("images", "vocab")}
    mine = command_of(name).settings(words_for(config, name))
    read = [getattr(mine, key) for key in ("images", "vocab", "dvae", "tokens", "model", "samples", "scorer")
            if isinstance(getattr(mine, key, None), str)]  # fmt: skip
    assert set(read) <= made
    assert name == "preprocess" or read


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("train.words=emoji n_stepps=3", "train.words: setting 'n_stepps' does not exist"),
        ("rerank.words=samples='x", "rerank.words: words=.*no closing quotation"),
        ("train.tasks=2", "train.tasks=2: only preprocess, tokenise, sample"),
        ("scorer.nodes=2", "scorer.nodes=2, .*: scorer runs in one process"),
        ("rerank.processes_per_node=2", "rerank.nodes=0, rerank.processes_per_node=2: rerank runs in one process"),
        ("train.time=soon", "train.time='soon'"),
        ("sample.tasks=-1", "tasks=-1"),
        ("slurm.nodes=0", "nodes=0"),
        ("train.nodez=2", "setting 'train.nodez' does not exist"),
    ],
)
def test_one_wrong_word_submits_nothing(word: str, told: str, tmp_path: Path, slurm: Sbatch) -> None:
    calls = slurm()
    with pytest.raises(SettingError, match=f"^{told}"):
        pipeline(settings(tmp_path / "p", word))
    assert not calls and not (tmp_path / "p").exists()


def test_a_pipeline_without_stages_is_refused() -> None:
    with pytest.raises(SettingError, match="no stage has words"):
        pipeline(PipelineConfig())


def test_jobs_are_submitted_in_order_with_the_ids_of_those_before(
    tmp_path: Path, slurm: Sbatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = slurm()
    pipeline(settings(tmp_path))
    assert [Path(call[-1]).stem for call in calls] == [one.job.name for one in planned(settings(tmp_path))]
    text = (tmp_path / "scripts" / "rerank.sh").read_text()  # after sample-merge and scorer
    assert "#SBATCH --dependency=afterok:109:107\n#SBATCH --kill-on-invalid-dep=yes\n" in text
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[:2]] == [["101", "preprocess"], ["102", "preprocess-merge"]]
    assert len(lines) == 11
    stages = json.loads((tmp_path / "pipeline.json").read_text())["stages"]
    assert list(stages) == list(stage.STAGES) and stages["train"] == f"{tmp_path}/runs/train"


def test_a_refusal_takes_back_what_was_submitted(tmp_path: Path, slurm: Sbatch) -> None:
    calls = slurm(refuse_at=3)
    with pytest.raises(UserError, match="no such partition; the 2 jobs submitted before it were cancelled"):
        pipeline(settings(tmp_path))
    assert calls[-1] == ["scancel", "101", "102"]


def test_a_reader_that_leaves_takes_back_what_was_submitted(
    tmp_path: Path, slurm: Sbatch, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = slurm()

    def shown(one: stage.Planned) -> str:
        if one.job.name == "dvae":
            raise BrokenPipeError
        return one.job.name

    monkeypatch.setattr(stage, "_shown", shown)
    with pytest.raises(BrokenPipeError):
        pipeline(settings(tmp_path))
    assert calls[-1] == ["scancel", "101", "102", "103"]
    assert capsys.readouterr().err == "smalti pipeline slurm: the 3 jobs submitted before it were cancelled\n"


def test_two_submissions_of_one_folder_do_not_run_at_once(tmp_path: Path, slurm: Sbatch) -> None:
    slurm()
    pipeline(settings(tmp_path))
    slurm(queue="101|COMPLETED|None\n102|PENDING|Dependency\n")
    with pytest.raises(UserError, match="jobs of it wait or run.*`scancel 102`"):
        pipeline(settings(tmp_path))
    calls = slurm(queue="101|FAILED|None\n102|CANCELLED|Dependency\n")
    pipeline(settings(tmp_path))
    assert sum(call[0] == "sbatch" for call in calls) == 10


def test_a_dry_run_writes_scripts_that_submit_themselves(
    tmp_path: Path, slurm: Sbatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = slurm()
    assert run_command(COMMAND, ["emoji", f"folder={tmp_path}/p", "--dry-run"]) == 0
    assert not calls and not (tmp_path / "p" / "jobs.jsonl").exists() and (tmp_path / "p" / "logs").is_dir()
    noted = tmp_path / "noted"
    fake = f'#!/bin/bash\necho "$@" >> {noted}\necho "$(wc -l < {noted});lab"\n'  # its ids: 1, 2, 3 ... of a cluster
    (tmp_path / "sbatch").write_text(fake)
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    subprocess.run(["bash", str(tmp_path / "p" / "scripts" / "submit.sh")], check=True, timeout=30)
    lines = noted.read_text().splitlines()
    assert len(lines) == 10
    path = tmp_path / "p" / "scripts" / "tokenise.sh"
    assert lines[3] == f"--parsable --dependency=afterok:2:3 --kill-on-invalid-dep=yes {path}"
    jobs = planned(settings(tmp_path / "p"))
    assert [(one.job, one.name, one.array, one.time > 0) for one in submitted(tmp_path / "p")] == [
        (str(number), one.job.name, one.job.array, True) for number, one in enumerate(jobs, 1)
    ]
    assert list(read_record(tmp_path / "p")) == list(stage.STAGES)
    slurm(queue="3|PENDING|Dependency\n")
    with pytest.raises(UserError, match="`scancel 3`"):
        pipeline(settings(tmp_path / "p"))
