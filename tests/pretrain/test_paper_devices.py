"""`dalle-12b-tiny`: float16 branches with scales, PowerSGD between replicas and 16-bit moments together."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cluster.metrics import read_metrics
from data_pipeline.bpe import open_vocabulary
from pretrain.engine_files import EngineFiles
from pretrain.engine_replicas import errors_path
from pretrain.optim import REST
from pretrain.plan_memory import Memory
from pretrain.plan_shape import blueprint, sizes_of
from pretrain.train import COMMAND
from tests.data_pipeline.token_folders import MADE_FROM, write_tokens
from tests.pretrain.paper_job import STEPS, STOPPED_AT, WORDS

ROOT = Path(__file__).resolve().parents[2]
N_RESBLOCKS = 8


@pytest.fixture(scope="module")
def folder(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What paper_job.py left behind."""
    folder = tmp_path_factory.mktemp("paper")
    shutil.copytree(data / "vocab", folder / "vocab")
    made_from = MADE_FROM | {"vocab": open_vocabulary(folder / "vocab")[1]}
    write_tokens(folder / "tokens", [24, 24], made_from=made_from)
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node=4", "--standalone"]
    command = [sys.executable, *launcher, "-m", "tests.pretrain.paper_job", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def memory(folder: Path) -> Memory:
    """The plan of the same run."""
    config = COMMAND.settings([*WORDS, f"tokens={folder}/tokens", f"vocab={folder}/vocab"])
    return Memory(blueprint(config, sizes_of(config)[0], 4))


def newest(run: Path) -> Path:
    return run / "checkpoints" / (run / "checkpoints" / "latest").read_text().strip()


def of_steps(run: Path) -> list[dict[str, Any]]:
    """What was logged of the updates, without what depends on the clock."""
    records = [record for record in read_metrics(run) if "train/loss" in record]
    return [{tag: value for tag, value in one.items() if not tag.startswith(("perf/", "time"))} for one in records]


def test_all_updates_have_finite_losses(folder: Path) -> None:
    steps = of_steps(folder / "whole")
    assert len(steps) == STEPS
    assert all(math.isfinite(value) for step in steps for tag, value in step.items() if tag.startswith("train/"))
    assert steps[-1]["train/loss"] < steps[0]["train/loss"]


def test_every_resblock_has_a_gradient_scale(folder: Path) -> None:
    first = of_steps(folder / "whole")[0]
    scales = {tag: value for tag, value in first.items() if tag.startswith("scale/")}
    assert len(scales) == N_RESBLOCKS and all(value > 0 for value in scales.values())
    assert EngineFiles(newest(folder / "whole")).caller["smalti"]["settlement"]["scales"]


def test_matrices_of_resblocks_are_compressed_and_what_is_missed_is_kept(folder: Path, memory: Memory) -> None:
    """Of each shard: queries, keys and values, the way out of attention, and two matrices of the MLP."""
    assert {rank for *_, rank, _ in memory.factors} == {7}
    assert sum(count for *_, count in memory.factors) == (N_RESBLOCKS // 2) * 6
    for shard in range(2):
        errors = torch.load(errors_path(newest(folder / "whole"), shard), weights_only=True)["errors"]
        assert len(errors) == (N_RESBLOCKS // 2) * 6
        assert sum(error.numel() for error in errors.values()) == memory.compressed
        assert all(error.any() for error in errors.values())


def test_a_checkpoint_is_as_large_as_planned(folder: Path, memory: Memory) -> None:
    """3 % is what was asked of the plan; pickles have names and shapes beside the numbers."""
    sizes = [path.stat().st_size for path in newest(folder / "whole").rglob("*") if path.is_file()]
    assert sum(sizes) == pytest.approx(memory.checkpoint, rel=0.03)


def test_a_stopped_run_goes_on_bit_for_bit(folder: Path) -> None:
    half = folder / "halves" / "checkpoints" / f"global_step{STOPPED_AT}"
    errors = torch.load(errors_path(half, 0), weights_only=True)["errors"]
    assert all(error.any() for error in errors.values())  # there was something to be lost
    assert of_steps(folder / "halves") == of_steps(folder / "whole")
    want, got = (load_file(folder / run / "model.safetensors") for run in ("whole", "halves"))
    assert want.keys() == got.keys() and all(torch.equal(want[name], got[name]) for name in want)
    for shard in range(2):
        whole, halves = (
            torch.load(errors_path(newest(folder / run), shard), weights_only=True)["errors"]
            for run in ("whole", "halves")
        )
        assert whole.keys() == halves.keys() and all(torch.equal(whole[name], halves[name]) for name in whole)


def test_replicas_meet_about_a_resblock_while_the_ones_before_it_wait_for_their_gradients(folder: Path) -> None:
    """Appendix E.2: steps 3 to 8 of one resblock run during step 2 of the next, not after the backward pass."""
    happened = json.loads((folder / "order.json").read_text())
    met, entered = ([name for what, name in happened if what == kind] for kind in ("met", "enters"))
    assert len(entered) == N_RESBLOCKS and met == [*entered, REST] and happened[-1] == ["settles", ""]
    for block, second_after in zip(entered, entered[2:], strict=False):
        assert happened.index(["met", block]) < happened.index(["enters", second_after])
