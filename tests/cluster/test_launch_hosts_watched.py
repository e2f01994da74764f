"""A launch over ssh is watched: who is lost or fails is named, signals are passed on, and the code is the hosts'."""

import errno
import os
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from cluster import launch_hosts as door
from cluster.launch_hosts import HostfileConfig, Watched
from cluster.settings import UserError


@dataclass
class FakeHosts:
    """Notes what it is asked to do, in a file too if it has one; `away` do not answer."""

    names: list[str] = field(default_factory=lambda: ["lab1", "lab2", "lab3"])
    away: list[str] = field(default_factory=list)
    told: list[object] = field(default_factory=list)
    file: Path | None = None

    def note(self, told: object) -> None:
        self.told.append(told)
        if self.file:
            self.file.write_text(str(len(self.told)))

    def silent(self) -> list[str]:
        return self.away

    def tell_ranks(self, interrupt: bool) -> bool:
        self.note("INT" if interrupt else "USR1")
        return True

    def end(self, hosts: list[str]) -> None:
        self.note(list(hosts))


START = """
import os, signal, sys, time

def say(host, code):
    print(f"pdsh@login: {host}: ssh exited with exit code {code}", file=sys.stderr, flush=True)

def wait_until_told(count):
    until = time.monotonic() + 60
    while not (os.path.exists(FILE) and open(FILE).read() == str(count)) and time.monotonic() < until:
        time.sleep(0.05)

def tell(number):
    os.kill(LAUNCH, number)

"""


def watched(code: str, hosts: FakeHosts, config: HostfileConfig | None = None) -> Watched:
    """A launch by this Python code instead of DeepSpeed's launcher."""
    start = f"FILE, LAUNCH = {str(hosts.file)!r}, {os.getpid()}\n{START}"
    command = [sys.executable, "-c", start + code]
    return Watched(command, dict(os.environ), hosts, config or HostfileConfig())  # type: ignore[arg-type]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door, "END_SECONDS", 0.5)


def test_a_lost_host_is_named_and_the_others_are_ended(quick: None) -> None:
    hosts, start = FakeHosts(away=["lab2"]), time.monotonic()
    with pytest.raises(UserError, match="host lab2 does not answer any more.*exclude=lab2 goes on"):
        watched("say('lab2', 255); time.sleep(60)", hosts).run()
    assert ["lab1", "lab3"] in hosts.told
    assert time.monotonic() - start < 30


@pytest.mark.parametrize(
    ("changes", "away", "told"),
    [
        ({"exclude": "lab4"}, ["lab2"], "with exclude=lab4@lab2 goes on"),
        ({"exclude": "lab4@lab2:1"}, ["lab2", "lab3"], "with exclude=lab4@lab2@lab3 goes on"),
        ({"include": "lab1:0,2@lab2:1@lab3"}, ["lab2"], "with include=lab1:0,2@lab3 goes on"),
    ],
)
def test_what_goes_on_without_a_host_keeps_to_the_hosts_that_were_chosen(
    quick: None, changes: dict[str, str], away: list[str], told: str
) -> None:
    with pytest.raises(UserError, match=told):
        watched("say('lab2', 255); time.sleep(60)", FakeHosts(away=away), HostfileConfig(**changes)).run()  # type: ignore[arg-type]


def test_when_no_host_answers_it_is_our_own_network(quick: None) -> None:
    with pytest.raises(UserError, match="^no host answers any more") as caught:
        watched("say('lab2', 255); time.sleep(60)", FakeHosts(away=["lab1", "lab2", "lab3"])).run()
    assert "network of this machine" in str(caught.value) and "exclude" not in str(caught.value)


def test_a_connection_that_broke_for_a_moment_is_told_as_that(quick: None) -> None:
    with pytest.raises(UserError, match="the connection to lab2 broke, though it answers now"):
        watched("say('lab2', 255); time.sleep(60)", FakeHosts()).run()


@pytest.mark.parametrize(
    ("code", "answer"),
    [
        ("", 0), ("sys.exit(3)", 3), ("say('lab1', 75); say('lab2', 75); sys.exit(75)", 75),
        ("say('lab1', 70); say('lab2', 247); sys.exit(247)", 70),
        ("say('lab1', 1)", 1),  # DeepSpeed ends with 0 where pdsh was killed
        ("os.kill(os.getpid(), signal.SIGKILL)", 137),
    ],
)  # fmt: skip
def test_the_code_is_that_of_the_host_that_failed_first(code: str, answer: int) -> None:
    assert watched(code, FakeHosts()).run() == answer


def test_hosts_that_hang_after_another_failed_are_ended(quick: None, tmp_path: Path) -> None:
    class Ends(FakeHosts):
        def end(self, hosts: list[str]) -> None:
            super().end(hosts)
            (tmp_path / "ended").touch()

    hosts = Ends()
    code = f"say('lab1', 1)\nwhile not os.path.exists({str(tmp_path / 'ended')!r}): time.sleep(0.1)\nsys.exit(137)"
    assert watched(code, hosts).run() == 1
    assert hosts.told == [["lab1", "lab2", "lab3"]]


def test_hosts_that_save_are_given_time(quick: None) -> None:
    hosts = FakeHosts()
    assert watched("say('lab1', 75); time.sleep(2); sys.exit(75)", hosts).run() == 75
    assert hosts.told == []


@pytest.mark.parametrize(("number", "told"), [(signal.SIGINT, "INT"), (signal.SIGTERM, "USR1")])
def test_a_signal_goes_to_the_ranks_and_the_second_ends_all(
    quick: None, tmp_path: Path, number: int, told: str
) -> None:
    """The code that stands for DeepSpeed is not in our group, so it does not hear a terminal's Ctrl-C either."""
    hosts = FakeHosts(file=tmp_path / "told")
    code = f"tell({int(number)}); wait_until_told(1); tell({int(number)}); wait_until_told(2); sys.exit(75)"
    assert watched(code, hosts).run() == 75
    assert hosts.told == [told, ["lab1", "lab2", "lab3"]]


@pytest.mark.parametrize(
    "numbers", [(signal.SIGINT, signal.SIGTERM), (signal.SIGHUP, signal.SIGHUP), (signal.SIGUSR1, signal.SIGTERM)]
)
def test_another_signal_or_a_closed_terminals_second_ends_nobody(
    quick: None, tmp_path: Path, numbers: tuple[int, int]
) -> None:
    """Ranks are told once, for they get SIGUSR1 for two of the signals, and would end at its second."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it would not be heard
    try:
        hosts = FakeHosts(file=tmp_path / "told")
        first, second = map(int, numbers)
        code = f"tell({first}); wait_until_told(1); tell({second}); time.sleep(1); sys.exit(75)"
        assert watched(code, hosts).run() == 75
        assert hosts.told == ["INT" if first == signal.SIGINT else "USR1"]
    finally:
        signal.signal(signal.SIGHUP, before)


def test_two_signals_at_once_are_obeyed_one_after_the_other(quick: None, tmp_path: Path) -> None:
    hosts = FakeHosts(file=tmp_path / "told")
    launch = watched("wait_until_told(2); sys.exit(75)", hosts)
    launch.told += [signal.SIGTERM, signal.SIGTERM]
    assert launch.run() == 75
    assert hosts.told == ["USR1", ["lab1", "lab2", "lab3"]]


def test_a_closed_terminal_does_not_stop_the_listening(quick: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written to a terminal that is gone fails; what the hosts say must still be taken from them."""

    def gone(text: str) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(sys.stderr, "write", gone)
    code = "print('x' * 2**20, file=sys.stderr); say('lab1', 70); sys.exit(247)"
    assert watched(code, FakeHosts()).run() == 70
