"""`smalti train` with an accident arranged inside it, for the drill: what no signal from outside can do.

    python -m pretrain.drill_worker '[["kill_in_save", {"save": 1, "moment": "pointer"}]]' emoji out=runs/train

The first word is JSON: accidents by name, with their settings. The rest is as for `smalti train`. Accidents take
the place of methods of the training code, which knows nothing of them.
"""

import json
import math
import os
import signal
import sys
from pathlib import Path
from typing import Any

from cluster import snapshot
from cluster.checkpoint import REPLACED, SEAL, found_in, verify
from cluster.command import run_command
from cluster.process import Place, launched_rank
from cluster.run import Run
from cluster.snapshot import SnapshotWriter
from data_pipeline.loader import Batches, TokenBatch
from pretrain.config import TrainConfig
from pretrain.engine import Engine
from pretrain.engine_update import Settlement, Update
from pretrain.model import Sizes
from pretrain.train import COMMAND

Accident = list[Any]  # [name, settings]
BYTES = "bytes"  # the moment of a save at which a given byte of its tensors has been written
NAMINGS = ("note", "seal", "folder", "pointer")  # and those just before one of its files gets its name
CLEANING = "clearing"  # and that before what it no longer needs is removed


def kill_in_save(save: int, moment: str, byte: int = 0, rank: int = 0) -> None:
    """SIGKILL of this process inside its save number `save` (from 1), if it is that rank."""
    if launched_rank() != rank:
        return
    saves = n_written = 0
    write_out, write = SnapshotWriter.write_out, snapshot._Digesting.write

    def counted(self: SnapshotWriter) -> dict[str, dict[str, Any]]:
        nonlocal saves
        saves += 1
        return write_out(self)

    def cut(self: Any, data: Any) -> int:
        nonlocal n_written
        view = memoryview(data).cast("B")
        if saves == save and n_written + view.nbytes >= byte:
            self.file.write(view[: byte - n_written])
            die()
        n_written += view.nbytes if saves == save else 0
        return write(self, data)

    def before_naming(event: str, values: tuple[Any, ...]) -> None:
        if saves == save and event in ("os.rename", "shutil.rmtree") and moment_of(event, values) == moment:
            die()

    SnapshotWriter.write_out = counted  # type: ignore[method-assign]
    if moment == BYTES:
        snapshot._Digesting.write = cut  # type: ignore[method-assign]
    else:
        sys.addaudithook(before_naming)


def moment_of(event: str, values: tuple[Any, ...]) -> str:
    """Which step of a save Python is about to do, or none."""
    if event == "shutil.rmtree":
        return CLEANING if Path(values[0]).name == "unfinished" else ""
    name = Path(os.fsdecode(values[1])).name
    names = {f"rank{launched_rank()}.json": "note", SEAL: "seal", "latest": "pointer"}
    is_checkpoint = name.startswith("global_step") and not name.endswith(REPLACED)
    return "folder" if is_checkpoint else names.get(name, "")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def spoil_gradients(steps: list[int]) -> None:
    """A NaN in one gradient of each of these updates, whenever they are done."""
    settle = Settlement.settle

    def spoilt(self: Settlement, number: int, losses: dict[str, float], sums: dict[str, float]) -> Update:
        if number in steps:
            pieces = [piece for group in self.shards.pieces() for piece in group]
            pieces[number % len(pieces)].gradient[0] = math.nan
        return settle(self, number, losses, sums)

    Settlement.settle = spoilt  # type: ignore[method-assign]


def leave_out(steps: list[int]) -> None:
    """These updates are computed, found sound, and not applied: what `spoil_gradients` should come to. One process."""
    settle = Settlement.settle

    def left_out(self: Settlement, number: int, losses: dict[str, float], sums: dict[str, float]) -> Update:
        if number in steps:
            return self._leave_out(Update(losses, sums), bad=())
        return settle(self, number, losses, sums)

    Settlement.settle = left_out  # type: ignore[method-assign]


def pass_over(steps: list[int]) -> None:
    """These updates are never begun: what a rollback from each of them should come to."""
    init = Engine.__init__

    def with_steps(self: Engine, config: TrainConfig, sizes: Sizes, place: Place) -> None:
        init(self, config, sizes, place)
        self.passed_over |= set(steps)

    Engine.__init__ = with_steps  # type: ignore[method-assign]


def tell_rollbacks() -> None:
    """After each rollback a line with the step that it went back to, and that of the newest sealed checkpoint."""
    roll_back = Run.roll_back

    def told(self: Run, load: Any, order: dict[str, Any]) -> int:
        step = roll_back(self, load, order)
        sealed = [number for number, folder in found_in(self.checkpoints.folder) if verify(folder) is None]
        print(f"rolled back to {step}, sealed {max(sealed, default=-1)}", file=sys.stderr, flush=True)
        return step

    Run.roll_back = told  # type: ignore[method-assign]


def cut_file(path: str, n_bytes: int, step: int) -> None:
    """A shard is cut to so many bytes just before the batch of a step is read. For data.readers=1."""
    read = Batches.read

    def cut(self: Batches[TokenBatch], number: int) -> TokenBatch:
        if number == step:
            os.truncate(path, n_bytes)
        return read(self, number)

    Batches.read = cut  # type: ignore[method-assign, assignment]


ACCIDENTS = {
    one.__name__: one for one in (kill_in_save, spoil_gradients, leave_out, pass_over, tell_rollbacks, cut_file)
}


def main(words: list[str]) -> int:
    """Arrange the accidents and train; returns the exit code."""
    accidents: list[Accident] = json.loads(words[0])
    for name, settings in accidents:
        ACCIDENTS[name](**settings)
    return run_command(COMMAND, words[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
