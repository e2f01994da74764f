"""Time the CPU kernels against their references, and a model on them against its linear layers alone.

    python -m kernels.bench            a table
    python -m kernels.bench --json     one JSON line a row

One thread, fp32, process CPU time; what is compared takes turns in one run, so ratios hold on a busy
machine. Every run is appended to kernels/results.csv. About 4 minutes. On a GPU: kernels/bench_gpu.py.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from kernels.attention import How, attention
from kernels.decode import PatternCache, Visits
from kernels.layout import Layout, Pattern, Sparsity, layer_pattern
from kernels.measure import append, best_of
from kernels.reference import masked_attention

PAPER = Layout(256, 32, 32)
RESULTS = Path(__file__).parent / "results.csv"
MODEL = "pretrain.bench"  # in a process of its own: kernels know no model
BARS: dict[Pattern, float] = {"row": 3.0, "column": 3.5, "conv": 2.0}
ROUNDS = 5


@dataclass(frozen=True)
class Row:
    """One comparison. ratio: how many times as fast as theirs, or what share of theirs, as `what` has it."""

    what: str
    ratio: float
    bar: float
    ours: float
    theirs: float
    load: float
    bound: Literal["at least", "at most"]  # what the bar is of the ratio
    note: str


def attention_row(pattern: Pattern) -> Row:
    """Forward and backward at B=4, H=8, D=64 against dense attention under the same mask; times as fast."""
    torch.manual_seed(0)
    sparsity = Sparsity(pattern, PAPER)
    mask = sparsity.mask()
    qkv = torch.randn(4, PAPER.n_slots, 3, 8, 64)
    q, k, v = (x.contiguous() for x in qkv.permute(2, 0, 3, 1, 4))

    def run(inputs: list[Tensor], function: Callable[..., Tensor]) -> None:
        inputs = [x.detach().requires_grad_() for x in inputs]
        out = function(*inputs)
        out.backward(out.detach())

    how: How = "cpu"
    ours, theirs = best_of(
        ROUNDS,
        lambda: run([qkv], lambda x: attention(x, sparsity, how)),
        lambda: run([q, k, v], lambda *x: masked_attention(x[0], x[1], x[2], mask)),
    )
    note = "CPU s; theirs: masked SDPA"
    return Row(f"attention/{pattern}", theirs / ours, BARS[pattern], ours, theirs, load(), "at least", note)


def cache_row(name: str, candidates: int, bar: float) -> Row:
    """Bytes of a 12-layer model's caches for one caption against full ones for as many candidates."""
    like = torch.empty(8, 64)
    sparsities = [Sparsity(layer_pattern(layer, 12), PAPER) for layer in range(1, 13)]
    caches = [PatternCache(sparsity, Visits(sparsity, like), 1, candidates, like) for sparsity in sparsities]
    ours = sum(cache.n_bytes for cache in caches)
    full = len(caches) * candidates * 2 * like.numel() * PAPER.n_slots * like.element_size()
    note = f"bytes for {candidates} of a caption; theirs: all slots of all layers"
    return Row(f"cache/{name}", ours / full, bar, ours, full, load(), "at most", note)


def model_row(what: str, words: list[str], bar: float, bound: Literal["at least", "at most"]) -> Row:
    """A row of pretrain/bench.py."""
    command = [sys.executable, "-m", MODEL, *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1])
    if done.returncode:
        sys.exit(f"{' '.join(command[1:])} failed: {done.stderr.strip().splitlines()[-1]}")
    found = json.loads(done.stdout)
    return Row(what, bar=bar, bound=bound, **found)


def rows() -> Iterator[Row]:
    """All rows, in the order of the table in README.md."""
    for pattern in BARS:
        yield attention_row(pattern)
    yield model_row("step/floor", ["step", "1"], 1.25, "at most")
    yield model_row("step/memory", ["memory", "4"], 1.0, "at most")
    yield model_row("sample/1", ["sample", "1"], 0.7, "at least")
    yield model_row("sample/8", ["sample", "8"], 0.7, "at least")
    yield cache_row("plain", 1, 1 / 2)
    yield cache_row("shared", 8, 1 / 3)


def load() -> float:
    """What else the machine does: its load average over a minute."""
    return os.getloadavg()[0]


def record(row: Row, path: Path) -> None:
    """Append a row with the date, processor and torch to the record of all runs."""
    cpu = str(torch.cpu.get_capabilities().get("cpu_name", "unknown"))
    append([{"date": date.today().isoformat(), "cpu": cpu, "torch": torch.__version__} | asdict(row)], path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON line a row")
    parser.add_argument("--results", type=Path, default=RESULTS, help="CSV that the rows are appended to")
    words = parser.parse_args()
    torch.set_num_threads(1)
    if not words.json:
        print(f"{'what':<18}{'ratio':>7}  {'bar':<15}{'ours':>10}{'theirs':>10}{'load':>6}  note")
    for row in rows():
        record(row, words.results)
        if words.json:
            print(json.dumps(asdict(row)), flush=True)
        else:
            bar = f"{row.bound} {row.bar:.2f}"
            numbers = f"{row.ratio:>7.3f}  {bar:<15}{row.ours:>10.4g}{row.theirs:>10.4g}{row.load:>6.1f}"
            print(f"{row.what:<18}{numbers}  {row.note}", flush=True)


if __name__ == "__main__":
    main()
