"""The drill: a small one is survived, and each thing that it compares can make it fail."""

import json
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import psutil
import pytest
from safetensors.torch import load_file, save_file

from cluster.command import run_command
from pretrain import drill, drill_faults
from pretrain.drill import COMMAND, KINDS, NANS, DrillConfig, drawn, layout_of, table, taken
from pretrain.drill_run import TOLERANCE, DrilledRun, Equal, Layout, Strike, compare

SURVIVED = {"recovered": True, "weights_equal": True, "losses_equal": True, "ledger_equal": True}
STRUCK = ("damage_checkpoint", "disk_full", "kill_in_save", "sigterm")


@pytest.fixture(scope="module")
def drilled(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The folder of a small drill, and the JSON lines that it printed. It must have ended well."""
    out = tmp_path_factory.mktemp("drill") / "out"
    words = ["faults=4", f"kinds={','.join(STRUCK)}", "seed=1", "json=true", f"data={tiny}/data", f"out={out}"]
    command = [sys.executable, "-m", "pretrain.drill", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return out, [json.loads(line) for line in done.stdout.splitlines()]


def test_a_run_that_is_struck_again_and_again_ends_as_one_that_was_left_alone(
    drilled: tuple[Path, list[dict[str, Any]]],
) -> None:
    *lines, totals = drilled[1]
    assert sorted(line["fault"] for line in lines) == sorted(STRUCK)
    assert all(line.items() >= SURVIVED.items() and line["steps_lost"] == 0 for line in lines)
    codes = {line["fault"]: line["exit"] for line in lines}
    assert codes == {"damage_checkpoint": -9, "disk_full": 75, "kill_in_save": -9, "sigterm": 75}
    assert totals.items() >= ({"faults": 4, "steps_lost": 0, "seed": 1} | dict.fromkeys(SURVIVED, 4)).items()


def test_a_drill_leaves_no_process_behind(drilled: tuple[Path, list[dict[str, Any]]]) -> None:
    living = [process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])]
    assert not [words for words in living if any(str(drilled[0]) in word for word in words)]


def nudge_weight(run: Path) -> None:
    tensors = load_file(run / "model.safetensors")
    name = min(tensors)
    tensors[name].view(-1)[0] += 100 * TOLERANCE
    save_file(tensors, run / "model.safetensors")


def change_last_digit(run: Path, name: str, key: str) -> None:
    """Of the value of `key` in the fifth line that has it."""
    lines = (run / name).read_text().splitlines(keepends=True)
    at = [number for number, line in enumerate(lines) if f'"{key}"' in line][4]
    before, value = lines[at].split(f'"{key}"', 1)
    digit = next(place for place, sign in enumerate(value) if sign in "123456789")
    lines[at] = f'{before}"{key}"{value[:digit]}{int(value[digit]) - 1}{value[digit + 1 :]}'
    (run / name).write_text("".join(lines))


def drop_line(run: Path, name: str) -> None:
    lines = (run / name).read_text().splitlines(keepends=True)
    (run / name).write_text("".join(lines[:7] + lines[8:]))


TAMPERING: dict[str, tuple[Callable[[Path], Any], Equal]] = {
    "weight": (nudge_weight, Equal(False, True, True)),
    "no weights": (lambda run: (run / "model.safetensors").unlink(), Equal(False, True, True)),
    "loss": (lambda run: change_last_digit(run, "metrics.jsonl", "train/loss"), Equal(True, False, True)),
    "step not logged": (lambda run: drop_line(run, "metrics.jsonl"), Equal(True, False, True)),
    "nothing logged": (lambda run: (run / "metrics.jsonl").unlink(), Equal(True, False, True)),
    "digest": (lambda run: change_last_digit(run, "ledger.jsonl", "digest"), Equal(True, True, False)),
    "step not in the ledger": (lambda run: drop_line(run, "ledger.jsonl"), Equal(True, True, False)),
    "no ledger": (lambda run: (run / "ledger.jsonl").unlink(), Equal(True, True, False)),
}


@pytest.mark.parametrize("tolerance", [0.0, TOLERANCE])
@pytest.mark.parametrize("what", TAMPERING)
def test_what_differs_at_the_end_is_told(
    what: str, tolerance: float, drilled: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    undisturbed = next((drilled[0] / "undisturbed").glob("*/run"))
    run = shutil.copytree(undisturbed, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
    assert compare(run, undisturbed, tolerance) == Equal(True, True, True)
    tamper, equal = TAMPERING[what]
    tamper(run)
    assert compare(run, undisturbed, tolerance) == equal


def test_only_a_tolerance_lets_the_last_bits_differ(drilled: tuple[Path, list[dict[str, Any]]], tmp_path: Path) -> None:
    undisturbed = next((drilled[0] / "undisturbed").glob("*/run"))
    run = shutil.copytree(undisturbed, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
    tensors = {name: tensor * (1 + TOLERANCE / 10) for name, tensor in load_file(run / "model.safetensors").items()}
    save_file(tensors, run / "model.safetensors")
    assert compare(run, undisturbed) == Equal(False, True, True)
    assert compare(run, undisturbed, TOLERANCE) == Equal(True, True, True)


@pytest.mark.parametrize("bad", ["", "recovered", "weights_equal", "losses_equal", "ledger_equal", "steps_lost"])
def test_the_exit_code_is_0_only_if_all_was_survived(
    bad: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    good = {"run": 1, "fault": "kill", "step": 5, "steps_lost": 0} | SURVIVED
    worse = {"steps_lost": 4} if bad == "steps_lost" else {bad: False} if bad else {}

    def two_lines(ground: object, queue: object) -> Iterator[dict[str, Any]]:
        yield good
        yield good | {"fault": "sigint"} | worse

    monkeypatch.setattr(drill, "disturbed", two_lines)
    code = run_command(COMMAND, [f"data={tmp_path}", f"out={tmp_path}", "faults=2"])
    assert code == (1 if bad else 0)
    assert ("1 of 2 faults were not survived (sigint at step 5 of run 1)" in capsys.readouterr().err) == bool(bad)


class SaidBefore:
    """Stands for a start of the command that has said something."""

    def __init__(self, text: str) -> None:
        self.text = text

    def said(self) -> str:
        return self.text


@pytest.mark.parametrize(
    ("said", "lost", "recovered"),
    [
        ("passing over x\ntransformer: resumed at step 8 of 48\ntransformer: 9/48 steps, 3", 0, True),
        ("passing over x\ntransformer: resumed at step 4 of 48\ntransformer: 5/48 steps, 3", 4, True),
        ("passing over x\ntransformer: 1/48 steps, 3", 8, True),
        ("transformer: resumed at step 8 of 48\ntransformer: 9/48 steps, 3", 0, False),
        ("passing over x\nTraceback", None, False),
    ],
)
def test_the_next_start_shows_what_a_fault_cost(
    said: str, lost: int | None, recovered: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = DrilledRun(tmp_path, [], tmp_path, Layout())
    monkeypatch.setattr(DrilledRun, "sealed", lambda self: 8)
    monkeypatch.setattr("pretrain.drill_run.Leg", lambda *words: SaidBefore(said))
    run.struck(strike := Strike("damage_checkpoint", 1))
    run.must_say = "passing over x"
    run._learn(run.start())
    assert (strike.line()["steps_lost"], strike.line()["recovered"]) == (lost, recovered)


def test_faults_are_drawn_from_the_seed_and_as_many_of_each_kind() -> None:
    dues = drawn(DrillConfig(faults=2 * len(KINDS), seed=7))
    assert [due.kind for due in dues] == [due.kind for due in drawn(DrillConfig(faults=2 * len(KINDS), seed=7))]
    assert [due.kind for due in dues] != [due.kind for due in drawn(DrillConfig(faults=2 * len(KINDS), seed=8))]
    assert set(Counter(due.kind for due in dues).values()) == {2} and len(set(KINDS)) == len(KINDS)
    assert set(drill_faults.FAULTS) | set(NANS) == set(KINDS)


def test_a_run_is_struck_only_by_faults_with_one_undisturbed_run() -> None:
    queue = drawn(DrillConfig(faults=5 * len(KINDS), seed=3))
    found = []
    while queue:
        kinds = [due.kind for due in taken(queue)]
        found += kinds
        assert len({layout_of(kind, 1) for kind in kinds}) == 1
        assert len(set(kinds) & {"other_layout", "cut_shard", *NANS}) <= 1
        assert kinds.count("cut_shard") <= 1 and ("other_layout" not in kinds or set(kinds) == {"other_layout"})
        assert not set(kinds) & {"damage_checkpoint"} or not set(kinds) & {"cut_shard", *NANS}
    assert Counter(found) == dict.fromkeys(KINDS, 5)


def test_the_table_counts_by_kind() -> None:
    line = {"run": 1, "steps_lost": 0} | SURVIVED
    lines = [line | {"fault": "kill"}, line | {"fault": "kill", "ledger_equal": False}, line | {"fault": "sigint"}]
    rows = table(lines, {"seed": 5, "runs": 2, "seconds": 9}).splitlines()
    assert rows[2] == "| kill | 2 | 0 | 2 | 2 | 2 | 1 |"
    assert rows[3:5] == ["| sigint | 1 | 0 | 1 | 1 | 1 | 1 |", "| all | 3 | 0 | 3 | 3 | 3 | 2 |"]
    assert rows[-1] == "seed 5, 2 runs, 9 s"


def test_unknown_kinds_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(COMMAND, ["kinds=kill,earthquake"]) == 2
    assert "kinds=earthquake is none of kill," in capsys.readouterr().err


@pytest.mark.parametrize("way", [drill_faults.flip, drill_faults.cut, drill_faults.remove])
def test_a_damaged_file_is_never_what_it_was(way: Callable[[Path, Random], None], tmp_path: Path) -> None:
    path = tmp_path / "file"
    for seed in range(20):
        path.write_bytes(bytes(range(50)))
        way(path, Random(seed))
        assert not path.exists() or path.read_bytes() != bytes(range(50))
