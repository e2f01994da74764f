"""What is told of stages that are finished, under way, killed, damaged, or not there."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from cluster.command import run_command
from cluster.metrics import read_metrics
from pretrain.stage_progress import progress_of
from pretrain.status import COMMAND, duration
from tests.small import smalti

STOP = "stop_after_minutes=0.00001"  # ends after the first step


def told(capsys: pytest.CaptureFixture[str], *words: object, code: int = 0) -> str:
    assert run_command(COMMAND, [str(word) for word in words]) == code
    return capsys.readouterr().out


def as_json(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, dict[str, Any]]:
    stages = json.loads(told(capsys, *words, "json=true"))["stages"]
    return {Path(stage["folder"]).name: stage for stage in stages}


@pytest.fixture(scope="module")
def stopped(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 12 steps that was stopped after 1, and after 2."""
    out = tmp_path_factory.mktemp("stopped") / "run"
    words = ["emoji", "n_steps=12", "model.n_layers=2", "model.n_heads=2", "model.d_head=16", "data.batch=8"]
    for _ in range(2):
        done = smalti(
            "train", *words, f"tokens={tiny}/data/tokens", f"vocab={tiny}/data/vocab", f"out={out}", STOP, check=False
        )
        assert done.returncode == 75, done.stderr
    return out


def copied(folder: Path, to: Path) -> Path:
    """A copy to be damaged; times are kept."""
    for path in folder.rglob("*"):
        if path.is_file() and "tensorboard" not in path.parts:
            target = to / path.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
            os.utime(target, (path.stat().st_atime, path.stat().st_mtime))
    return to


def test_everything_below_a_folder_is_found(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = as_json(capsys, tiny)
    assert {name: (stage["kind"], stage["state"]) for name, stage in found.items()} == {
        "images": ("images", "finished"), "vocab": ("vocab", "finished"), "tokens": ("tokens", "finished"),
        "dvae": ("dvae", "finished"),
    }  # fmt: skip
    assert (found["dvae"]["done"], found["dvae"]["total"], found["dvae"]["checkpoint_step"]) == (4, 4, 4)
    assert not [stage for stage in found.values() if stage["missing"] or stage["problems"]]


def test_a_stopped_run_tells_steps_starts_and_checkpoint(stopped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = as_json(capsys, stopped)["run"]
    assert (one["kind"], one["state"], one["done"], one["total"], one["starts"]) == (
        "transformer",
        "unfinished",
        2,
        12,
        2,
    )
    assert one["checkpoint_step"] == 2 and 0 <= one["checkpoint_age_seconds"] < 600
    steps = [record["perf/step_seconds"] for record in read_metrics(stopped)]
    assert one["seconds_left"] == pytest.approx(10 * sum(steps) / 2)
    text = told(capsys, stopped)
    assert "2/12 steps (17%), 2 starts" in text and "step 2, " in text


def test_goodput_is_useful_time_over_time_since_the_first_start(tmp_path: Path) -> None:
    """Steps 0 to 3 of 10 s, one with a stall of 4 s; the run lay dead for 50 s between its two starts."""
    now = time.time()
    (tmp_path / "settings.toml").write_text("n_steps = 8\ntokens = 'x'\n")
    starts = [{"time": now - 100, "step": 0}, {"time": now - 20, "step": 2}]
    (tmp_path / "starts.jsonl").write_text("".join(json.dumps(start) + "\n" for start in starts))
    steps: list[dict[str, float]] = [{"step": step, "perf/step_seconds": 10.0} for step in range(4)]
    steps[2]["perf/save_stall_seconds"] = 4.0
    lines = [*steps, {"step": 3, "val/loss": 1.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name in ("settings.toml", "starts.jsonl", "metrics.jsonl"):
        os.utime(tmp_path / name, (now, now))
    one = progress_of(tmp_path, False, [])
    assert one.goodput == pytest.approx(0.36)
    assert (one.done, one.seconds_left) == (4, pytest.approx(40.0))


def test_a_finished_run_ends_with_its_manifest(tiny: Path) -> None:
    one = progress_of(tiny / "runs" / "dvae", False, [])
    assert one.starts == 1 and one.goodput is not None and 0 < one.goodput <= 1
    assert (one.seconds_left, one.silent_seconds) == (None, None)


def test_a_checkpoint_that_does_not_verify_is_passed_over_by_name(stopped: Path, tmp_path: Path) -> None:
    run = copied(stopped, tmp_path / "run")
    newest = max((run / "checkpoints").glob("global_step*"), key=lambda path: int(path.name[11:]))
    victim = next(path for path in sorted(newest.iterdir()) if path.suffix == ".pt")
    victim.write_bytes(victim.read_bytes()[:-1])
    one = progress_of(run, False, [])
    assert one.checkpoint_step == 1
    assert one.problems == [f"checkpoint {newest.name}: {victim.name} was cut or changed"]


def test_digests_find_what_sizes_do_not(stopped: Path, tmp_path: Path) -> None:
    run = copied(stopped, tmp_path / "run")
    victim = next(path for path in sorted((run / "checkpoints" / "global_step2").iterdir()) if path.suffix == ".pt")
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    assert [progress_of(run, digests, []).checkpoint_step for digests in (False, True)] == [2, 1]


@pytest.mark.parametrize("name", ["settings.toml", "metrics.jsonl", "starts.jsonl", "checkpoints/latest"])
def test_a_damaged_run_is_told_of_all_the_same(
    name: str, stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copied(stopped, tmp_path / "run")
    (run / name).write_bytes(b"\xff\x00[3]\n3\n")
    one = as_json(capsys, run)["run"]
    assert (one["state"], one["done"], one["checkpoint_step"]) == ("unfinished", 2, 2)
    assert bool(one["problems"]) == (name == "settings.toml")


def test_missing_and_cut_shards_of_a_finished_folder_are_named(tiny: Path, tmp_path: Path) -> None:
    tokens = copied(tiny / "data" / "tokens", tmp_path / "tokens")
    shards = sorted(path.name for path in tokens.glob("*.tar"))
    (tokens / shards[0]).unlink()
    (tokens / shards[1]).write_bytes(b"x")
    one = progress_of(tokens, False, [])
    assert (one.state, one.missing) == ("damaged", shards[:2])


def test_a_damaged_manifest_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "manifest.json").write_text('{"kind": "tok')
    text = told(capsys, tmp_path)
    assert "damaged" in text and "manifest.json is damaged" in text


def test_shards_of_images_that_are_still_to_do_are_named(
    pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"source={pairs}", "samples_per_shard=3", "image_side=16", "image_format=png", f"out={tmp_path}/data"]
    smalti("preprocess", *words, "tasks=4", "task=1")
    one = as_json(capsys, tmp_path / "data")["images"]
    assert (one["state"], one["done"], one["total"]) == ("unfinished", 1, 4)
    assert one["missing"] == ["train-000000", "train-000002", "train-000003"]
    for task in (0, 2, 3):
        smalti("preprocess", *words, "tasks=4", f"task={task}")
    text = told(capsys, tmp_path / "data")
    assert "4/4 shards (100%)" in text and "run `smalti preprocess merge`" in text


def test_shards_of_tokens_that_are_still_to_do_are_named(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tiny / "data"
    words = [f"images={data}/images", f"vocab={data}/vocab", f"dvae={tiny}/runs/dvae", f"out={tmp_path}/tokens"]
    smalti("tokenise", *words, "tasks=2", "task=0")
    alone = as_json(capsys, tmp_path / "tokens")["tokens"]
    assert (alone["state"], alone["done"], alone["total"], alone["missing"]) == ("unfinished", 1, None, [])
    other = copied(data / "images", tmp_path / "other")
    manifest = json.loads((other / "manifest.json").read_text())
    (other / "manifest.json").write_text(json.dumps(manifest | {"fingerprint": "another"}))
    assert progress_of(tmp_path / "tokens", False, [other]).total is None
    (tmp_path / "images").symlink_to(data / "images")  # beside it, as it is as a rule
    one = as_json(capsys, tmp_path / "tokens")["tokens"]
    assert (one["done"], one["total"], len(one["missing"])) == (1, 2, 1)
    assert one["missing"][0].endswith(".tar")


def test_pictures_that_are_drawn_are_counted(tmp_path: Path) -> None:
    (tmp_path / "0000").mkdir()
    for name in ("00.png", "01.png", "02.png.part"):
        (tmp_path / "0000" / name).touch()
    one = progress_of(tmp_path, False, [])
    assert (one.kind, one.state, one.done) == ("samples", "unfinished", 2)


def test_a_folder_without_stages_and_one_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").touch()
    assert run_command(COMMAND, [str(tmp_path / name) for name in ("empty", "other", "nowhere")]) == 1
    out, err = capsys.readouterr()
    assert [line.split()[2] for line in out.splitlines()[1:]] == ["empty", "no"]
    assert err == f"smalti status: there is no folder {tmp_path}/nowhere\n"
    assert run_command(COMMAND, []) == 2


def test_a_pipelines_stages_and_jobs(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = {"preprocess": str(tiny / "data"), "dvae": str(tiny / "runs" / "dvae"), "train": str(tmp_path / "run")}
    (tmp_path / "pipeline.json").write_text(json.dumps({"stages": stages}))
    job = {"job": "7", "name": "dvae", "array": 0, "time": 0.0}
    jobs = [job, job | {"job": "8", "name": "train"}]
    (tmp_path / "jobs.jsonl").write_text("".join(json.dumps(job) + "\n" for job in jobs))
    monkeypatch.setattr("cluster.slurm.queue.shutil.which", lambda name: name)
    monkeypatch.setattr("cluster.slurm.queue.ask_slurm", lambda words: "8|PENDING|Dependency\n")
    lines = told(capsys, tmp_path).splitlines()
    assert [line.split()[1:3] for line in lines[1:6]] == [
        ["images", "finished"], ["tokens", "finished"], ["vocab", "finished"], ["dvae", "finished"], ["train", "not"],
    ]  # fmt: skip
    assert lines[6:] == [
        f"{tmp_path}: job 7 dvae: SLURM does not know it",
        f"{tmp_path}: job 8 train: pending (Dependency)",
    ]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "-"), (0.4, "0s"), (59.4, "59s"), (61.0, "1m01s"), (3725.0, "1h02m"), (90000.0, "1d01h")],
)
def test_durations_are_short(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text
