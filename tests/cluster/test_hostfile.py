"""DeepSpeed's hostfile and its words for choosing: what is read, and how a mistake is told."""

from pathlib import Path

import pytest

from cluster.hostfile import chosen_slots, read_hostfile
from cluster.settings import SettingError

HOSTS = {"node1": 4, "node2": 2, "node3": 1}


def written(folder: Path, text: str) -> Path:
    path = folder / "hosts"
    path.write_text(text)
    return path


def test_hosts_are_read_in_the_order_of_the_file(tmp_path: Path) -> None:
    path = written(tmp_path, "# two\nnode2 slots=8\n\n  node-1.lan\tslots=4  # older\nme@10.0.0.1   slots=1\n")
    assert list(read_hostfile(path).items()) == [("node2", 8), ("node-1.lan", 4), ("me@10.0.0.1", 1)]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("node1 slots=8\nnode2 8\n", "line 2: 'node2 8' must be a host and its processes"),
        ("node1\n", "line 1: 'node1' must be"), ("node1 slots=0\n", "line 1: 'node1 slots=0' must be"),
        ("node1 slots=8x\n", "line 1"), ("\n-oProxyCommand=x slots=1\n", "line 2"), ("a;b slots=1\n", "line 1"),
        ("a slots=1\nb slots=1\na slots=2\n", "line 3: a stands in the file twice"),
        ("# nothing\n", "names no host"),
    ],
)  # fmt: skip
def test_a_wrong_line_is_named(tmp_path: Path, text: str, told: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(SettingError) as caught:
        read_hostfile(path)
    assert told in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_hostfile_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="no-hosts.* cannot be read"):
        read_hostfile(tmp_path / "no-hosts")


@pytest.mark.parametrize(
    ("include", "exclude", "left"),
    [
        ("", "", {"node1": [0, 1, 2, 3], "node2": [0, 1], "node3": [0]}),
        ("node3@node1:0,2", "", {"node1": [0, 2], "node3": [0]}),
        ("node1:3@node1:1,1", "", {"node1": [1, 3]}),
        ("", "node2@node1:1", {"node1": [0, 2, 3], "node3": [0]}),
        ("", "node2:0,1", {"node1": [0, 1, 2, 3], "node3": [0]}),
    ],
)
def test_hosts_and_slots_are_chosen_as_deepspeed_does(include: str, exclude: str, left: dict[str, list[int]]) -> None:
    chosen = chosen_slots(HOSTS, include, exclude)
    assert list(chosen.items()) == list(left.items())


@pytest.mark.parametrize(
    ("include", "exclude", "told"),
    [
        ("node1", "node2", "cannot be given together"), ("node4", "", "host 'node4' is not in the hostfile"),
        ("", "node1,node2", "host 'node1,node2' is not in"), ("node2:2", "", "node2 has no slot 2, only 0 to 1"),
        ("node1:a", "", "'node1:a' must be a host"), ("node1:", "", "'node1:' must be a host"),
        ("", "node1@node2@node3", "leaves no process"),
    ],
)  # fmt: skip
def test_a_choice_that_cannot_be_is_refused(include: str, exclude: str, told: str) -> None:
    with pytest.raises(SettingError) as caught:
        chosen_slots(HOSTS, include, exclude)
    assert told in str(caught.value)
