"""Drill: a tiny run is hit by faults at random moments, and must end as the run that was left alone.

    smalti drill --faults 50 --seed 1           a table at the end; exit code 0 only if all was survived
    smalti drill --json                         a JSON line a fault when its run has ended, and one with the totals

Trains on a part of the embedded emoji, undisturbed; then again while it is killed, stopped, starved of disk, given
damaged files and bad numbers, and each time started again by the same command. Final weights, every logged number
and the ledger must be those of the undisturbed run, bit for bit (`how` tells where processes change, and with them
the order of sums: weights and losses then agree to 1e-5). A fault takes some 10 seconds on 2 CPU cores. For Linux.
"""

import itertools
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from types import FrameType
from typing import Any

from cluster.command import Command, run_command
from cluster.ledger import NAME as LEDGER
from cluster.manifest import NAME as MANIFEST
from cluster.settings import SettingError, UserError, require_at_least_one, setting
from pretrain.drill_faults import FAULTS
from pretrain.drill_run import TOLERANCE, Cut, DrilledRun, Equal, Layout, Missed, NotSurvived, Strike, compare
from pretrain.drill_worker import Accident

N_STEPS, SAVE_EVERY = 48, 4
TRAIN = [
    "emoji", f"n_steps={N_STEPS}", f"save_every={SAVE_EVERY}", "evaluate_every=16", "precision=fp32",
    "bpe_dropout=0.1", "caption_dropout=0.1", "model.n_layers=2", "model.n_heads=2", "model.d_head=16",
    "data.batch=8", "data.max_bad_share=1", "optim.warmup_steps=4", "optim.average_every=3",
]  # fmt: skip
DVAE = [
    "emoji-64", "n_steps=4", "model.width=32", "model.n_init=32", "model.codebook=64", "data.batch=8",
    "schedule.lr_steps=4", "evaluate_every=4", "save_every=4",
]  # fmt: skip
PREPROCESS = ["emoji", "source=emoji:heldout", "heldout_source=", "heldout_fraction=0.2", "vocab_size=600"]
STAGE_SECONDS = 300.0  # that a stage which makes the data may take
MOST_IN_A_RUN, MOST_GUESTS = 6, 2  # faults of a run: of its own kind, and of others
MOST_NANS = 3  # updates of a run that are spoilt
LEAST_LEFT = 16  # steps of a run that another fault may strike: it is done before
MOST_TRIES = 4  # of a fault that a run is over too early for

# Which faults may strike the same run, for they have the same undisturbed run to be compared with.
GUESTS = ("kill", "kill_in_save", "sigterm", "sigint", "time_limit")  # that may strike any run of one process
ONE = (*GUESTS, "damage_checkpoint", "disk_full")
SEVERAL = ("kill_rank", "kill_rank_in_save")
NANS = {"nan_skip": "leave_out", "nan_rollback": "pass_over"}  # and what they should come to
KINDS = (*ONE, *SEVERAL, "other_layout", "cut_shard", *NANS)


@dataclass(frozen=True)
class DrillConfig:
    """How much befalls the runs."""

    faults: int = setting(50, "faults that must happen")
    seed: int = setting(0, "decides which faults, when and where")
    kinds: tuple[str, ...] = setting((), f"only these, with commas between; none: all of {', '.join(KINDS)}")
    json: bool = setting(False, "print JSON lines")
    data: str = setting("", "folder with tokens/ and vocab/ to train on; empty: made in out")
    out: str = setting("drill", "folder to work in")

    def __post_init__(self) -> None:
        require_at_least_one(self, ("faults",))
        if unknown := sorted(set(self.kinds) - set(KINDS)):
            raise SettingError(f"kinds={','.join(unknown)} is none of {', '.join(KINDS)}")


@dataclass(eq=False)
class Due:
    """A fault that is to happen."""

    number: int
    kind: str
    tries: int = 0


class Ground:
    """The folder that the drill works in, and the undisturbed runs in it."""

    def __init__(self, config: DrillConfig) -> None:
        self.config, self.out = config, Path(config.out)
        self.data = Path(config.data) if config.data else made_data(self.out / "data")
        self._undisturbed: dict[str, Path] = {}
        for name in ("undisturbed", "disturbed"):  # of an earlier drill
            shutil.rmtree(self.out / name, ignore_errors=True)

    def new_run(
        self, name: str, kind: str, layout: Layout, accidents: list[Accident], own_tokens: bool = False
    ) -> DrilledRun:
        """A run for a kind of fault that has not begun."""
        folder, tokens = self.out / name, self.data / "tokens"
        folder.mkdir(parents=True)
        if own_tokens:
            tokens = shutil.copytree(tokens, folder / "tokens")
        words = [*TRAIN, f"vocab={self.data / 'vocab'}"]
        if kind in NANS:
            words.append(f"on_bad_numbers={kind.removeprefix('nan_')}")
        return DrilledRun(folder, words, tokens, layout, accidents)

    def undisturbed(self, number: int, kind: str, nans: list[int], was_cut: Cut | None) -> Path:
        """The folder of the run that one with these faults must equal, made when it is first asked for."""
        layout = layout_of(kind, number)
        name = f"{kind}-{number}" if nans or was_cut else str(layout).replace(" ", "-")
        if name not in self._undisturbed:
            accidents: list[Accident] = [[NANS[kind], {"steps": nans}]] if nans else []
            run = self.new_run(f"undisturbed/{name}", kind, layout, accidents, own_tokens=was_cut is not None)
            if was_cut:
                path = str(run.tokens / was_cut.file)
                run.accidents = [["cut_file", {"path": path, "n_bytes": was_cut.n_bytes, "step": was_cut.step}]]
            try:
                run.finish()
            except NotSurvived as error:
                raise UserError(f"the undisturbed run in {run.folder} {error}") from None
            finally:
                run.close()
            self._undisturbed[name] = run.out
        return self._undisturbed[name]


def drill(config: DrillConfig) -> None:
    """Let the faults happen; see the module's text. UserError if one was not survived."""
    started = time.monotonic()
    signal.signal(signal.SIGTERM, interrupt)
    print(f"smalti drill: seed {config.seed}, {config.faults} faults, in {config.out}", file=sys.stderr, flush=True)
    lines = []
    for line in disturbed(Ground(config), drawn(config)):
        lines.append(line)
        if config.json:
            print(json.dumps(line), flush=True)
    totals = {
        "faults": len(lines),
        **{name: sum(line[name] for line in lines) for name in ("recovered", *asdict(Equal()))},
        "steps_lost": sum(line["steps_lost"] or 0 for line in lines),
        "runs": len({line["run"] for line in lines}),
        "seed": config.seed,
        "seconds": round(time.monotonic() - started),
    }
    print(json.dumps(totals) if config.json else table(lines, totals), flush=True)
    if bad := [line for line in lines if not is_survived(line)]:
        said = "; ".join(f"{line['fault']} at step {line['step']} of run {line['run']}" for line in bad[:3])
        raise UserError(f"{len(bad)} of {len(lines)} faults were not survived ({said}); see {config.out}")


def is_survived(line: dict[str, Any]) -> bool:
    return line["recovered"] and line["steps_lost"] == 0 and all(line[name] for name in asdict(Equal()))


def drawn(config: DrillConfig) -> list[Due]:
    """The faults of a drill in a random order; as many of each kind as of any other, to one."""
    random = Random(f"{config.seed}")
    kinds: list[str] = []
    while len(kinds) < config.faults:
        kinds += random.sample(config.kinds or KINDS, len(config.kinds or KINDS))
    return [Due(number, kind) for number, kind in enumerate(kinds[: config.faults], 1)]


def disturbed(ground: Ground, queue: list[Due]) -> Iterator[dict[str, Any]]:
    """Run after run until all faults have happened; the lines of each when it has ended."""
    for number in itertools.count(1):
        if not queue:
            return
        hosted = taken(queue)
        kind = hosted[0].kind
        run, nans = begun(ground, number, hosted)
        try:
            strike_all(ground.config.seed, run, [due for due in hosted if due.kind not in NANS], queue)
            run.finish()
            run.strikes += [told_nan(run, due, step) for due, step in nans.items()]
        except NotSurvived as error:
            run.strikes = run.strikes or [Strike(kind, hosted[0].number)]
            run.strikes[-1].problem = str(error)
        finally:
            run.close()
        yield from judged(ground, number, kind, run, sorted(nans.values()))


def taken(queue: list[Due]) -> list[Due]:
    """The next faults that can strike one run, out of the queue; those of the run's own kind first."""
    kind = queue[0].kind
    own = next((kinds for kinds in (ONE, SEVERAL) if kind in kinds), (kind,))
    most = {"cut_shard": 1}.get(kind, MOST_NANS if kind in NANS else MOST_IN_A_RUN)
    chosen = [due for due in queue if due.kind in own][:most]
    if kind == "cut_shard" or kind in NANS:
        chosen += [due for due in queue if due.kind in GUESTS][:MOST_GUESTS]
    for due in chosen:
        queue.remove(due)
    return chosen


def begun(ground: Ground, number: int, hosted: list[Due]) -> tuple[DrilledRun, dict[Due, int]]:
    """A run for these faults, and the steps of those that are bad numbers."""
    kind = hosted[0].kind
    nans = [due for due in hosted if due.kind in NANS]
    random = Random(f"{ground.config.seed}/run {number}")
    steps = dict(zip(nans, random.sample(range(SAVE_EVERY + 1, N_STEPS - 1), len(nans)), strict=True))
    accidents: list[Accident] = []
    if nans:
        accidents = [["spoil_gradients", {"steps": list(steps.values())}], ["tell_rollbacks", {}]]
    layout = layout_of(kind, number)
    run = ground.new_run(f"disturbed/{number:02}", kind, layout, accidents, own_tokens=kind == "cut_shard")
    return run, steps


def layout_of(kind: str, number: int) -> Layout:
    return Layout(2, 1 + number % 3) if kind in SEVERAL else Layout()


def strike_all(seed: int, run: DrilledRun, dues: list[Due], queue: list[Due]) -> None:
    """Let faults strike a run; those for which it is over too early go back to the queue. NotSurvived."""
    for at, due in enumerate(dues):
        if run.sealed() > N_STEPS - LEAST_LEFT:
            queue[:0] = dues[at:]
            return
        strike = Strike(due.kind, due.number)
        print(f"smalti drill: fault {due.number}, {due.kind}, in {run.folder}", file=sys.stderr, flush=True)
        try:
            FAULTS[due.kind](run, Random(f"{seed}/{due.number}/{due.tries}"), strike)
        except Missed:
            due.tries += 1
            if due.tries == MOST_TRIES:
                raise NotSurvived(f"{due.kind} was to happen {MOST_TRIES} times, and the run was over before") from None
            queue[:0] = dues[at:]
            return
        except NotSurvived:
            run.struck(strike)
            queue[:0] = dues[at + 1 :]
            raise
        run.struck(strike)


def told_nan(run: DrilledRun, due: Due, step: int) -> Strike:
    """What a run said of a gradient that was spoilt: that it was left out, and what it went back to."""
    strike = Strike(due.kind, due.number, step, recovered=True, steps_lost=0)
    said = "".join(leg.said() for leg in run.legs)
    if f"step {step}: an Inf or NaN" not in said:
        strike.problem = "was not told"
    if due.kind == "nan_rollback":
        found = re.findall(rf"step {step}: an Inf or NaN.*\n(?:.*\n)*?rolled back to (-?\d+), sealed (-?\d+)", said)
        if found:
            strike.resumed_at, sealed = map(int, found[-1])
            strike.steps_lost = sealed - strike.resumed_at
        else:
            strike.problem = "did not roll back"
    return strike


def judged(ground: Ground, number: int, kind: str, run: DrilledRun, nans: list[int]) -> Iterator[dict[str, Any]]:
    """A line for each fault that struck a run: what it did there, and how the run compares at its end."""
    equal = Equal()
    if not any(strike.problem for strike in run.strikes):
        tolerance = TOLERANCE if kind == "other_layout" else 0.0
        equal = compare(run.out, ground.undisturbed(number, kind, nans, run.was_cut), tolerance)
    if kind == "cut_shard" and run.strikes and '"bad":' not in (run.out / LEDGER).read_text():
        run.strikes[0].problem = "no sample of the shard was replaced"
    for strike in run.strikes:
        yield {"run": number} | strike.line() | asdict(equal)


def table(lines: list[dict[str, Any]], totals: dict[str, Any]) -> str:
    """Fault by fault, in Markdown: how often, and how often all was well."""
    columns = ("recovered", *asdict(Equal()))
    rows = [["fault", "times", "steps lost", *(name.replace("_", " ") for name in columns)]]
    for kind in [kind for kind in KINDS if any(line["fault"] == kind for line in lines)] + ["all"]:
        some = [line for line in lines if kind in (line["fault"], "all")]
        lost = sum(line["steps_lost"] or 0 for line in some)
        rows.append([kind, str(len(some)), str(lost), *(str(sum(line[name] for line in some)) for name in columns)])
    rows.insert(1, ["---"] * len(rows[0]))
    text = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return f"{text}\n\nseed {totals['seed']}, {totals['runs']} runs, {totals['seconds']} s"


def made_data(folder: Path) -> Path:
    """Token shards and a vocabulary of a part of the emoji, made unless they are there. UserError if a stage fails."""
    images, vocab, dvae = f"images={folder}/images", f"vocab={folder}/vocab", folder / "dvae"
    stages = [
        ["preprocess", *PREPROCESS, f"out={folder}"],
        ["dvae", *DVAE, images, f"out={dvae}"],
        ["tokenise", images, vocab, f"dvae={dvae}", f"out={folder}/tokens"],
    ]
    for words in [] if (folder / "tokens" / MANIFEST).is_file() else stages:
        command = [sys.executable, "-m", "pretrain.cli", *words]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=STAGE_SECONDS)
        if done.returncode:
            raise UserError(f"`smalti {words[0]}` failed: {done.stderr.strip().splitlines()[-1]}")
    return folder


def interrupt(number: int, frame: FrameType | None) -> None:
    """SIGTERM is Ctrl-C: the runs must not outlive the drill."""
    raise KeyboardInterrupt


COMMAND = Command("drill", DrillConfig, Path(__file__).parent / "configs" / "drill", drill, __doc__)

if __name__ == "__main__":
    sys.exit(run_command(COMMAND, sys.argv[1:]))
