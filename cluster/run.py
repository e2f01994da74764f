"""One training run's folder: settings, metrics, checkpoints, the stop flag, and its end.

out/settings.toml  starts.jsonl  metrics.jsonl  ledger.jsonl  tensorboard/  checkpoints/  manifest.json (when finished)
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from cluster.checkpoint import Checkpoints
from cluster.ledger import Ledger, Seen, refuse_too_many, whole_digest
from cluster.manifest import differences, flat, is_done, refuse_difference, write_bytes, write_json, write_manifest
from cluster.metrics import Metrics, Progress
from cluster.process import Place, gathered, largest_of, wait_for_all
from cluster.settings import SettingError, UserError, require_at_least_one, setting, to_dict, to_toml
from cluster.watch import INTERRUPTED, HangWatch, Requeue, StopWatch


@dataclass(frozen=True)
class RunConfig:
    """How a run is watched and kept: the settings that all trainers share."""

    evaluate_every: int = setting(200, "steps between held-out measurements")
    save_every: int = setting(200, "steps between checkpoints")
    keep_last: int = setting(2, "checkpoints kept")
    keep_every: int = setting(0, "steps of whose multiples checkpoints are kept for good; 0 is none")
    resume: bool = setting(True, "go on from the newest valid checkpoint in out; false refuses a used folder")
    allow_change: str = setting("", "settings that a resumed run may change, by name, with commas between")
    stop_after_minutes: float = setting(0.0, "save and end with exit code 75 after so long; 0 is no limit")
    hang_minutes: float = setting(30.0, "no step for so long: show all stacks, end with exit code 70; 0 waits for ever")

    def __post_init__(self) -> None:
        require_at_least_one(self, ("evaluate_every", "save_every", "keep_last"))
        for name in ("keep_every", "stop_after_minutes", "hang_minutes"):
            if getattr(self, name) < 0:
                raise SettingError(f"{name}={getattr(self, name)} must be at least 0")


# settings that change how a run is watched or where it lies, never what it computes
FREE = (
    "out", "dry_run", "json", "cache", "zero_stage", "activation_checkpointing", "offload_activations",
    "offload_optimizer",
    *(field.name for field in fields(RunConfig)),
)  # fmt: skip


STARTS = "starts.jsonl"  # a line each time the run was started: when, at which step, with how many ranks
FREE_OF_DATA = ("readers", "max_bad_share")  # the same of a trainer's section `data`


@dataclass(frozen=True)
class Identity:
    """What must not change when a run is resumed: its settings, and the fingerprints of its inputs."""

    kind: str
    settings: dict[str, Any]
    made_from: dict[str, str]


class Run:
    """A run of any trainer (dVAE, transformer, scorer). Every rank makes one and calls it in step."""

    def __init__(
        self,
        config: Any,
        kind: str,
        inputs: tuple[str, ...],
        made_from: dict[str, str],
        place: Place,
        writers: range | None = None,
    ) -> None:
        """`inputs` names the settings that are paths of inputs; their fingerprints count, not the paths. writers:
        the ranks that write checkpoints, if others hold replicas of what they hold."""
        self.folder = Path(config.out)
        self.place = place
        self.n_steps: int = config.n_steps
        settings = {key: value for key, value in to_dict(config).items() if key not in FREE + inputs}
        settings["data"] = {key: value for key, value in settings["data"].items() if key not in FREE_OF_DATA}
        self.identity = Identity(kind, settings, made_from)
        folder = self.folder / "checkpoints"
        self.checkpoints = Checkpoints(folder, place, config.keep_last, config.keep_every, writers)
        self.allowed = tuple(name.strip() for name in config.allow_change.split(",") if name.strip())
        if unknown := sorted(set(self.allowed) - flat(settings).keys()):
            raise SettingError(f"allow_change names {', '.join(unknown)}, which a run does not keep as a setting")
        self.is_finished = is_done(self.folder, kind, settings, made_from, self.allowed)
        self.watch = StopWatch(place, config.stop_after_minutes)
        self.hang_watch = HangWatch(place, config.hang_minutes)
        self.metrics: Metrics | None = None
        self.progress: Progress | None = None
        self.ledger: Ledger | None = None
        self.consumed = self.replaced = 0  # samples in all steps so far, and those of them that were replaced
        self._config = config
        self._code = 0
        self._stalled: dict[str, float] = {}  # by the save before this step
        self._last = time.monotonic()

    def begin(self, load: Callable[[Path, str], None], order: dict[str, Any] | None = None) -> int:
        """Restore the newest valid checkpoint with `load(checkpoints folder, tag)`; returns the step to do next.

        order: what decides the order of samples, for a trainer that keeps a ledger. UserError if the folder is used
        and resume=false, or was begun with other settings.
        """
        step = self._restore(load)
        if self.place.is_main:
            self._open(step, order)
            write_bytes(self.folder / "settings.toml", to_toml(self._config).encode())
            with open(self.folder / STARTS, "a") as file:  # the only clock times of a run: they tell what it lost
                file.write(json.dumps({"time": time.time(), "step": step, "ranks": self.place.world_size}) + "\n")
            if step and self.progress:
                self.progress.say(f"{self.identity.kind}: resumed at step {step} of {self.n_steps}")
        self.consumed = largest_of(self.place, self.ledger.consumed if self.ledger else 0)
        self.replaced = largest_of(self.place, self.ledger.replaced if self.ledger else 0)
        self.watch.start()
        self.hang_watch.start()
        self._last = time.monotonic()
        return step

    def roll_back(self, load: Callable[[Path, str], None], order: dict[str, Any]) -> int:
        """Go back to the newest valid checkpoint, or stay if there is none: -1, else the step to do next."""
        self.hang_watch.beat("going back to the last checkpoint")
        found = self.checkpoints.newest_valid()
        if found is None:
            return -1
        step, folder, _ = found
        load(folder.parent, folder.name)
        if self.place.is_main:
            self._close_files()
            self._open(step, order)
        self.consumed = largest_of(self.place, self.ledger.consumed if self.ledger else 0)
        self.replaced = largest_of(self.place, self.ledger.replaced if self.ledger else 0)
        return step

    def _restore(self, load: Callable[[Path, str], None]) -> int:
        found = self.checkpoints.newest_valid()
        if not found:
            return 0
        step, folder, about = found
        if not self._config.resume:
            raise UserError(f"{self.folder} holds a run; name another `out`, remove it, or leave resume=true")
        refuse_difference(self.folder, "settings", about["settings"], self.identity.settings, self.allowed)
        for words in differences(about["settings"], self.identity.settings).values():
            self.say(f"goes on with another setting, {words}")
        refuse_difference(self.folder, "inputs", about["made_from"], self.identity.made_from)
        load(folder.parent, folder.name)
        return step

    def _open(self, step: int, order: dict[str, Any] | None) -> None:
        self.metrics = Metrics(self.folder, step)
        self.progress = Progress(self.identity.kind, self.n_steps, step)
        self.ledger = None if order is None else Ledger(self.folder, step, order)

    def record(self, step: int, values: dict[str, float]) -> None:
        """Log one training step's values and move the progress line."""
        self.hang_watch.beat(f"what follows step {step}")
        now = time.monotonic()
        if self.metrics and self.progress:
            self.metrics.record(step, values | {"perf/step_seconds": now - self._last} | self._stalled)
            loss = next((f"loss {value:.3f}" for tag, value in values.items() if tag.endswith("loss")), "")
            self.progress.advance(note=loss)
        self._last = now

    def record_evaluation(self, step: int, values: dict[str, float]) -> None:
        """Log held-out values."""
        self.hang_watch.beat(f"what follows the measurement at step {step}")
        if self.metrics and self.progress:
            self.metrics.record(step, values)
            text = ", ".join(f"{tag.removeprefix('val/')} {value:.4g}" for tag, value in values.items())
            self.progress.say(f"{self.identity.kind}: held-out at step {step + 1}: {text}")
        self._last = time.monotonic()

    def told_to_stop(self) -> bool:
        """One answer for all ranks."""
        self._code = self.watch.told_to_stop()
        return bool(self._code)

    def record_samples(self, step: int, seen: Seen, sums: dict[str, float] | None = None, skipped: str = "") -> None:
        """Enter a step into the ledger: what this rank saw and the sums of it over all ranks (None: this is the only
        one), and why its update was not applied, if it was not. FolderError if too many samples were bad."""
        sums = seen.sums if sums is None else sums
        data = self._config.data
        positions = range(step * data.batch, (step + 1) * data.batch)
        replaced = int(sums["ledger/replaced"])
        bad = [one for rank in gathered(self.place, seen.bad) for one in rank] if replaced else []
        self.consumed += len(positions)
        self.replaced += replaced
        for one in bad:
            self.say(f"replaced a bad sample: {one}")
        if self.ledger:
            self.ledger.record(step, positions, whole_digest(sums), bad, skipped)
        if bad:
            refuse_too_many(self.replaced, self.consumed, data.max_bad_share, str(bad[-1]))

    def save(self, step: int, write: Callable[[Path, str], None], background: bool = False) -> None:
        """Save the state after `step` updates. background: if `write` gives it to `checkpoints.writer`, the files
        are written while training goes on."""
        about = {"settings": self.identity.settings, "made_from": self.identity.made_from}
        self.hang_watch.beat(f"saving after step {step}")
        if self.ledger:
            self.ledger.sync()
        self.checkpoints.save(step, about, write, background)
        self._stalled = {"perf/save_stall_seconds": self.checkpoints.stall_seconds}
        self.hang_watch.beat(f"what follows the save after step {step}")

    def finish(self, counts: dict[str, Any], config_json: dict[str, Any], files: list[str]) -> None:
        """Write config.json and the manifest: from here on the run is done. Rank 0 only acts."""
        self.checkpoints.wait()
        if self.place.is_main:
            write_json(self.folder / "config.json", config_json)
            write_manifest(
                self.folder, self.identity.kind, self.identity.settings, counts,
                [*files, "config.json"], self.identity.made_from,
            )  # fmt: skip
        wait_for_all(self.place)

    def say(self, text: str) -> None:
        """A line about the run, from rank 0."""
        if self.place.is_main:
            print(f"{self.folder}: {text}")

    def stopped(self, step: int) -> None:
        """End a run that was told to stop after `step`: raises KeyboardInterrupt after Ctrl-C, else Requeue.

        UserError if the save before it failed.
        """
        self.checkpoints.wait()
        self.close()
        if self.checkpoints.saved_step != step:
            raise UserError(
                f"{self.folder} stopped after step {step} unsaved: the same command goes on from the last save"
            )
        if self.place.is_main:
            print(f"\n{self.identity.kind}: saved at step {step} of {self.n_steps}", file=sys.stderr)
        raise KeyboardInterrupt if self._code == INTERRUPTED else Requeue

    def close(self) -> None:
        self.hang_watch.close()
        self._close_files()

    def _close_files(self) -> None:
        for file in (self.metrics, self.progress, self.ledger):
            if file:
                file.close()


def due(step: int, every: int, n_steps: int) -> bool:
    """True after every `every`-th step and after the last."""
    return (step + 1) % every == 0 or step + 1 == n_steps
