"""A job for test_plan.py: trains small models in several ways and writes the largest memory that each held.

    python -m tests.pretrain.plan_peaks FILE.json [CASE...]

What is measured is the kernel's own record of a process's largest virtual memory (VmPeak), in a process that is
forked for the case, over what it had after a first step of a model of a few numbers. glibc is told to map every
larger tensor apart and to give it back at once, so this is what tensors took, to the page, also of buffers that are
never written to. The resident size would miss those, which a GPU would not. Torch's profiler would miss what is
freed on threads of gloo.
"""

import json
import os
import socket
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from cluster.power_sgd import PowerSGDConfig
from cluster.process import Place, joined_place
from data_pipeline.loader import LoaderConfig, TokenBatch
from pretrain import engine_start
from pretrain.config import OptimConfig, TrainConfig, TransformerConfig
from pretrain.engine import Engine
from pretrain.model import Sizes

SIZES = Sizes(text_vocab=2_000, codebook=1_000, grid=16)
MODEL = TransformerConfig(n_text=64, n_layers=4, n_heads=16, d_head=64)  # 57 M parameters
LARGE, SMALL = OptimConfig(), OptimConfig(moments="16-bit")
LOW_RANK = PowerSGDConfig(rank=64, start_step=0, wire="1-6-9", errors="1-6-9")
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_ARENA_MAX": "1"}
STEPS = 3  # DeepSpeed's stage 3 looks ahead from the second on
SECONDS = 120  # for a case


@dataclass(frozen=True)
class Case:
    """A way to train, on so many ranks, `batch` samples each."""

    ranks: int = 1
    batch: int = 1
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def config(self) -> TrainConfig:
        parts = self.ranks * self.settings.get("accumulate", 1)
        given = {"precision": "fp32", "model": MODEL, "data": LoaderConfig(batch=self.batch * parts)}
        return TrainConfig(n_steps=STEPS, **given | self.settings)


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
