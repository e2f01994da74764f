"""The comparison's runner, on programs that stand in for the peers: no network, nothing installed."""

import csv
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.peers import (
    FIELDS,
    MEASURES,
    PROGRAMS,
    TORCH,
    Failed,
    Program,
    Row,
    append,
    call,
    measured,
    python_of,
    rows_of,
    table,
)

SLOW = Program("slow", "1.0", "answers", ("step 1", "memory 4", "sample 8"))
ANSWERS = """
import json, sys
print("a line of chatter")
print(json.dumps({
    "step": {"ours": 3.0, "theirs": 2.0, "ratio": 1.5, "load": 0.5},
    "memory": {"ours": 7.25},
    "sample": {"ours": 0.5, "theirs": 0.25, "ratio": 0.5},
}[sys.argv[1]]))
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Stands in for the checkout: a program that answers, one that dies, one that says nothing, one that never ends."""
    (tmp_path / "answers.py").write_text(ANSWERS)
    (tmp_path / "dies.py").write_text("print('{\"ours\": 1.0}')\nraise MemoryError('no | room\\n\\n')")
    (tmp_path / "mute.py").write_text("")
    (tmp_path / "listed.py").write_text("print([1, 2])")
    (tmp_path / "endless.py").write_text("import time\ntime.sleep(60)")
    return tmp_path


def stand_in_for_pip(environments: Path, name: str, script: str) -> Path:
    """An environment whose interpreter is this shell script, which notes its words."""
    python = environments / name / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\necho "$@" >> "{environments / "words"}"\n{script}\n')
    python.chmod(0o755)
    return environments / "words"


def test_the_table_shows_seconds_gigabytes_and_codes_a_second(folder: Path) -> None:
    rows = rows_of(SLOW, folder, folder)
    assert [cell.strip() for cell in table(rows).split("|")][1:4:2] == ["", ""]
    assert table(rows).splitlines() == [
        "|  | slow 1.0 |",
        "| --- | --- |",
        f"| {MEASURES['step 1']} | 3.00 (1.50x) |",
        f"| {MEASURES['memory 4']} | 7.25 |",
        f"| {MEASURES['sample 8']} | 16 (50.0%) |",
    ]


def test_a_measure_is_printed_as_json_when_it_is_there(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    rows = rows_of(SLOW, folder, folder)
    assert [json.loads(line) for line in capfd.readouterr().out.splitlines()] == [vars(row) for row in rows]


@pytest.mark.parametrize(
    ("module", "error"),
    [
        ("dies", "MemoryError: no | room"),
        ("mute", "answered no numbers: IndexError"),
        ("listed", "answered no numbers: TypeError"),
        ("absent", "No module named absent"),
    ],
)
def test_a_program_that_fails_stays_in_the_table_with_its_error(folder: Path, module: str, error: str) -> None:
    broken = Program("broken", "2.0", module, ("step 1",))
    rows = [*rows_of(SLOW, folder, folder), *rows_of(broken, folder, folder)]
    assert error in rows[-1].error and "\n" not in rows[-1].error and rows[-1].whole is None
    step = table(rows).splitlines()[2]
    assert step.startswith(f"| {MEASURES['step 1']} | 3.00 (1.50x) | failed: ")
    assert step.count("|") == 4
    assert error.replace("|", "/") in step
    assert table(rows).splitlines()[3] == f"| {MEASURES['memory 4']} | 7.25 |  |"


def test_a_program_that_never_ends_is_stopped(folder: Path) -> None:
    with pytest.raises(Failed, match=r"took longer than 0\.5 s"):
        call([sys.executable, "-m", "endless"], 0.5, folder)


def test_a_peer_that_cannot_be_installed_stays_in_the_table(tmp_path: Path) -> None:
    stand_in_for_pip(tmp_path, "barred", "echo 'ERROR: no such package' >&2; exit 1")
    rows = rows_of(Program("barred", "3.0", "barred", ("step 1", "sample 1"), ("numpy",)), tmp_path, tmp_path)
    assert [(row.what, row.error) for row in rows] == [
        (what, "cannot be installed: ERROR: no such package") for what in ("step 1", "sample 1")
    ]


def test_torch_is_installed_first_and_the_peer_without_what_it_asks_for(tmp_path: Path) -> None:
    words = stand_in_for_pip(tmp_path, "peer", "exit 0")
    peer = Program("peer", "1.2", "peer", ("step 1",), ("einops", "numpy"))
    python_of(peer, tmp_path)
    install = "-m pip install --quiet"
    assert words.read_text().splitlines() == [
        f"{install} {TORCH}", f"{install} --no-deps peer==1.2", f"{install} {TORCH} einops numpy",
    ]  # fmt: skip


def test_an_environment_is_reused_until_its_packages_change(tmp_path: Path) -> None:
    words = stand_in_for_pip(tmp_path, "peer", "exit 0")
    peer = Program("peer", "1.2", "peer", ("step 1",), ("einops",))
    python = python_of(peer, tmp_path)
    assert python == python_of(peer, tmp_path) == tmp_path / "peer" / "bin" / "python"
    assert len(words.read_text().splitlines()) == 3
    python_of(replace(peer, version="1.3"), tmp_path)
    assert len(words.read_text().splitlines()) == 6


def test_no_peer_is_installed_with_torchvision() -> None:
    assert not [program.name for program in PROGRAMS if "torchvision" in " ".join(program.imports)]
    assert {measure for program in PROGRAMS for measure in program.measures} == set(MEASURES)


def test_rows_are_added_to_the_csv_under_one_header(folder: Path) -> None:
    path = folder / "peers.csv"
    append([measured(SLOW, "step 1", Path(sys.executable), folder)], path)
    append([Row("broken", "2.0", "step 1", error='it said "no", twice')], path)
    with path.open() as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    assert tuple(reader.fieldnames or ()) == FIELDS
    assert [(row["program"], row["what"], row["whole"], row["bare"], row["ratio"], row["error"]) for row in rows] == [
        ("slow", "step 1", "3.0", "2.0", "1.5", ""), ("broken", "step 1", "", "", "", 'it said "no", twice'),
    ]  # fmt: skip
    assert all(row["date"] and row["cpu"] for row in rows)
    assert rows[0]["torch"].startswith(TORCH.removeprefix("torch=="))
