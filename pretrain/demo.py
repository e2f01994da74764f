"""The main job on the embedded emoji, end to end, ending in one page to look at.

    smalti demo out=demo

Preprocess, dVAE, tokenise, transformer (DeepSpeed, 2 processes), scorer, sample, rerank; then
OUT/index.html, OUT/index.png and OUT/demo.json. Each stage is the command you would type; the page
lists them. Interrupted and run again, it goes on; finished stages take no time. About 10 minutes on
2 CPU cores.
"""

import itertools
import json
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from cluster.command import Command, run_command
from cluster.manifest import read_manifest, write_bytes, write_json
from cluster.settings import SettingError, UserError, require_at_least_one, setting
from cluster.watch import INTERRUPTED, REQUEUE, Requeue
from data_pipeline.loader import Shards, caption_of
from pretrain.page import write_page


@dataclass(frozen=True)
class DemoConfig:
    """Where the demo goes and how much it draws."""

    out: str = setting("demo", "folder to write")
    processes: int = setting(0, "training processes; 0 is one per GPU, or 2 on a CPU")
    captions: int = setting(32, "held-out captions drawn for the page")
    candidates: int = setting(32, "pictures drawn for each")
    dvae: str = setting("", "more words for `smalti dvae`, as n_steps=100")
    train: str = setting("", "more words for `smalti train`")
    scorer: str = setting("", "more words for `smalti scorer`")

    def __post_init__(self) -> None:
        require_at_least_one(self, ("captions", "candidates"))
        if self.processes < 0:
            raise SettingError(f"processes={self.processes} must be at least 0")


@dataclass(frozen=True)
class Stage:
    """A verb, the words it is given, and how it is shown to a person."""

    name: str
    words: list[str]
    launcher: list[str]

    @property
    def shown(self) -> str:
        return shlex.join(self.launcher_shown + self.words)

    @property
    def launcher_shown(self) -> list[str]:
        return ["deepspeed", *self.launcher[3:]] if self.launcher else ["smalti", self.name]


TEMPERATURE = 0.8  # a model this small says much that is unlikely at the paper's 1.0
NOT_BEGUN: dict[str, Any] = {"seconds": 0.0, "peak_gib": 0.0, "done": False}


def stages(config: DemoConfig) -> list[Stage]:
    """The main path, in order."""
    out = Path(config.out)
    data, runs = out / "data", out / "runs"
    images, vocab, tokens = f"images={data}/images", f"vocab={data}/vocab", f"tokens={data}/tokens"
    dvae, model = f"dvae={runs}/dvae", f"model={runs}/train"
    count = config.processes or torch.cuda.device_count() or 2
    flag = "--num_gpus" if torch.cuda.is_available() else "--num_accelerators"
    launcher = ["-m", "deepspeed.launcher.runner", "--quiet", flag, str(count), "--module", "pretrain.train"]
    drawn = [f"candidates={config.candidates}", f"temperature={TEMPERATURE}", f"out={out}/samples"]
    return [
        Stage("preprocess", ["emoji", f"out={data}"], []),
        Stage("dvae", ["emoji-64", images, f"out={runs}/dvae", *shlex.split(config.dvae)], []),
        Stage("tokenise", [images, vocab, dvae, f"out={tokens.partition('=')[2]}"], []),
        Stage("train", ["emoji", tokens, vocab, f"out={runs}/train", *shlex.split(config.train)], launcher),
        Stage("scorer", ["emoji", images, vocab, f"out={runs}/scorer", *shlex.split(config.scorer)], []),
        Stage("sample", [f"captions={out}/captions.txt", model, dvae, vocab, *drawn], []),
        Stage("rerank", [f"samples={out}/samples", f"scorer={runs}/scorer", vocab, f"out={out}/ranked"], []),
    ]


def demo(config: DemoConfig) -> None:
    """Run the stages that are not done, then write the page."""
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    record_path = out / "stages.json"
    record: dict[str, Any] = json.loads(record_path.read_text()) if record_path.is_file() else {}
    for number, stage in enumerate(stages(config), 1):
        if stage.name == "sample":
            write_captions(out, config.captions)
        print(f"[{number}/8] {stage.shown}", flush=True)
        record[stage.name] = timed(stage, record.get(stage.name, NOT_BEGUN), record_path, record)
    print("[8/8] the page", flush=True)
    start = time.monotonic()
    numbers = collect(out, record)
    write_page(out, numbers, [stage.shown for stage in stages(config)])
    numbers["seconds"]["page"] = record.get("page", {}).get("seconds") or time.monotonic() - start
    record["page"] = {"seconds": numbers["seconds"]["page"], "peak_gib": 0.0, "done": True}
    numbers["seconds"]["total"] = sum(stage["seconds"] for stage in record.values())
    write_json(record_path, record)
    write_json(out / "demo.json", numbers)
    print(f"{(out / 'index.html').resolve()}")


def timed(stage: Stage, before: dict[str, Any], path: Path, record: dict[str, Any]) -> dict[str, Any]:
    """Run a stage and keep its seconds and peak memory, also when it is interrupted.

    Interrupted runs of a stage add up; finding it finished costs only its start-up, which is not counted.
    """
    start = time.monotonic()
    after = dict(before)
    with watched_memory() as peak:
        try:
            run_stage(stage)
            after["done"] = True
        finally:
            if not before["done"]:
                after["seconds"] += time.monotonic() - start
            after["peak_gib"] = max(before["peak_gib"], peak[0])
            write_json(path, record | {stage.name: after})
    return after


def run_stage(stage: Stage) -> None:
    """Run a stage as a process of its own; its failure is the demo's.

    The stage gets its own session, so that Ctrl-C reaches only us; we pass it to the processes that
    do the work and wait until they have saved. (DeepSpeed's launcher would die before them.)
    """
    arguments = stage.launcher or ["-m", "pretrain.cli", stage.name]
    process = subprocess.Popen([sys.executable, *arguments, *stage.words], start_new_session=True)
    try:
        code = process.wait()
    except KeyboardInterrupt:
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        for worker in family:
            if worker.is_running() and not worker.children():
                worker.send_signal(signal.SIGINT)
        process.wait()
        raise
    if code == INTERRUPTED:
        raise KeyboardInterrupt
    if code == REQUEUE:
        raise Requeue
    if code:
        raise UserError(f"stage {stage.name} failed (exit {code}; its message is above): {stage.shown}")


@contextmanager
def watched_memory() -> Iterator[list[float]]:
    """A one-element list that holds the peak resident GiB of this process and all its children."""
    peak, stop = [0.0], threading.Event()

    def watch() -> None:
        me = psutil.Process()
        while not stop.wait(0.5):
            total = 0
            for process in [me, *me.children(recursive=True)]:
                try:
                    total += process.memory_info().rss
                except psutil.NoSuchProcess:
                    continue
            peak[0] = max(peak[0], total / 2**30)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        stop.set()
        thread.join()


def write_captions(out: Path, count: int) -> None:
    """captions.txt: the first held-out captions, the text of cells no training saw."""
    heldout = Shards(out / "data" / "images", "images", "heldout")
    lines = [caption_of(sample) for sample in itertools.islice(heldout, count)]
    write_bytes(out / "captions.txt", "\n".join(lines).encode() + b"\n")


def collect(out: Path, record: dict[str, Any]) -> dict[str, Any]:
    """The numbers of demo.json, from the manifests of the stages."""
    dvae = read_manifest(out / "runs" / "dvae", "dvae")
    transformer = read_manifest(out / "runs" / "train", "transformer")
    scorer = read_manifest(out / "runs" / "scorer", "scorer")
    return {
        "dvae": {
            "psnr_db": dvae.counts["val/psnr_db"],
            "psnr_of_mean_db": dvae.counts["val/psnr_of_mean_db"],
            "codes_used": dvae.counts["val/codes_used"],
            "perplexity": dvae.counts["val/perplexity"],
            "codebook": dvae.settings["model"]["codebook"],
        },
        "transformer": {
            "image_loss_true": transformer.counts["val/image_loss"],
            "image_loss_shuffled": transformer.counts["val/image_loss_shuffled"],
            "text_loss": transformer.counts["val/text_loss"],
        },
        "scorer": {"top5_of_64": scorer.counts["val/top5_of_64"]},
        "seconds": {name: stage["seconds"] for name, stage in record.items()},
        "peak_memory_gib": max(stage["peak_gib"] for stage in record.values()),
        "versions": transformer.versions,
        "commit": commit(),
    }


def commit() -> str:
    """The checkout's commit, or "not a checkout"."""
    answer = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return answer.stdout.strip() or "not a checkout"


COMMAND = Command("demo", DemoConfig, Path(__file__).parent / "configs" / "demo", demo, __doc__)

if __name__ == "__main__":
    sys.exit(run_command(COMMAND, sys.argv[1:]))
