"""What SLURM says of jobs is read right, and it may say nothing."""

import json
from pathlib import Path

import pytest

from cluster.settings import UserError
from cluster.slurm.queue import State, newest, refuse_twice, states, submitted

LINE = {"job": "1", "name": "train", "array": 0, "time": 1.5}


def test_states_are_counted_over_an_array(calls: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUEUE", "7|RUNNING|None\n7|PENDING|Resources\n7|PENDING|Resources\n8|COMPLETED|None\n")
    found = states(["7", "8", "9"])
    assert found == {"7": State({"RUNNING": 1, "PENDING": 2}, "Resources"), "8": State({"COMPLETED": 1})}
    assert (str(found["7"]), str(found["8"])) == ("2 pending, running (Resources)", "completed")
    assert (found["7"].is_over, found["8"].is_over) == (False, True)
    assert "--jobs=7,8,9" in calls.read_text()


def test_a_state_that_is_not_known_is_not_over() -> None:
    assert not State({"COMPLETED": 3, "REQUEUE_HOLD": 1}).is_over


def test_jobs_that_slurm_forgot_have_no_state(calls: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REFUSAL", "slurm_load_jobs error: Invalid job id specified")
    assert states(["7"]) == {}
    monkeypatch.setenv("REFUSAL", "squeue: error: no controller")
    with pytest.raises(UserError, match="no controller"):
        states(["7"])


def test_without_slurm_or_jobs_there_are_no_states(calls: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert states([]) == {} and calls.read_text() == ""
    monkeypatch.setenv("PATH", str(calls.parent))
    assert states(["7"]) == {}


def test_a_job_waits_for_the_last_that_lives_or_is_refused(
    calls: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = [LINE, LINE | {"job": "2"}, LINE | {"job": "3", "name": "sample"}]
    (tmp_path / "jobs.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    monkeypatch.setenv("QUEUE", "1|RUNNING|None\n2|PENDING|Dependency\n3|PENDING|Priority\n")
    for after in ((), ("1",), ("9",)):
        with pytest.raises(UserError, match="jobs of it wait or run.*`scancel 1 2`, or submit with after=2$"):
            refuse_twice(tmp_path, "train", after)
    refuse_twice(tmp_path, "train", ("2",))  # 2 came after 1
    refuse_twice(tmp_path, "rerank")
    with pytest.raises(UserError, match="`scancel 1 2 3`$"):
        refuse_twice(tmp_path)
    monkeypatch.setenv("QUEUE", "1|RUNNING|None\n2|CANCELLED|Dependency\n")  # what came after 2 would not wait for 1
    with pytest.raises(UserError, match="`scancel 1`"):
        refuse_twice(tmp_path, "train", ("2",))
    monkeypatch.setenv("QUEUE", "1|COMPLETED|None\n2|FAILED|Dependency\n")
    refuse_twice(tmp_path, "train")


def test_the_record_of_jobs_survives_a_cut_line(tmp_path: Path) -> None:
    later = LINE | {"job": "2"}
    (tmp_path / "jobs.jsonl").write_text(f'{json.dumps(LINE)}\n{json.dumps(later)}\n{{"job": "3", "na')
    assert [job.job for job in submitted(tmp_path)] == ["1", "2"]
    assert [job.job for job in newest(submitted(tmp_path))] == ["2"]
    assert submitted(tmp_path / "nowhere") == []
