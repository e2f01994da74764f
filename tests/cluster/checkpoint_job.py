"""Three ranks that save together, one of them in trouble: `torchrun --nproc-per-node 3 checkpoint_job.py FOLDER`.

What each rank was told and found is in FOLDER/told-RANK.json, for test_background_saves.py.
"""

import contextlib
import io
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from cluster import checkpoint
from cluster.checkpoint import SEAL, Checkpoints
from cluster.process import Place, joined_place, wait_for_all

Break = Callable[[Checkpoints], None]


def save(folder: Path, place: Place, step: int, trouble: Break | None = None, writers: int = 3) -> dict[str, Any]:
    """One save in the background; what is known of it afterwards on this rank."""
    checkpoints = Checkpoints(folder, place, 9, writers=range(writers))
    if trouble:
        trouble(checkpoints)

    def write(part: Path, tag: str) -> None:
        state = {"weights": torch.full((1000,), float(step)), "rank": place.rank}
        checkpoints.writer.save(state, str(part / tag / f"rank{place.rank}.pt"))
        if place.rank == 1 and trouble is raises:
            raise RuntimeError("out of memory\nand a trace")

    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        began = checkpoints.save(step, {"step was": step}, write, background=True)
        wrote = checkpoints._thread is not None
        saved = checkpoints.wait()
    target = folder / f"global_step{step}"
    files = sorted(json.loads((target / SEAL).read_text())["files"]) if target.exists() else []
    wait_for_all(place)  # what one rank looks at, another may not change
    return {
        "began": began, "saved": saved, "saved_step": checkpoints.saved_step, "said": said.getvalue(), "files": files,
        "wrote": wrote, "left over": (folder / "unfinished").exists(),
    }  # fmt: skip


def raises(checkpoints: Checkpoints) -> None:
    """Rank 1's state cannot be taken; see `save`."""


def full_disk(checkpoints: Checkpoints) -> None:
    """Rank 2 cannot write its file."""

    def fail() -> dict[str, Any]:
        raise OSError(28, "No space left on device")

    if checkpoints.place.rank == 2:
        checkpoints.writer.write_out = fail  # type: ignore[method-assign]


def silent(checkpoints: Checkpoints) -> None:
    """Rank 2 is never heard of."""
    checkpoint.PATIENCE_SECONDS = 0.3
    if checkpoints.place.rank == 2:
        checkpoints._finish = lambda *_: None  # type: ignore[method-assign]


def slow(checkpoints: Checkpoints) -> None:
    """Rank 1 takes its time."""
    write_out = checkpoints.writer.write_out

    def late() -> dict[str, Any]:
        time.sleep(0.5)
        return write_out()

    if checkpoints.place.rank == 1:
        checkpoints.writer.write_out = late  # type: ignore[method-assign]


def elsewhere(checkpoints: Checkpoints) -> None:
    """Rank 2 writes to a disk of its own."""
    write_out = checkpoints.writer.write_out

    def unseen() -> dict[str, Any]:
        records = write_out()
        for path in records:
            os.unlink(path)
        return records

    if checkpoints.place.rank == 2:
        checkpoints.writer.write_out = unseen  # type: ignore[method-assign]


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    with joined_place(timeout_minutes=1.0) as place:
        run = folder / "checkpoints"
        told: dict[str, Any] = {"good": save(run, place, 1)}
        for step, trouble in enumerate((raises, full_disk, silent, elsewhere), 2):
            told[trouble.__name__] = save(run, place, step, trouble)
            checkpoint.PATIENCE_SECONDS = 60.0
        told["slow"] = save(run, place, 6, slow)
        told["replicas"] = save(run, place, 7, writers=2)
        wait_for_all(place)
        if place.is_main:  # the second of its files is read by rank 1 alone
            path = run / "global_step7" / "rank1.pt"
            path.write_bytes(path.read_bytes()[:-1] + b"x")
        wait_for_all(place)
        said = io.StringIO()
        with contextlib.redirect_stderr(said):
            found = Checkpoints(run, place, 9).newest_valid()
        assert found is not None
        told["newest"] = {"step": found[0], "about": found[2], "said": said.getvalue()}
        (folder / f"told-{place.rank}.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
