"""The faults of the drill: each a function that starts a run once more and lets one thing go wrong.

A fault draws its moment from the generator it is given, waits for it, and returns when the start it struck has
ended. Missed if the run was over before; NotSurvived if it did what it should not.
"""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from random import Random

import psutil

from cluster.checkpoint import found_in
from cluster.watch import INTERRUPTED, MINUTE, REQUEUE
from pretrain.drill_run import LEG_SECONDS, Cut, DrilledRun, Layout, Leg, Missed, NotSurvived, Strike
from pretrain.drill_worker import BYTES, CLEANING, NAMINGS

START_SECONDS = 4.0  # about what a start takes before its first step
MOST_AHEAD = 8  # steps that a start is left alone for: two saves
MOST_DELAY = 0.1  # seconds into what follows a step: some steps, or a save
END_SECONDS = 25.0  # in which all is over when a rank is lost; torchrun would kill the others after 30
SMALLEST_LIMIT = 1 << 17  # bytes of a file: more than a log of the run has, less than a file of a checkpoint
PAGE = 4096  # bytes in which a small disk is filled
LAYOUTS = [Layout(processes, stage) for processes in (1, 2) for stage in (1, 2, 3)]
FAILED = "could not save"

Fault = Callable[[DrilledRun, Random, Strike], None]


def kill(run: DrilledRun, random: Random, strike: Strike) -> None:
    """SIGKILL of all processes of a run at a random moment, its start included."""
    leg = run.start()
    if random.random() < 0.2:
        seconds = random.uniform(0, START_SECONDS)
        strike.how = f"{seconds:.2f} s after its start"
        time.sleep(seconds)
    else:
        to_random_moment(run, leg, random)
    put_down(run, leg, strike)


def kill_in_save(run: DrilledRun, random: Random, strike: Strike) -> None:
    """SIGKILL of a run inside a save: at a random byte, or between two of the last actions."""
    leg = run.start(accidents=[save_accident(run, random, strike, 0)])
    ended(run, leg, strike)
    if strike.exit != -signal.SIGKILL:
        raise NotSurvived(f"ended with {strike.exit} where its save was to kill it: {leg.last_words()}")


def kill_rank(run: DrilledRun, random: Random, strike: Strike) -> None:
    """SIGKILL of one rank alone at a random moment: the other must end by itself."""
    leg = run.start()
    to_random_moment(run, leg, random)
    number = random.randrange(run.layout.processes)
    strike.how = f"rank {number} of {run.layout.processes}"
    with suppress(psutil.NoSuchProcess):  # `ended` finds out how it ended
        leg.ranks[number].kill()
    outlived(run, leg, strike)


def kill_rank_in_save(run: DrilledRun, random: Random, strike: Strike) -> None:
    """SIGKILL of one rank alone inside a save: the other must end by itself."""
    leg = run.start(accidents=[save_accident(run, random, strike, random.randrange(run.layout.processes))])
    run.reach(leg, 0)
    leg.until(leg.has_lost_a_rank, "the loss of a rank")
    outlived(run, leg, strike)


def damage_checkpoint(run: DrilledRun, random: Random, strike: Strike) -> None:
    """After a kill the newest checkpoint is damaged: the one before is restored, and that is said."""
    kill_once_saved(run, random, strike)
    folder = found_in(run.out / "checkpoints")[-1][1]
    path = random.choice([path for path in sorted(folder.iterdir()) if path.is_file()])
    way = random.choice((flip, cut, remove))
    way(path, random)
    strike.how = f"{way.__name__} {folder.name}/{path.name}"
    run.must_say = f"passing over {folder}:"


def cut_shard(run: DrilledRun, random: Random, strike: Strike) -> None:
    """After a kill the shard that is trained on is cut: what it has lost is replaced by other samples."""
    kill_once_saved(run, random, strike)  # a run that has nothing yet wants its data whole
    path = min(run.tokens.glob("train-*.tar"))
    n_bytes = random.randrange(path.stat().st_size // 4, path.stat().st_size * 3 // 4)
    os.truncate(path, n_bytes)
    strike.how = f"{path.name} to {n_bytes} bytes"
    run.was_cut = Cut(path.name, n_bytes, run.sealed())


def disk_full(run: DrilledRun, random: Random, strike: Strike) -> None:
    """The disk is full for a while: a save fails and says so, the run goes on, later saves succeed.

    A small disk of its own for the checkpoints if root may mount one; else, or by chance, a limit on files.
    """
    folder = run.out / "checkpoints"
    with small_disk(folder, random) as ballast:
        strike.how = f"{shutil.disk_usage(folder).free} bytes free" if ballast else ""
        leg = run.start()
        try:
            if not ballast:
                to_random_moment(run, leg, random)
                limit = random.randrange(SMALLEST_LIMIT, 2 * SMALLEST_LIMIT)
                strike.how = f"files of up to {limit} bytes"
                limit_files(leg, limit)
            leg.until(lambda: FAILED in leg.said(), "word of a failed save")
            if ballast:
                ballast.unlink()
            else:
                limit_files(leg, psutil.RLIM_INFINITY)
            before = run.sealed()
            leg.until(lambda: run.sealed() > before, "a save when there is room again")
            leg.process.send_signal(signal.SIGTERM)
            ended(run, leg, strike)
        finally:
            leg.kill()  # or the disk cannot go
    if strike.exit != REQUEUE:
        raise NotSurvived(f"ended with {strike.exit}, not {REQUEUE}: {leg.last_words()}")


def sigterm(run: DrilledRun, random: Random, strike: Strike) -> None:
    """SIGTERM at a random moment: saved at the next step edge, exit code 75."""
    leg = run.start()
    to_random_moment(run, leg, random)
    leg.process.send_signal(signal.SIGTERM)
    stopped(run, leg, strike, REQUEUE)


def sigint(run: DrilledRun, random: Random, strike: Strike) -> None:
    """Ctrl-C at a random moment: saved at the next step edge, exit code 130."""
    leg = run.start()
    to_random_moment(run, leg, random)
    leg.process.send_signal(signal.SIGINT)
    stopped(run, leg, strike, INTERRUPTED)


def time_limit(run: DrilledRun, random: Random, strike: Strike) -> None:
    """`stop_after_minutes` ends the run at a random moment: saved at the next step edge, exit code 75."""
    seconds = random.uniform(0, START_SECONDS / 2)
    strike.how = f"after {seconds:.2f} s"
    leg = run.start([f"stop_after_minutes={seconds / MINUTE}"])
    stopped(run, leg, strike, REQUEUE)


def other_layout(run: DrilledRun, random: Random, strike: Strike) -> None:
    """After a kill the run goes on with another number of processes or another ZeRO stage."""
    leg = run.start()
    to_random_moment(run, leg, random)
    put_down(run, leg, strike)
    old, run.layout = run.layout, random.choice([layout for layout in LAYOUTS if layout != run.layout])
    strike.how = f"{old} to {run.layout}"


def to_random_moment(run: DrilledRun, leg: Leg, random: Random) -> None:
    """Wait for some step soon after the start, and a little longer."""
    step, delay = run.sealed() + random.randrange(MOST_AHEAD), random.uniform(0, MOST_DELAY)
    run.reach(leg, step)
    time.sleep(delay)


def put_down(run: DrilledRun, leg: Leg, strike: Strike) -> None:
    """SIGKILL to all of a start."""
    leg.kill()
    ended(run, leg, strike)
    if strike.exit != -signal.SIGKILL:
        raise NotSurvived(f"ended by itself with {strike.exit}: {leg.last_words()}")


def outlived(run: DrilledRun, leg: Leg, strike: Strike) -> None:
    """A rank is lost: the others end by themselves, and soon."""
    started = time.monotonic()
    ended(run, leg, strike, END_SECONDS)
    strike.how += f"; the rest ended in {time.monotonic() - started:.1f} s"


def kill_once_saved(run: DrilledRun, random: Random, strike: Strike) -> None:
    """`put_down` at a random moment; again and again until there is a checkpoint."""
    while True:
        leg = run.start()
        to_random_moment(run, leg, random)
        put_down(run, leg, strike)
        if run.sealed():
            return


def ended(run: DrilledRun, leg: Leg, strike: Strike, seconds: float = LEG_SECONDS) -> None:
    """Note how a start has ended, within so many seconds. Missed if it was the run's end."""
    strike.exit = run.wait(leg, seconds)
    strike.step = run.logged()
    if strike.exit == 0:
        raise Missed
    if left := leg.left_behind():
        raise NotSurvived(f"left {len(left)} processes behind")


def stopped(run: DrilledRun, leg: Leg, strike: Strike, code: int) -> None:
    """A start that was told to stop ends with this code, saved after the last step that it did."""
    ended(run, leg, strike)
    if strike.exit != code or run.sealed() != strike.step + 1:
        raise NotSurvived(
            f"ended with {strike.exit}, not {code}, saved after step {run.sealed() - 1} of {strike.step}: "
            f"{leg.last_words()}"
        )


def save_accident(run: DrilledRun, random: Random, strike: Strike, rank: int) -> list[object]:
    """A kill of this rank in one of the next saves."""
    size = 1 << 18  # of each rank's files at least
    for _, folder in found_in(run.out / "checkpoints")[-1:]:
        names = [path for path in folder.glob("*.pt") if f"_rank_{rank}_mp" in path.name or rank == 0]
        size = sum(path.stat().st_size for path in names) // run.layout.processes
    moment = random.choice((BYTES, BYTES, *NAMINGS, CLEANING) if rank == 0 else (BYTES, NAMINGS[0]))
    save, byte = random.randint(1, 2), random.randrange(size)
    at = f"byte {byte}" if moment == BYTES else f"before the {moment}"
    strike.how = f"save {save}, {at}" + (f", rank {rank}" if run.layout.processes > 1 else "")
    return ["kill_in_save", {"save": save, "moment": moment, "byte": byte, "rank": rank}]


def limit_files(leg: Leg, n_bytes: int) -> None:
    """From now on no file of these processes may grow beyond this."""
    for rank in leg.ranks:
        with suppress(psutil.Error):  # it is over: who waits for something of it will see
            rank.rlimit(psutil.RLIMIT_FSIZE, (n_bytes, psutil.RLIM_INFINITY))


@contextmanager
def small_disk(folder: Path, random: Random) -> Iterator[Path | None]:
    """A disk at `folder`, full but for less than a checkpoint or hardly more; gives the file to remove to make room.

    None, and nothing is done, if root may not mount here, and half of the times if so. What is in the folder stays.
    """
    found = found_in(folder)
    kept = folder.with_name("kept")
    if not found or random.random() < 0.5:
        yield None
        return
    needed = sum(path.stat().st_size for path in found[-1][1].iterdir())
    free = random.choice((random.randrange(needed), needed + random.randrange(4 * PAGE)))
    shutil.copytree(folder, kept)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={8 * needed // PAGE * PAGE}", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        shutil.rmtree(kept)
        yield None
        return
    try:
        shutil.copytree(kept, folder, dirs_exist_ok=True)
        ballast = folder / "ballast"
        ballast.write_bytes(bytes(shutil.disk_usage(folder).free - free))
        yield ballast
    finally:
        shutil.rmtree(kept)
        shutil.copytree(folder, kept)
        subprocess.run(["umount", str(folder)], check=True, capture_output=True)
        shutil.rmtree(folder)
        kept.rename(folder)


def flip(path: Path, random: Random) -> None:
    """One bit of a file."""
    data = bytearray(path.read_bytes())
    data[random.randrange(len(data))] ^= 1 << random.randrange(8)
    path.write_bytes(data)


def cut(path: Path, random: Random) -> None:
    """The end of a file."""
    os.truncate(path, random.randrange(path.stat().st_size))


def remove(path: Path, random: Random) -> None:
    """A file."""
    path.unlink()


FAULTS: dict[str, Fault] = {
    one.__name__: one
    for one in (
        kill, kill_in_save, kill_rank, kill_rank_in_save, damage_checkpoint, cut_shard, disk_full, sigterm, sigint,
        time_limit, other_layout,
    )
}  # fmt: skip
