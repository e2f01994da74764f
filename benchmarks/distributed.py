"""What sharding, compression and gradient scales do and cost: `python -m benchmarks.distributed [--json] [ROW...]`.

Each row is a claim with its bar, measured in processes of its own; ROW is one name, or the first part of several
(`compress`). compress/loss and why/... train on token shards: those of `smalti demo`, or of data=FOLDER with tokens/
and vocab/ in it. network/... needs root on Linux, ip and tc. All rows take about 45 minutes on two cores.
"""

import argparse
import datetime
import json
import os
import platform
import signal
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import torch

from benchmarks.distributed_arithmetic import householder_row, share_row
from benchmarks.distributed_jobs import ROOT, Failed, Row, answers, ranks
from benchmarks.distributed_link import LINK, bits_a_second, ranks_on, two_nodes
from benchmarks.distributed_why import why_rows
from benchmarks.peers import cpu_name

RANKS = "benchmarks.distributed_ranks"
RUN_SECONDS, COUNT_SECONDS, TIME_SECONDS = 1200, 300, 900
# compress/loss: pretrain/configs/emoji.toml, half as wide and shortened; 20 / 128 = 15.6 % is sent (84.4 % saved) on 2
# shards. power_sgd.start_step stays 100: with 30, when the step size is at its peak, 2 seeds ended 0.9 and 1.3 % worse.
SHORT = (
    "emoji", "precision=fp32", "zero_stage=3", "zero_shards=2", "n_steps=300", "model.d_head=32",
    "optim.warmup_steps=50", "evaluate_every=300", "save_every=300",
)  # fmt: skip
SHORT_RANK, SEEDS = 20, (0, 1, 2)
LINK_RATE, NETWORK_RANK, NETWORK_ROUNDS = "1gbit", 16, 12
PRESETS = {"tiny": (12, 5), "small": (8, 1)}  # rounds in which both take turns, and steps in each


def heldout_loss(run: Path) -> float:
    """A finished run's held-out loss, text and image weighted as in training."""
    counts = json.loads((run / "manifest.json").read_text())["counts"]
    return counts["val/text_loss"] / 8 + counts["val/image_loss"] * 7 / 8


def compressed_loss_row(data: Path, folder: Path) -> Row:
    """Held-out loss after equal steps with compression and without: the worst seed."""
    worse, said = [], []
    for seed in SEEDS:
        losses = {}
        for rank in (0, SHORT_RANK):
            out = folder / f"seed{seed}-rank{rank}"
            words = ["torch.distributed.run", "--standalone", "--nproc-per-node", "4", "-m", "pretrain.train", *SHORT]
            words += [f"tokens={data / 'tokens'}", f"vocab={data / 'vocab'}", f"out={out}", f"power_sgd.rank={rank}"]
            answers([[sys.executable, "-m", *words, f"seed={seed}", f"data.seed={seed}"]], RUN_SECONDS)
            losses[rank] = heldout_loss(out)
        worse.append(losses[SHORT_RANK] / losses[0] - 1)
        said.append(f"{losses[0]:.4f} -> {losses[SHORT_RANK]:.4f}")
    note = f"84.4 % saved in updates 101 to 300, 2 x 2 ranks; seeds {SEEDS}: {', '.join(said)} nats"
    return Row("compress/loss", max(map(abs, worse)), 0.01, False, note, {"relative": worse})


def bytes_row(data: Path, folder: Path) -> Row:
    """What matrices of resblocks send, over what they would send whole, against r (m + 2) / (2 d m)."""
    engine = ranks(4, [RANKS, "bytes"], COUNT_SECONDS)
    shard = ranks(2, [RANKS, "shard-bytes"], COUNT_SECONDS)
    error = max(abs(found["share"] / found["formula"] - 1) for found in (engine, shard))
    note = (
        f"r (m+2) / (2 d m): engine, 2 replicas of m=2, d=64, r=16: {engine['share']:.5f} for {engine['formula']:.5f}; "
        f"shard 0 of m=8 and its one replica, d=256, r=64: {shard['share']:.5f} for {shard['formula']:.5f}"
    )
    return Row("compress/bytes", error, 0.01, False, note)


def ddp_row(name: str) -> Row:
    """Median over rounds of a step of ours over one of plain data parallelism, 2 processes of one thread."""
    found = ranks(2, [RANKS, "ddp", name, *map(str, PRESETS[name])], TIME_SECONDS)
    ratio, low, high = statistics.median(found["ratios"]), min(found["ratios"]), max(found["ratios"])
    note = f"{found['engine'] * 1e3:.0f} against {found['plain'] * 1e3:.0f} ms; rounds {low:.2f} to {high:.2f}"
    return Row(f"ddp/{name}", ratio, 1.25, False, note, found)


def network_row(a_node: int) -> Row:
    """Steps of two nodes over a slow link, without compression over with; the fastest of each, for others share the
    cores with all ranks."""
    what = f"network/1gbit-2x{a_node}"
    with two_nodes(LINK_RATE) as nodes:
        rate = bits_a_second(nodes) / 1e9
        words = [RANKS, "network", str(a_node), str(NETWORK_RANK), str(NETWORK_ROUNDS), LINK]
        found = ranks_on(nodes, a_node, words, TIME_SECONDS)
    whole, thin = min(found["whole"]), min(found["compressed"])
    crossed = {name: f"{count / 1e6:.0f} MB" for name, count in found["bytes"].items()}
    medians = statistics.median(found["whole"]) / statistics.median(found["compressed"])
    note = (
        f"{whole:.2f} s against {thin:.2f} s, medians {medians:.2f}x; {crossed['whole']} and {crossed['compressed']} a "
        f"step each way; link {rate:.2f} Gbit/s; {found['cpu']:.2f} CPU s a compressed step and rank"
    )
    return Row(what, whole / thin, 3.0, True, note, found)


ROWS: dict[str, Callable[[Path, Path], Row | list[Row]]] = {
    "why": why_rows,
    "compress/loss": compressed_loss_row,
    "compress/bytes": bytes_row,
    "ddp/tiny": lambda data, folder: ddp_row("tiny"),
    "ddp/small": lambda data, folder: ddp_row("small"),
    "power_sgd/share": lambda data, folder: share_row(),
    "network/1gbit-2x2": lambda data, folder: network_row(2),
    "network/1gbit-2x1": lambda data, folder: network_row(1),
    "householder": lambda data, folder: householder_row(),
}
NEED_DATA = ("why", "compress/loss")


def chosen(names: list[str]) -> list[str]:
    """The rows that these words name, or all."""
    found = [row for row in ROWS if not names or any(row == name or row.startswith(f"{name}/") for name in names)]
    unknown = [name for name in names if not any(row == name or row.startswith(f"{name}/") for row in ROWS)]
    if unknown:
        raise SystemExit(f"no row {', '.join(unknown)}; there are: {', '.join(ROWS)}")
    return found


def rows(names: list[str], data: Path, folder: Path) -> Iterator[Row]:
    """Rows one after the other; one that cannot be measured has no value, and says why."""
    for name in chosen(names):
        try:
            missing = [part for part in ("tokens", "vocab") if not (data / part / "manifest.json").is_file()]
            if missing and name in NEED_DATA:
                raise Failed(f"{data} has no {missing[0]}/: make it with `smalti demo`, or give data=FOLDER")
            made = ROWS[name](data, folder)
        except Failed as error:
            made = Row(name, None, 0.0, False, str(error))
        yield from made if isinstance(made, list) else [made]


def about(row: Row) -> dict[str, object]:
    named = {"what": row.what, "value": row.value, "bar": row.bar, "ok": row.ok}
    return named | {"at_least": row.at_least, "note": row.note, "load": os.getloadavg()[0], "details": row.details}


def device() -> dict[str, object]:
    versions = {name: metadata.version(name) for name in ("torch", "deepspeed", "numpy")}
    machine = {"cpu": cpu_name(), "cores": os.cpu_count(), "system": platform.platform()}
    return {"what": "device", "date": datetime.date.today().isoformat(), **machine, **versions}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", metavar="ROW | data=FOLDER", help=f"rows: {', '.join(ROWS)}")
    parser.add_argument("--json", action="store_true", help="one JSON object a row, the machine first")
    parser.add_argument("--keep", type=Path, help="a new folder for the runs that rows make, which then stay")
    words = parser.parse_args()
    settings = [word.removeprefix("data=") for word in words.words if word.startswith("data=")]
    names = [word for word in words.words if not word.startswith("data=")]
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that processes, namespaces and folders are cleared
    verdicts = []
    with tempfile.TemporaryDirectory() as temporary:
        if words.json:
            print(json.dumps(device()), flush=True)
        data = Path(settings[-1] if settings else ROOT / "demo" / "data").absolute()
        for row in rows(names, data, (words.keep or Path(temporary)).absolute()):
            verdicts.append(row.ok)
            value = "none" if row.value is None else f"{row.value:.4g}"
            side = ">=" if row.at_least else "<="
            line = f"{row.what:<22} {value:>9} {side} {row.bar:<7g} {'ok' if row.ok else 'MISSED':<7} {row.note}"
            print(json.dumps(about(row)) if words.json else line, flush=True)
    return 0 if all(verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
