"""Four hosts on one machine, and what `smalti launch hostfile` promises on them, tried for real.

    python -m tests.lab.hosts

Each host is a network, process, mount and name space of its own with an sshd; a fifth, without, is where the commands
are given. No address is added to the machine itself, nothing is written outside of a temporary folder, and all is gone
at the end. Needs root, `ip`, `sshd` and `pdsh`; takes some minutes on two cores. Prints a line per claim and ends with
1 if one does not hold.
"""

import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.small import SMALL_DVAE

ROOT = Path(__file__).resolve().parents[2]
HOSTS = ("lab1", "lab2", "lab3", "lab4")
LOGIN = "lab0"
CUT = "lab3"
SWITCH = "labswitch"
MARK = b"SMALTI_LAUNCH="
STEPS, STOP_AT, CUT_AT = 240, 30, 90
NAMES_HOST_IN = 120.0  # seconds that a job may live without one of its hosts
RUN_SECONDS = 400.0
WORDS = ["n=1", "a b", "$HOME `x` \\ \"q\" 'r'", "semi;colon", "it's", "50%n %h", "*", "[1,2]", "tab\there"]
TRAIN = [
    "emoji", f"n_steps={STEPS}", "precision=fp32", "model.n_layers=2", "model.n_heads=2", "model.d_head=16",
    "data.batch=12", "evaluate_every=120", "save_every=20", "optim.warmup_steps=4",
]  # fmt: skip


class Lab:
    """The hosts, from `up` to the end of the stack; a shared folder is all that they have in common."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.folder, self.stack = folder, stack

    def up(self) -> None:
        """Start them."""
        run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / "key"))
        (self.folder / "authorized_keys").write_text((self.folder / "key.pub").read_text())
        addresses = {name: f"10.78.0.{number}" for number, name in enumerate((LOGIN, *HOSTS), 10)}
        lines = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in addresses.items())]
        (self.folder / "hosts").write_text("\n".join(lines) + "\n")
        (self.folder / "ssh_config").write_text(
            f"IdentityFile {self.folder}/key\nStrictHostKeyChecking no\nUserKnownHostsFile /dev/null\nLogLevel ERROR\n"
        )
        self._space(SWITCH)
        ip("-n", SWITCH, "link", "add", "bridge", "type", "bridge")
        ip("-n", SWITCH, "link", "set", "bridge", "up")
        for name, address in addresses.items():
            self._space(name)
            ip("link", "add", "eth0", "netns", name, "type", "veth", "peer", "name", name, "netns", SWITCH)
            ip("-n", SWITCH, "link", "set", name, "master", "bridge", "up")
            ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
            if name != LOGIN:
                self._sshd(name, address)

    def _space(self, name: str) -> None:
        ip("netns", "add", name)
        self.stack.callback(ip, "netns", "del", name)
        ip("-n", name, "link", "set", "lo", "up")

    def _sshd(self, name: str, address: str) -> None:
        config = self.folder / f"sshd_{name}"
        config.write_text(
            f"HostKey {self.folder}/key\nAuthorizedKeysFile {self.folder}/authorized_keys\nListenAddress {address}\n"
            "StrictModes no\nUsePAM no\nPermitRootLogin prohibit-password\nPidFile none\nMaxStartups 100\n"
        )
        words = self.inside(name, ["/usr/sbin/sshd", "-D", "-E", str(self.folder / f"{name}.log"), "-f", str(config)])
        daemon = subprocess.Popen(words, stdin=subprocess.DEVNULL, start_new_session=True)
        self.stack.callback(end, daemon)

    def inside(self, name: str, command: list[str]) -> list[str]:
        """A command in the spaces of a host; all that it starts ends with it."""
        setup = (
            f"hostname {name}; mount -t tmpfs tmpfs /run; mkdir /run/sshd; mount --bind {self.folder}/hosts /etc/hosts;"
            f" mount --bind {self.folder}/ssh_config /etc/ssh/ssh_config; exec {shlex.join(command)}"
        )
        spaces = ["--uts", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child"]
        return ["nsenter", f"--net=/run/netns/{name}", "unshare", *spaces, "sh", "-c", setup]

    def cut(self, name: str) -> None:
        """Pull the cable."""
        ip("-n", SWITCH, "link", "set", name, "down")

    @contextmanager
    def command(self, words: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
        """Give a command on the login host; it is ended with the block."""
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        with open(log, "wb") as file:
            process = subprocess.Popen(
                self.inside(LOGIN, [sys.executable, *words]),
                cwd=self.folder, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
        try:
            yield process
        finally:
            end(process)

    def tell(self, process: subprocess.Popen[bytes], number: int) -> None:
        """A signal for the program itself, which is the child of `unshare`, which is what nsenter became."""
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(children[0]), number)

    def running(self) -> list[str]:
        """Processes of a launch on hosts whose cable is never pulled."""
        found = []
        for one in Path("/proc").glob("[0-9]*"):
            try:
                if MARK in (one / "environ").read_bytes() and (host := hostname_of(one)) != CUT:
                    found.append(f"{one.name} on {host}")
            except OSError:
                continue
        return found


def hostname_of(process: Path) -> str:
    """Of the name space that a process lives in."""
    return run("nsenter", f"--uts={process}/ns/uts", "hostname").strip()


class Claims:
    """What was tried, and whether it held."""

    def __init__(self) -> None:
        self.failed = 0

    def hold(self, claim: str, held: bool, seconds: float, log: Path | None = None) -> None:
        """Print a line; what the log says at its end if the claim does not hold."""
        print(f"{'ok' if held else 'FAILED':<7}{seconds:6.1f} s  {claim}", flush=True)
        if not held:
            self.failed += 1
            if log:
                print("".join(f"        | {line}\n" for line in log.read_text(errors="replace").splitlines()[-25:]))


def run(*words: str) -> str:
    """What a command prints; it must end well."""
    done = subprocess.run(words, capture_output=True, text=True, timeout=RUN_SECONDS, check=False)
    if done.returncode:
        raise SystemExit(f"{shlex.join(words)}: {done.stderr[-3000:]}")
    return done.stdout


def ip(*words: str) -> None:
    run("ip", *words)


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill a process whose end is that of all it started."""
    process.kill()
    process.wait()


def until(condition: Callable[[], bool], process: subprocess.Popen[bytes], seconds: float = RUN_SECONDS) -> bool:
    """Wait for it; False if the process ends first, or the time is over."""
    start = time.monotonic()
    while not condition():
        if process.poll() is not None or time.monotonic() - start > seconds:
            return condition()
        time.sleep(0.1)
    return True


def last_step(out: Path) -> int:
    path = out / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=-1)


def make_data(folder: Path) -> list[str]:
    """Tokens and a vocabulary from the embedded pictures; the settings that name them."""
    smalti = [sys.executable, "-m", "pretrain.cli"]
    run(*smalti, "preprocess", "emoji", f"out={folder}/data")
    run(*smalti, "dvae", *SMALL_DVAE, f"images={folder}/data/images", f"out={folder}/dvae")
    run(
        *smalti, "tokenise", f"images={folder}/data/images", f"vocab={folder}/data/vocab", f"dvae={folder}/dvae",
        f"out={folder}/data/tokens",
    )  # fmt: skip
    return [f"tokens={folder}/data/tokens", f"vocab={folder}/data/vocab", f"out={folder}/run"]


def try_words(lab: Lab, claims: Claims) -> None:
    """Words and variables reach every rank as they were given."""
    log, start = lab.folder / "words.log", time.monotonic()
    value = "a $b \"c\" 'd' 5%"
    code = (
        "import sys; from cluster.launch import Program; from cluster.launch_hosts import HostfileConfig, launch_hosts;"
        f"sys.exit(launch_hosts(HostfileConfig(hostfile='hostfile', env={'LAB_VALUE=' + value!r}), "
        f"Program('say', 'tests.lab.hosts', {('say', *WORDS)!r}, None, '')))"
    )
    with lab.command(["-c", code], log) as process:
        until(lambda: False, process)
    said = [json.loads(line.partition(": ")[2]) for line in log.read_text().splitlines() if ': {"' in line]
    held = sorted(one.pop("rank") for one in said) == ["0", "1", "2", "3"]
    held = held and all(one == {"words": WORDS, "value": value, "world": "4"} for one in said)
    claims.hold("four ranks get every word and variable as given, whatever a shell makes of it",
                held and process.returncode == 0, time.monotonic() - start, log)  # fmt: skip


def try_stop(lab: Lab, claims: Claims, words: list[str]) -> None:
    """SIGTERM to the launcher: all ranks save, and the code says so."""
    log, start = lab.folder / "stop.log", time.monotonic()
    with lab.command(words, log) as process:
        reached = until(lambda: last_step(lab.folder / "run") >= STOP_AT, process)
        claims.hold(f"training on four hosts reaches step {STOP_AT}", reached, time.monotonic() - start, log)
        start = time.monotonic()
        if reached:
            lab.tell(process, signal.SIGTERM)
        until(lambda: False, process, 90)
        held = process.returncode == 75 and "saved at step" in log.read_text(errors="replace")
        claims.hold("SIGTERM to the launcher: saved, exit code 75", held, time.monotonic() - start, log)
        claims.hold("nothing is left running", not lab.running(), 0.0)


def try_cut(lab: Lab, claims: Claims, words: list[str]) -> None:
    """A host's link goes down in the middle of the run."""
    log, start = lab.folder / "cut.log", time.monotonic()
    with lab.command(words, log) as process:
        reached = until(lambda: last_step(lab.folder / "run") >= CUT_AT, process)
        resumed = "resumed at step" in log.read_text(errors="replace")
        held = reached and resumed and len(lab.running()) >= len(HOSTS) - 1  # so that an empty list means something
        claims.hold(f"the same command goes on, to step {CUT_AT}", held, time.monotonic() - start, log)
        start = time.monotonic()
        lab.cut(CUT)
        ended = until(lambda: False, process, NAMES_HOST_IN) or process.poll() is not None
        said = log.read_text(errors="replace")
        held = ended and process.returncode == 1 and f"host {CUT} does not answer any more" in said
        step = last_step(lab.folder / "run")
        claims.hold(
            f"{CUT} loses its link at step {step}: the job ends by itself and names it", held,
            time.monotonic() - start, log,
        )  # fmt: skip
        print("        | " + next((line for line in said.splitlines() if "does not answer" in line), "(not named)"))
        left = lab.running()
        claims.hold(f"nothing is left running on the other hosts {left or ''}", not left, 0.0)


def try_three(lab: Lab, claims: Claims, words: list[str]) -> None:
    """The same command without the lost host."""
    log, start = lab.folder / "three.log", time.monotonic()
    with lab.command(words, log) as process:
        until(lambda: False, process)
    said = log.read_text(errors="replace")
    resumed = next((line for line in said.splitlines() if "resumed at step" in line), "")
    held = process.returncode == 0 and (lab.folder / "run" / "manifest.json").is_file() and bool(resumed)
    told = resumed.partition("transformer: ")[2] or "not resumed"
    claims.hold(f"on the three others the run goes on ({told}) and finishes", held, time.monotonic() - start, log)
    with lab.command([word for word in words if word != f"exclude={CUT}"], log) as process:
        start = time.monotonic()
        until(lambda: False, process)
    held = process.returncode == 1 and f"no ssh connection to {CUT}" in log.read_text(errors="replace")
    claims.hold("a host that is down at the start is named at once", held, time.monotonic() - start, log)


def say() -> None:
    """As a rank: what it was given."""
    value, world = os.environ["LAB_VALUE"], os.environ["WORLD_SIZE"]
    print(json.dumps({"rank": os.environ["RANK"], "words": sys.argv[2:], "value": value, "world": world}), flush=True)


def main() -> int:
    """Try everything; 1 if a claim failed."""
    if os.geteuid() != 0:
        raise SystemExit("tests.lab.hosts makes network namespaces, which only root may")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as Ctrl-C: through the stack, which removes everything
    claims = Claims()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="smalti-lab-")))
        start = time.monotonic()
        data = make_data(folder)
        claims.hold("images, dVAE and tokens from the embedded data", True, time.monotonic() - start)
        lab, start = Lab(folder, stack), time.monotonic()
        lab.up()
        (folder / "hostfile").write_text("".join(f"{name} slots=1\n" for name in HOSTS))
        claims.hold("four hosts with sshd", True, time.monotonic() - start)
        launch = ["-m", "pretrain.cli", "launch", "hostfile", "hostfile=hostfile"]
        train = ["train", *TRAIN, *data]
        try_words(lab, claims)
        try_stop(lab, claims, [*launch, *train])
        try_cut(lab, claims, [*launch, *train])
        try_three(lab, claims, [*launch, f"exclude={CUT}", *train])
    print("every claim held" if not claims.failed else f"{claims.failed} claims failed", flush=True)
    return 1 if claims.failed else 0


if __name__ == "__main__":
    sys.exit(say() if sys.argv[1:2] == ["say"] else main())
