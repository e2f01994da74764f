"""A job for test_doctor.py: four ranks examine a run again and again, each time with something else the matter.

    torchrun --nproc-per-node 4 --standalone -m tests.pretrain.doctor_job FOLDER

FOLDER holds vocab and the token folders good, cut and flipped. Rank 0 writes FOLDER/cases.json: of each case what was
found, as JSON lines have it, and what was left behind in FOLDER/runs.
"""

import json
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from cluster import checks, checks_together
from cluster.manifest import installed_versions
from cluster.process import Launched, Place, joined_place, wait_for_all
from pretrain import doctor
from pretrain.doctor import COMMAND, DoctorConfig, examine

HERE = Launched(address="localhost", port=1)
AHEAD = 90.0  # seconds
Trouble = Callable[[int], AbstractContextManager[Any]]  # of a rank


def on(bad: int, *words: Any) -> Trouble:
    """Something replaced on one rank only."""
    return lambda rank: patch.object(*words) if rank == bad else nullcontext()


def refuse(path: Path, text: str) -> None:
    raise PermissionError(13, "Permission denied")


def elsewhere(place: Place, folder: Path, hosts: list[str]) -> checks.Finding:
    """A host whose `out` is a disk of its own."""
    return checks_together.shared_folder(place, folder.parent / "of this host", hosts)


CASES: dict[str, tuple[list[str], Trouble]] = {
    "healthy": ([], lambda rank: nullcontext()),
    "version": ([], on(2, checks, "installed_versions", lambda: installed_versions() | {"numpy": "1.0"})),
    "denied": ([], on(3, checks_together, "_write", refuse)),
    "not shared": ([], on(1, doctor, "shared_folder", elsewhere)),
    "cut": (["tokens={folder}/cut"], lambda rank: nullcontext()),
    "flipped": (["tokens={folder}/flipped", "deep=9"], lambda rank: nullcontext()),
    "full": ([], lambda rank: patch.object(doctor, "free_bytes", lambda path: 1000)),
    "clock": ([], on(2, doctor, "clocks", partial(checks_together.clocks, now=lambda: time.time() + AHEAD))),
    "slow": (["intra_gb_s=1e6", "inter_gb_s=1e6"], lambda rank: nullcontext()),
    "batch": (["data.batch=6"], lambda rank: nullcontext()),
}


def examined(config: DoctorConfig, place: Place) -> list[dict[str, str]]:
    return [asdict(finding) for finding in examine(config, place, 0.0, HERE)]


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    checks_together.PATIENCE_SECONDS = 1.0
    cases: dict[str, Any] = {}
    words = ["dalle-12b-tiny", f"tokens={folder}/good", f"vocab={folder}/vocab", f"out={folder}/runs/new/run"]
    with (
        joined_place(timeout_minutes=1.0) as place,
        patch.object(checks, "host_name", lambda: f"node{place.rank // 2}"),
    ):
        for name, (more, trouble) in CASES.items():
            config = COMMAND.settings([*words, "megabytes=1", *(word.format(folder=folder) for word in more)])
            with trouble(place.rank):
                cases[name] = examined(config, place)
        other = replace(config, train=replace(config.train, n_steps=7 if place.rank == 1 else 8))
        cases["settings"] = examined(other, place)
        wait_for_all(place)
        cases["left"] = sorted(str(path) for path in (folder / "runs").rglob("*"))
        if place.is_main:
            (folder / "cases.json").write_text(json.dumps(cases))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
