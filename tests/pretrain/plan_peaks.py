"""A job for test_plan.py: trains small models in several ways and writes the largest memory that each held.

    python -m tests.pretrain.plan_peaks FILE.json [CASE...]      about half an hour for all cases on one core

FILE.json has for each case the bytes that rank 0 held at most and those that the plan expects. What is measured is the
kernel's own record of a process's largest virtual memory (VmPeak), in a process that is forked for the case, over
what it had when a model of one layer was trained there before, so that libraries have their workspaces. glibc is
told to map every larger tensor apart and to give it back at once, and threads have small stacks, so this is what
tensors took, also buffers that are never written to. The resident size would miss those, which a GPU would not; torch's
profiler would miss what is freed on threads of gloo.
"""

import gc
import importlib
import json
import os
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from cluster.process import Place, joined_place
from data_pipeline.loader import LoaderConfig, TokenBatch
from pretrain import engine_start, plan_shape
from pretrain.config import TrainConfig, TransformerConfig
from pretrain.engine import Engine
from pretrain.engine_start import deepspeed_settings
from pretrain.model import Sizes
from pretrain.plan_memory import Memory
from pretrain.plan_shape import blueprint

SIZES = Sizes(text_vocab=2_000, codebook=1_000, grid=16)
WIDE = TransformerConfig(n_text=64, n_layers=4, n_heads=16, d_head=64)  # 57 M parameters: weights dominate
LONG = TransformerConfig(n_text=64, n_layers=8, n_heads=2, d_head=64)  # 2 M: activations do
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_ARENA_MAX": "1"}
STACK = 2**21  # bytes of a thread's: each engine has new groups of processes, and these have threads
STEPS = 2  # DeepSpeed's stage 3 looks ahead from the second on
SECONDS = 240  # for a case
TIGHT = {  # what DeepSpeed's defaults are to a model of 6 billion numbers
    "reduce_bucket_size": 5_000_000, "stage3_prefetch_bucket_size": 500_000, "stage3_max_live_parameters": 10_000_000,
    "stage3_max_reuse_distance": 10_000_000, "stage3_param_persistence_threshold": 1_000,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A way to train. A rank has 1 sample of the wide model, or 32 of the long one."""

    ranks: int
    model: TransformerConfig
    settings: dict[str, Any]

    @property
    def config(self) -> TrainConfig:
        batch = self.ranks * (1 if self.model is WIDE else 32)
        return TrainConfig(n_steps=STEPS, model=self.model, data=LoaderConfig(batch=batch), **self.settings)


CASES = {
    f"{model} {ranks} ranks stage {stage} {precision} {recompute}": Case(
        ranks, shape, {"zero_stage": stage, "precision": precision, "activation_checkpointing": recompute}
    )
    for model, shape in {"wide": WIDE, "long": LONG}.items()
    for ranks in (1, 2)
    for stage in (1, 2, 3)
    for precision in ("fp32", "bf16", "fp16-resblock")
    for recompute in ("none", "resblock")
}


def batch_of(config: TrainConfig, sizes: Sizes, ranks: int) -> TokenBatch:
    """Random tokens, captions as long as they can be."""
    count = config.data.batch // ranks
    text = torch.randint(sizes.text_vocab, (count, config.model.n_text - 1))
    return TokenBatch(text, torch.randint(sizes.codebook, (count, sizes.grid**2)), [str(n) for n in range(count)])


def train(config: TrainConfig, sizes: Sizes, place: Place) -> None:
    engine = Engine(config, sizes, place)
    for step in range(STEPS):
        engine.step(step, batch_of(config, sizes, place.world_size))


def virtual(name: str) -> int:
    """Bytes of this process, now (VmSize) or at most (VmPeak)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def with_limits(limits: dict[str, int]) -> Callable[[TrainConfig, int], dict[str, Any]]:
    """`deepspeed_settings` with limits of DeepSpeed's own in place of its defaults."""

    def settings(config: TrainConfig, world_size: int) -> dict[str, Any]:
        made = deepspeed_settings(config, world_size)
        return made | {"zero_optimization": made["zero_optimization"] | limits}

    return settings


def planned(case: Case) -> int:
    """Bytes of a rank, by the plan."""
    with patch.object(plan_shape, "deepspeed_settings", with_limits(TIGHT)):
        return Memory(blueprint(case.config, SIZES, case.ranks)).total


def be_rank(rank: int, case: Case, port: int, answer: Connection) -> None:
    """A forked process: one rank of a case; rank 0 answers."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(case.ranks), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    config = case.config
    torch.manual_seed(0)
    with joined_place(timeout_minutes=2.0) as place:
        with patch.object(engine_start, "deepspeed_settings", with_limits({"reduce_bucket_size": 1_000})):
            train(replace(config, model=replace(config.model, n_layers=1)), SIZES, place)
        gc.collect()
        before = virtual("VmSize")
        with patch.object(engine_start, "deepspeed_settings", with_limits(TIGHT)):
            train(config, SIZES, place)
        if rank == 0:
            answer.send(virtual("VmPeak") - before)


def peak_of(case: Case) -> int:
    """Bytes of the most that rank 0 held at once."""
    forked = get_context("fork")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    here, there = forked.Pipe(duplex=False)
    ranks = [forked.Process(target=be_rank, args=(rank, case, port, there), daemon=True) for rank in range(case.ranks)]
    for process in ranks:
        process.start()
    there.close()
    try:
        if not here.poll(SECONDS):
            raise TimeoutError(f"no answer in {SECONDS} seconds")
        return int(here.recv())
    finally:
        for process in ranks:
            process.join(SECONDS)
            process.kill()


def main() -> None:
    if not MALLOC.items() <= os.environ.items():  # read once, when a process starts
        os.execve(
            sys.executable, [sys.executable, "-m", "tests.pretrain.plan_peaks", *sys.argv[1:]], os.environ | MALLOC
        )
    torch.set_num_threads(1)
    os.environ["DS_ACCELERATOR"] = "cpu"
    importlib.import_module("deepspeed")  # once, for all that are forked
    found: dict[str, tuple[int, int]] = {}
    for name in sys.argv[2:] or list(CASES):
        found[name] = peak_of(CASES[name]), planned(CASES[name])
        Path(sys.argv[1]).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
