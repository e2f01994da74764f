"""How far stages are: progress, time left, goodput, the last checkpoint, what is missing, jobs of SLURM.

    smalti status runs/train
    smalti status pipeline data runs/dvae json=true

Takes stages' folders, folders that hold some, and a pipeline's folder; finished, under way, killed or damaged. Goodput
is the time of the steps that count over the time from the first start to the last sign of life: what starting,
restoring, measuring, saving, waiting in a queue and steps done twice have cost is the rest. Checkpoints are tried by
names and sizes; digests=true reads every byte.
"""

import json
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from cluster.command import Command, run_command, shown
from cluster.settings import SettingError, UserError, load_settings, setting, split_words
from cluster.slurm.queue import newest, states, submitted
from pretrain.pipeline import RECORD
from pretrain.stage_progress import Progress, is_stage, progress_of

DEEPEST = 3  # folders in folders that are searched for stages
MOST_NAMES = 5  # missing shards that the table names


@dataclass(frozen=True)
class StatusConfig:
    """What is looked at."""

    folders: tuple[str, ...] = setting((), "stages' folders, or folders that hold some")
    digests: bool = setting(False, "read checkpoints and finished folders whole and compare digests")
    json: bool = setting(False, "everything as JSON")


@dataclass(frozen=True)
class Line:
    """A stage, or a folder where none was found."""

    folder: str
    progress: Progress


class StatusCommand(Command):
    """Takes any number of folders."""

    def settings(self, words: list[str]) -> StatusConfig:
        """SettingError as `load_settings` raises it."""
        plain, changes = split_words(words)
        files = [word for word in plain if word.endswith(".toml")]
        config = load_settings(StatusConfig, [*files, *(f"{key}={text}" for key, text in changes)], self.presets)
        named = tuple(word for word in plain if word not in files)
        return replace(config, folders=named) if named else config


def status(config: StatusConfig) -> None:
    """Print the table. UserError if a folder does not exist, after those that do."""
    if not config.folders:
        raise SettingError("name the folder of a stage, a run or a pipeline")
    missing = [name for name in config.folders if not Path(name).is_dir()]
    found = [line for name in config.folders if name not in missing for line in look(Path(name), config.digests)]
    jobs = {name: jobs_of(Path(name)) for name in config.folders if name not in missing}
    if config.json:
        now = [asdict(line.progress) | {"folder": line.folder} for line in found]
        print(json.dumps({"stages": now, "jobs": {name: told for name, told in jobs.items() if told}}, indent=1))
    else:
        print("\n".join(table(found)))
        for name, told in jobs.items():
            print("".join(f"{shown(name)}: {job}: {shown(state)}\n" for job, state in told.items()), end="")
    if missing:
        raise UserError(f"there is no folder {', '.join(missing)}")


def look(folder: Path, digests: bool) -> list[Line]:
    """The stages of a folder; of a pipeline's in the order of its path."""
    places = read_record(folder) or {"": str(folder)}
    stages = {name: stages_below(Path(place)) for name, place in places.items()}
    everywhere = [stage for found in stages.values() for stage in found]
    lines = []
    for name, found in stages.items():
        lines += [Line(str(stage), progress_of(stage, digests, everywhere)) for stage in found]
        if name and not found:
            lines.append(Line(places[name], Progress(kind=name, state="not begun")))
    if not lines:
        empty = not any(folder.iterdir())
        lines = [Line(str(folder), Progress(state="empty" if empty else "no stage's folder"))]
    return lines


def read_record(folder: Path) -> dict[str, str]:
    """Stage -> folder of a pipeline; nothing if it is none."""
    try:
        stages = json.loads((folder / RECORD).read_text())["stages"]
        return {str(name): str(out) for name, out in stages.items()}
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return {}


def stages_below(folder: Path, depth: int = DEEPEST) -> list[Path]:
    """Folders of stages: this one, or those in it, the oldest first."""
    if not folder.is_dir():
        return []
    if is_stage(folder):
        return [folder]
    inner = sorted(path for path in folder.iterdir() if path.is_dir() and not path.is_symlink()) if depth else []
    return [stage for path in inner for stage in stages_below(path, depth - 1)]


def jobs_of(folder: Path) -> dict[str, str]:
    """Job by job what SLURM says of the last of each name that was submitted for a folder."""
    jobs = newest(submitted(folder))
    try:
        known = states([job.job for job in jobs])
    except UserError as error:
        return {f"jobs {', '.join(job.job for job in jobs)}": str(error)}
    return {f"job {job.job} {job.name}": str(known.get(job.job, "SLURM does not know it")) for job in jobs}


def table(lines: list[Line]) -> list[str]:
    """A row a stage, and below it what is wrong with it."""
    rows = [("FOLDER", "KIND", "STATE", "PROGRESS", "LEFT", "GOODPUT", "LAST CHECKPOINT", "LAST SIGN")]
    notes: list[list[str]] = [[]]
    for line in lines:
        one = line.progress
        rows.append((
            shown(line.folder), one.kind or "-", one.state, progress_text(one), duration(one.seconds_left),
            f"{one.goodput:.0%}" if one.goodput is not None else "-", checkpoint_text(one),
            f"{duration(one.silent_seconds)} ago" if one.silent_seconds is not None else "-",
        ))  # fmt: skip
        names = ", ".join(one.missing[:MOST_NAMES])
        more = f" and {len(one.missing) - MOST_NAMES} more" if len(one.missing) > MOST_NAMES else ""
        what = "still to do" if one.state == "unfinished" else "missing or damaged"
        told = [f"{len(one.missing)} {what}: {names}{more}"] if one.missing else []
        notes.append([shown(note) for note in one.problems + told])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    texts = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return [part for text, below in zip(texts, notes, strict=True) for part in (text, *(f"  {n}" for n in below))]


def progress_text(one: Progress) -> str:
    if one.done is None:
        return "-"
    of = f"/{one.total}" if one.total else ""
    share = f" ({one.done / one.total:.0%})" if one.total else ""
    restarts = f", {one.starts} starts" if one.starts > 1 else ""
    return f"{one.done}{of} {one.unit}{share}{restarts}"


def checkpoint_text(one: Progress) -> str:
    if one.checkpoint_step is None:
        return "-"
    return f"step {one.checkpoint_step}, {duration(one.checkpoint_age_seconds)} old"


def duration(seconds: float | None) -> str:
    """In the largest two units, as 3h05m."""
    if seconds is None:
        return "-"
    whole = round(seconds)
    for unit, size, below, small in (("d", 86400, "h", 3600), ("h", 3600, "m", 60), ("m", 60, "s", 1)):
        if whole >= size:
            return f"{whole // size}{unit}{whole % size // small:02d}{below}"
    return f"{whole}s"


PRESETS = Path(__file__).parent / "configs" / "status"
COMMAND = StatusCommand("status", StatusConfig, PRESETS, status, __doc__, ("folders",))

if __name__ == "__main__":
    sys.exit(run_command(COMMAND, sys.argv[1:]))
