"""Time a training step, and the drawing of pictures, of a 1.3 B model on a GPU against what the device reaches.

    python -m pretrain.bench_gpu step                      about 3 minutes
    python -m pretrain.bench_gpu sample                    about 1 minute
    python -m pretrain.bench_gpu step --tiny --device cpu  the same in small, to try the program itself

24 layers, 32 heads of 64, 256 + 32 x 32 slots, 16,384 words and 8,192 codes; weights, gradients and
moments in bf16, the stream in float32. Wall time, launches included. Rows are appended to a CSV file.
"""

import argparse
import gc
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kernels.measure import Ceilings, Clock, about, append, ceilings, first_line, table, wall_seconds
from pretrain.config import TransformerConfig
from pretrain.decoder import Decoder
from pretrain.draw import Taste, draw_rows
from pretrain.model import Linear, Recompute, Sizes, Transformer
from pretrain.update import Update, random_model

NOMINAL = 989e12  # FLOP a second of dense bf16 products, data sheet of the H100 SXM
RECOMPUTES: tuple[Recompute, ...] = ("none", "resblock")
OUT_OF_MEMORY = "out of memory"


@dataclass(frozen=True)
class Plan:
    """How large, and how often."""

    config: TransformerConfig = TransformerConfig(n_text=256, n_layers=24, n_heads=32, d_head=64)
    sizes: Sizes = Sizes(text_vocab=16_384, codebook=8_192, grid=32)
    batches: tuple[int, ...] = (8, 4, 2, 1)  # the largest first: should time run out, it is there
    candidates: tuple[int, ...] = (1, 64, 512)
    warmups: int = 3
    runs: int = 10
    copied: int = 2**30  # bytes, to measure the memory
    side: int = 8192  # of the matrices, to measure products
    compiles: bool = True


TINY = Plan(
    TransformerConfig(n_text=8, n_layers=3, n_heads=2, d_head=8, conv_kernel=3), Sizes(20, 12, 4),
    batches=(2,), candidates=(1, 3), warmups=0, runs=1, copied=2**20, side=64, compiles=False,
)  # fmt: skip


@dataclass(frozen=True)
class StepRow:
    """A training step; MFU counts model FLOPs, what is computed again for want of memory not among them."""

    batch: int
    recompute: str
    compiled: bool
    step_ms: float | None = None
    tokens_s: float | None = None
    model_tflop: float | None = None
    mfu: float | None = None  # of the measured rate of matrix products
    mfu_nominal: float | None = None
    peak_gb: float | None = None
    error: str = ""


@dataclass(frozen=True)
class SampleRow:
    """Drawing candidates of one caption, `batch` at a time."""

    candidates: int
    batch: int
    step_ms: float | None = None  # logits of one slot of the batch
    floor_ms: float | None = None
    ratio: float | None = None  # of the two
    draw_ms: float | None = None  # a slot with the choice of codes, the caption's reading and the graph's recording
    images_s: float | None = None
    weights_gb: float | None = None
    read_gb: float | None = None  # of the caches, by one step
    caches_gb: float | None = None
    error: str = ""


def step_flops(model: Transformer, batch: int) -> int:
    """Model FLOPs of one update: 6 x weights of linear layers x slots + 12 H D x attended pairs x layers.

    Each weight of a linear layer multiplies and adds once forward and twice backward, for each slot that
    the layer is applied to: the heads have the text's slots or the image's, all other layers all of them.
    Attention multiplies q by k and weights by v, D numbers each, for the pairs that the layer's mask allows;
    its backward counts twice that, the scores that it computes again are not model FLOPs.
    """
    layout, config = model.layout, model.config
    slots = {"text_head": config.n_text - 1, "image_head": layout.n_image}
    linears = [(name, module) for name, module in model.named_modules() if isinstance(module, Linear)]
    products = sum(m.in_features * m.out_features * slots.get(name, layout.n_slots) for name, m in linears)
    pairs = {sparsity: int(sparsity.mask().sum()) for sparsity in set(model.sparsities(layout))}
    attended = sum(pairs[sparsity] for sparsity in model.sparsities(layout))
    return batch * (6 * products + 12 * config.d_model * attended)


def step_row(
    plan: Plan, batch: int, recompute: Recompute, compiled: bool, device: torch.device, reached: Ceilings
) -> StepRow:
    """One measurement; its error where it fails."""
    try:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        update = Update(plan.config, plan.sizes, batch, device, torch.bfloat16, recompute)
        if compiled:
            torch.compiler.reset()  # or another batch would be compiled for batches of any size
            update.model.compile_mlps()
        for _ in range(plan.warmups):
            update()
        seconds = wall_seconds(device, lambda: [update() for _ in range(plan.runs)]) / plan.runs
    except Exception as error:
        return StepRow(batch, recompute, compiled, error=told(error))
    flops = step_flops(update.model, batch)
    return StepRow(
        batch, recompute, compiled,
        step_ms=seconds * 1e3, tokens_s=batch * update.model.layout.n_slots / seconds, model_tflop=flops / 1e12,
        mfu=flops / seconds / reached.matmul, mfu_nominal=flops / seconds / NOMINAL,
        peak_gb=torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None,
    )  # fmt: skip


def told(error: Exception) -> str:
    return OUT_OF_MEMORY if isinstance(error, torch.OutOfMemoryError) else first_line(error)


def step_rows(plan: Plan, device: torch.device, reached: Ceilings, seconds: float) -> Iterator[StepRow]:
    """All combinations; those that would begin after `seconds` only say so."""
    start = time.monotonic()
    for batch in plan.batches:
        for compiled in (False, True) if plan.compiles else (False,):
            for recompute in RECOMPUTES:
                if time.monotonic() - start > seconds:
                    yield StepRow(batch, recompute, compiled, error=f"not run: {seconds:.0f} seconds were over")
                else:
                    yield step_row(plan, batch, recompute, compiled, device, reached)
                    free(device)


def free(device: torch.device) -> None:
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def read_weights(model: Transformer) -> tuple[int, int]:
    """Bytes and numbers of the weights that a step of drawing reads; of an embedding it reads only rows."""
    modules = [module for name, module in model.named_modules() if name != "text_head"]
    kept = [m for m in modules if not isinstance(m, nn.Embedding)]
    own = [p for module in kept for p in module.parameters(recurse=False)]
    return sum(p.nbytes for p in own), sum(p.numel() for p in own)


def read_caches(decoder: Decoder) -> int:
    """Bytes of its caches that one step reads: all text, and of the image the run of the slot's column or ring."""
    text = sum(cache.text_keys.nbytes + cache.text_values.nbytes for cache in decoder.caches)
    return text + sum(cache.image.nbytes // cache.visits.runs for cache in decoder.caches)


@torch.inference_mode()
def step_seconds(plan: Plan, decoder: Decoder, batch: int, device: torch.device) -> float:
    """Wall time of one step of the decoder alone, once its graph is recorded."""
    decoder.read(torch.zeros((1, 0), dtype=torch.int64, device=device))
    before = torch.zeros(batch, dtype=torch.int64, device=device)
    decoder.step(before, 0)
    slots = range(1, min(plan.sizes.grid**2, 10 * plan.runs + 1))
    return wall_seconds(device, lambda: [decoder.step(before, slot) for slot in slots]) / len(slots)


def sample_row(
    plan: Plan, model: Transformer, weights: tuple[int, int], candidates: int, batch: int, reached: Ceilings
) -> SampleRow:
    """One batch of candidates drawn to the end. The floor: weights and what a step reads of the caches over the
    measured copy rate, or the products of the linear layers over that of products, the larger."""
    device, n_image = model.row.weight.device, plan.sizes.grid**2
    random = torch.Generator().manual_seed(0)
    text = torch.randint(plan.sizes.text_vocab, (1, plan.config.n_text - 1), generator=random).to(device)
    keys = torch.randint(2**62, (batch, n_image), generator=random).to(device)
    decoder = Decoder(model, text, batch)
    read, caches = read_caches(decoder), decoder.cache_bytes
    step = step_seconds(plan, decoder, batch, device)
    del decoder  # or its caches would stand beside those of the drawing
    free(device)
    whole = wall_seconds(device, lambda: list(draw_rows(model, text, keys, Taste())))
    n_bytes, n_weights = weights
    floor = reached.floor(n_bytes + read, 2 * n_weights * batch)
    return SampleRow(
        candidates, batch, step_ms=step * 1e3, floor_ms=floor * 1e3, ratio=step / floor,
        draw_ms=whole / n_image * 1e3, images_s=batch / whole,
        weights_gb=n_bytes / 1e9, read_gb=read / 1e9, caches_gb=caches / 1e9,
    )  # fmt: skip


def drawing_model(plan: Plan, device: torch.device) -> tuple[Transformer, tuple[int, int]]:
    """A model that draws all codes, not one, and its weights that a step reads."""
    model = random_model(plan.config, plan.sizes, device, torch.bfloat16).eval()
    with torch.no_grad():
        nn.init.normal_(model.image_head.weight, std=0.05)
    weights = read_weights(model)  # packing takes them off the list of parameters
    return model.pack(), weights


def sample_rows(plan: Plan, device: torch.device, reached: Ceilings) -> Iterator[SampleRow]:
    """A row for each number of candidates, drawn in the largest batch that fits: halves are tried."""
    model, weights = drawing_model(plan, device)
    if device.type == "cuda":  # start the libraries, compile the kernels
        sample_row(plan, model, weights, 1, 1, reached)
    for candidates in plan.candidates:
        row = SampleRow(candidates, 2 * candidates, error=OUT_OF_MEMORY)
        while row.error == OUT_OF_MEMORY and row.batch > 1:
            batch = row.batch // 2
            try:
                row = sample_row(plan, model, weights, candidates, batch, reached)
            except Exception as error:
                row = SampleRow(candidates, batch, error=told(error))
            free(device)
        yield row


def measure(what: str, device: torch.device, plan: Plan, seconds: float) -> Iterator[dict[str, Any]]:
    """Rows of `step` or `sample`, complete with what they were measured on."""
    clock = Clock(device, runs=plan.runs, warmups=plan.warmups)
    reached = ceilings(clock, plan.copied, plan.side)
    del clock
    on = {"date": date.today().isoformat(), **about(device, reached)}
    free(device)
    rows = step_rows(plan, device, reached, seconds) if what == "step" else sample_rows(plan, device, reached)
    for row in rows:
        yield asdict(row) | on


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["step", "sample"])
    parser.add_argument("--out", type=Path, help="CSV to append to; pretrain/results_gpu_WHAT.csv if not given")
    parser.add_argument("--seconds", type=float, default=240, help="no further training step is timed after these")
    parser.add_argument("--tiny", action="store_true", help="small sizes and one repetition: no figures to keep")
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    given = parser.parse_args(words)
    if given.device.type == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device; try --tiny --device cpu")
    if given.device.type == "cpu":
        torch.set_num_threads(1)
    out = given.out or Path(__file__).parent / f"results_gpu_{given.what}.csv"
    rows = []
    for row in measure(given.what, given.device, TINY if given.tiny else Plan(), given.seconds):
        append([row], out)
        rows.append(row)
        print(table([row], list(row)[:5]).splitlines()[1], row["error"], flush=True)
    shown = list(rows[0])
    print(table(rows, shown[: shown.index("error") + 1]))
    print(", ".join(f"{name} {rows[0][name]}" for name in shown[shown.index("error") + 1 :]))


if __name__ == "__main__":
    main()
