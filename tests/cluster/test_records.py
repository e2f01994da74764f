"""A file of records is read whatever a kill left of its lines."""

from pathlib import Path

import pytest

from cluster.records import read_records


def test_whole_objects_are_read_and_the_rest_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"step": 1}\n{"st\n[2]\n\xff\xfe\n{"step": 3, "x": "\xff"}\n{"step": 4')
    assert [record["step"] for record in read_records(path)] == [1, 3]
    path.write_bytes(b'{"step": 4}')  # its newline is what the kill took
    assert read_records(path) == [{"step": 4}]


def test_no_file_is_no_records_and_a_folder_neither(tmp_path: Path) -> None:
    assert read_records(tmp_path / "none.jsonl") == read_records(tmp_path) == []


def test_a_file_that_cannot_be_read_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("{}\n")

    def fails(*_: object, **__: object) -> str:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "read_text", fails)
    with pytest.raises(OSError, match="Input/output"):
        read_records(path)
