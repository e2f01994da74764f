"""The GPU benchmark of the model in small on a CPU: its rows, and its counts against counts by hand."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kernels.measure import Ceilings
from pretrain import bench_gpu
from pretrain.bench_gpu import TINY, Plan, SampleRow, StepRow
from pretrain.config import TransformerConfig
from pretrain.decoder import Decoder
from pretrain.model import Sizes
from pretrain.update import Update, random_model

CPU = torch.device("cpu")
REACHED = Ceilings(bandwidth=1e9, matmul=1e9)
# Three layers, so one of each pattern; 2 text slots, 2 x 2 image slots, one head of 4, 5 words, 3 codes.
CONFIG = TransformerConfig(n_text=2, n_layers=3, n_heads=1, d_head=4, conv_kernel=3)
SIZES = Sizes(text_vocab=5, codebook=3, grid=2)


def test_a_step_counts_each_weight_where_it_is_applied_and_each_attended_pair() -> None:
    layer = 12 * 4 * 4 * 6  # qkv, out and the MLP's two matrices; six slots
    heads = 4 * 5 * 1 + 4 * 3 * 4  # one word to foretell, four codes
    pairs = 20 + 17 + 21  # row, column, conv: see tests/kernels/test_bench_gpu.py
    model = random_model(CONFIG, SIZES, CPU, torch.float32)
    assert bench_gpu.step_flops(model, 7) == 7 * (6 * (3 * layer + heads) + 12 * 4 * pairs)


def test_a_step_of_drawing_reads_all_weights_but_the_text_head_and_the_embeddings() -> None:
    model = random_model(CONFIG, SIZES, CPU, torch.bfloat16)
    layer = 12 * 4 * 4 + (12 + 4 + 16 + 4) + 4 * 4  # matrices, biases, two norms
    weights = 3 * layer + 2 * 4 + (4 * 3 + 3)
    assert bench_gpu.read_weights(model) == (2 * weights, weights)


def test_a_step_of_drawing_reads_all_text_one_column_and_the_rings() -> None:
    decoder = Decoder(random_model(CONFIG, SIZES, CPU, torch.bfloat16), torch.zeros((1, 1), dtype=torch.int64), 5)
    row, column, conv = 3, 2, 4  # slots that can be seen; of its column the store holds all, and one other
    slot = 2 * 4 * 2  # key and value, 4 features of 2 bytes
    assert bench_gpu.read_caches(decoder) == slot * (3 * 2 + 5 * (row + column + conv))
    assert decoder.cache_bytes == slot * (3 * 2 + 5 * (row + 2 * column + conv))


@pytest.mark.parametrize(
    ("what", "fields", "n_rows"),
    [
        ("step", ["batch", "recompute", "compiled", "step_ms", "tokens_s", "mfu", "mfu_nominal"], 2),
        ("sample", ["candidates", "batch", "step_ms", "floor_ms", "ratio", "images_s", "weights_gb", "caches_gb"], 2),
    ],
)
def test_the_command_writes_complete_rows(what: str, fields: list[str], n_rows: int, tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    bench_gpu.main([what, "--tiny", "--device", "cpu", "--out", str(path)])
    header, *lines = (line.split(",") for line in path.read_text().splitlines())
    assert len(lines) == n_rows
    for line in lines:
        row = dict(zip(header, line, strict=True))
        assert all(row[field] for field in [*fields, "device", "torch", "date"]) and not row["error"]


def test_rates_follow_from_the_time_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_gpu, "wall_seconds", lambda device, work: 2.0)
    row = bench_gpu.step_row(replace(TINY, runs=4), 2, "none", False, CPU, REACHED)
    flops = bench_gpu.step_flops(random_model(TINY.config, TINY.sizes, CPU, torch.bfloat16), 2)
    assert (row.step_ms, row.tokens_s) == (500, 2 * 24 / 0.5)
    assert row.mfu == pytest.approx(flops / 0.5 / 1e9) and row.mfu_nominal == pytest.approx(flops / 0.5 / 989e12)


def test_an_update_lowers_the_loss_of_its_batch_and_recomputing_does_not_change_it() -> None:
    kept = Update(TINY.config, TINY.sizes, 2, CPU, torch.float32)
    again = Update(TINY.config, TINY.sizes, 2, CPU, torch.float32, "resblock")
    losses = [float(kept()) for _ in range(3)]
    assert losses[0] > losses[1] > losses[2]
    assert [layer.recompute for layer in again.model.layers] == ["resblock"] * TINY.config.n_layers
    # Of the same seed; the same sums in the same order.
    assert [float(again()) for _ in range(3)] == losses


def out_of_memory(*_: Any, **__: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")


def test_a_batch_that_does_not_fit_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_gpu, "Update", out_of_memory)
    rows = list(bench_gpu.step_rows(TINY, CPU, REACHED, 60))
    assert rows == [
        StepRow(2, "none", False, error="out of memory"),
        StepRow(2, "resblock", False, error="out of memory"),
    ]


def test_steps_that_would_begin_too_late_are_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_gpu, "Update", out_of_memory)
    rows = list(bench_gpu.step_rows(Plan(batches=(4, 2)), CPU, REACHED, -1))
    assert len(rows) == 8 and {row.error for row in rows} == {"not run: -1 seconds were over"}
    assert [(row.batch, row.compiled, row.recompute) for row in rows[:4]] == [
        (4, False, "none"), (4, False, "resblock"), (4, True, "none"), (4, True, "resblock"),
    ]  # fmt: skip


def fits(most: int) -> Callable[..., SampleRow]:
    """sample_row on a device with memory for so many candidates."""

    def sample_row(plan: Plan, model: Any, weights: Any, candidates: int, batch: int, reached: Ceilings) -> SampleRow:
        return out_of_memory() if batch > most else SampleRow(candidates, batch)

    return sample_row


def test_candidates_that_do_not_fit_together_are_drawn_in_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = replace(TINY, candidates=(1, 512))
    monkeypatch.setattr(bench_gpu, "sample_row", fits(200))
    assert list(bench_gpu.sample_rows(plan, CPU, REACHED)) == [SampleRow(1, 1), SampleRow(512, 128)]
    monkeypatch.setattr(bench_gpu, "sample_row", fits(0))
    assert [row.error for row in bench_gpu.sample_rows(plan, CPU, REACHED)] == ["out of memory"] * 2
