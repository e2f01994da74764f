"""The faults of the drill: each a function that starts a run once more and lets one thing go wrong.

Each draws its moment from the generator it is given, waits for it, and returns when what it struck has ended.
"""

import os
import re
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random

import psutil

from cluster.checkpoint import SEAL, found_in
from cluster.watch import INTERRUPTED, MINUTE, REQUEUE
from pretrain.drill_run import DrilledRun, Layout, Leg, Missed, NotSurvived, Strike
from pretrain.drill_worker import BYTES, CLEANING, RENAMES

STARTING = 0.2  # share of the kills that come before the first step
START_SECONDS = 4.0  # about what a start takes
MOST_AHEAD = 8  # steps that a start is left alone for: two saves
MOST_DELAY = 0.1  # seconds into what follows a step
END_SECONDS = 25.0  # in which all is over when a rank is lost; torchrun would kill the others after 30
SMALLEST_LIMIT = 1 << 17  # bytes of a file: more than a log of the run has, less than a file of a checkpoint
LAYOUTS = [Layout(processes, stage) for processes in (1, 2) for stage in (1, 2, 3)]

Strikes = Callable[[DrilledRun, Random, Strike], None]


def kill(run: DrilledRun, random: Random, strike: Strike) -> None:
    """SIGKILL of all processes of a run at a random moment, its start included."""
    leg = run.start()
    if random.random() < STARTING:
        time.sleep(random.uniform(0, START_SECONDS))
        strike.how = "after its start"
    else:
        at_random_moment(run, leg, random)
    put_down(run, leg, strike)


def kill_in_save(run: DrilledRun, random: Random, strike: Strike) -> None:
    """SIGKILL inside a save: at a random byte, or between two of its last actions."""
    rank_killed_in_save(run, random, strike, 0)
    if run.layout.processes == 1 and strike.exit != -signal.SIGKILL:
        raise NotSurvived(f"ended with {strike.exit} where its save was to kill it")


def kill_rank(run: DrilledRun, random: Random, strike: Strike) -> None:
    """SIGKILL of one rank alone at a random moment: the other must end by itself."""
    leg = run.start()
    at_random_moment(run, leg, random)
    number = random.randrange(run.layout.processes)
    try:
        leg.ranks()[number].kill()
    except (IndexError, psutil.NoSuchProcess):
        run.wait(leg)
        raise Missed from None
    strike.how = f"rank {number} of {run.layout.processes}"
    ended(run, leg, strike, END_SECONDS)


def kill_rank_in_save(run: DrilledRun, random: Random, strike: Strike) -> None:
    """SIGKILL of one rank alone inside a save: the other must end by itself."""
    rank_killed_in_save(run, random, strike, random.randrange(run.layout.processes))


def damage_checkpoint(run: DrilledRun, random: Random, strike: Strike) -> None:
    """After a kill the newest checkpoint is damaged: the one before is restored, and that is said."""
    leg = run.start()
    at_random_moment(run, leg, random)
    put_down(run, leg, strike)
    found = found_in(run.out / "checkpoints")
    if not found:
        return
    folder = found[-1][1]
    path = random.choice([path for path in sorted(folder.iterdir()) if path.is_file()])
    ways = [damage_by_flip, damage_by_cut, damage_by_removal]
    ways[random.randrange(len(ways))](path, random)
    strike.how = f"{path.name} {damage(path, random)}"


def cut_shard(run: DrilledRun, random: Random, strike: Strike) -> None:
    """After a kill a shard that is trained on is cut: what it has lost is replaced by other samples."""


def disk_full(run: DrilledRun, random: Random, strike: Strike) -> None:
    """No file may grow beyond a random size for a while: a save fails and says so, later ones succeed."""


def stop_by_sigterm(run: DrilledRun, random: Random, strike: Strike) -> None:
    """SIGTERM at a random moment: saved at the next step edge, exit code 75."""
    signalled(run, random, strike, signal.SIGTERM, REQUEUE)


def stop_by_sigint(run: DrilledRun, random: Random, strike: Strike) -> None:
    """Ctrl-C at a random moment: saved at the next step edge, exit code 130."""
    signalled(run, random, strike, signal.SIGINT, INTERRUPTED)
