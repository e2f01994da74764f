"""Image shards -> token shards: each picture as a grid of code numbers, or as several of random crops.

    smalti tokenise images=data/images dvae=runs/dvae out=data/tokens

Writes tars with KEY.npy (uint16, crops x G x G) and KEY.txt, stamped with the fingerprint of the
dVAE. Killed and run again, it keeps the finished shards. Shared by the ranks of a launch, or by tasks
(tasks=8 task=0, ...; `smalti tokenise merge` ends it): the result is the same bytes. With
precision=bf16 a sample is coded in fp32 too, before any work, and too many other codes are refused.
At the end some pictures are drawn from the codes written (`sample.png`) and their PSNR is told. The
embedded emoji take some seconds.
"""

import itertools
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cluster.command import Command, run_command
from cluster.manifest import sweep, write_json, write_manifest
from cluster.metrics import Progress
from cluster.process import Place, computes_bf16, gathered, lone_place, meet, meeting_place
from data_pipeline.bpe import Vocabulary
from data_pipeline.contents import npy_bytes
from data_pipeline.convert import SPLITS
from data_pipeline.shards import Sample, Shard, index_record, open_shard, write_shard
from data_pipeline.shares import refuse_gaps, said_by_each_rank, share_of
from dvae.check_codes import N_DRAWN, draw_back, encode
from dvae.model import Dvae
from dvae.token_work import TokeniseConfig, Work, crops_of
from dvae.train import open_dvae

COMPUTES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def tokenise(config: TokeniseConfig) -> None:
    """Run the stage; see the module's text."""
    with meeting_place(on_cpu=False) as place, said_by_each_rank(place):
        is_fast = config.precision == "auto" and computes_bf16(place)  # all ranks ask, whatever each finds below
        work = Work(config)
        share = share_of(work.names, config.tasks, config.task, place)
        work.settle(place, is_fast)
        done = work.is_done()
        speed = (0, 0.0) if done else encode_share(work, share, place)
        if config.tasks or done:
            return
        meet(place)
        coded, seconds = zip(*gathered(place, speed), strict=True)
        if place.is_main:
            finish(work, place.device, rate(sum(coded), max(seconds)))


def encode_share(work: Work, names: list[str], place: Place) -> tuple[int, float]:
    """The shards of these names that are not done; pictures coded and seconds."""
    work.claim()
    if work.warning and place.is_main:
        print(work.warning)
    model, _ = open_dvae(Path(work.config.dvae), place.device, COMPUTES[work.precision])
    shards = [open_shard(work.images / name) for name in names]
    progress = Progress("tokenise", sum(map(len, shards)), unit="picture")
    coded, start = 0, time.monotonic()
    for shard in shards:
        if work.record(shard.path.name) is None:
            write_tokens(work, shard, model, place.device)
            coded += len(shard)
        progress.advance(len(shard))
    progress.close()
    seconds = time.monotonic() - start
    if work.config.tasks:
        print(
            f"task {work.config.task} of {work.config.tasks}: {len(names)} of {len(work.names)} shards are done"
            f"{rate(coded, seconds)}; when all tasks are, `smalti tokenise merge` with the same words ends it"
        )
    return coded, seconds


def rate(coded: int, seconds: float) -> str:
    """Throughput in words, "" if nothing was left to do."""
    return f", {coded / max(seconds, 1e-9):,.1f} pictures/s" if coded else ""


def write_tokens(work: Work, shard: Shard, model: Dvae, device: torch.device) -> None:
    """The token shard of an image shard, and its record."""
    path = work.out / shard.path.name
    coded = encode_shard(shard, model, work.config, device)
    written = write_shard(path, coded)
    lengths = captions_by_tokens(coded, work.vocabulary)
    record = {"count": len(coded), "too_small": len(shard) - len(coded), "captions_by_tokens": lengths}
    record |= {"precision": work.precision} if work.precision != "fp32" else {}
    write_json(path.with_suffix(".done.json"), record | (index_record(path) if written else {}))


def merge(config: TokeniseConfig) -> None:
    """Write the manifest over the shards of all tasks; FolderError while one is missing."""
    work, place = Work(config), lone_place()
    work.settle(place, is_fast=False)  # the tasks have decided
    if not work.is_done():
        finish(work, place.device)


def finish(work: Work, device: torch.device, speed: str = "") -> None:
    """Records -> manifest, when a sample of what is written has been looked at."""
    records = {name: work.record(name) for name in work.names}
    missing = {number: name for number, name in enumerate(work.names) if records[name] is None}
    refuse_gaps(missing, len(work.names), "tokenise", work.config.tasks)
    work.claim()
    found = {name: record for name, record in sorted(records.items()) if record}
    of_split = {split: [found[name] for name in found if name.startswith(f"{split}-")] for split in SPLITS}
    counts: dict[str, Any] = {split: sum(r["count"] for r in of_split[split]) for split in SPLITS if of_split[split]}
    if not counts.get("train"):
        raise work.nothing_fits()
    counts |= {"codebook": work.shape.codebook, "grid": work.shape.grid, "crops": work.config.crops}
    lengths = itertools.zip_longest(*(record["captions_by_tokens"] for record in of_split["train"]), fillvalue=0)
    counts["captions_by_tokens"] = [sum(column) for column in lengths]
    too_small = sum(record["too_small"] for record in found.values())
    if too_small:
        counts["too_small"] = too_small
        print(f"{too_small} pictures are left out: their short side is below the dVAE's {work.shape.image_side} pixels")
    files = {
        name: {key: record[key] for key in ("bytes", "sha256")} for name, record in found.items() if record["count"]
    }
    sample = list(work.first_crops("heldout", N_DRAWN)) or list(work.first_crops("train", N_DRAWN))
    counts |= work.equal | {"sample_psnr_db": draw_back(work.out, Path(work.config.dvae), sample, device)}
    sweep(work.out)
    write_manifest(work.out, "tokens", work.settings, counts, files, work.made_from)
    n_pictures = counts["train"] + counts.get("heldout", 0)
    print(f"{n_pictures} pictures as {work.shape.grid}x{work.shape.grid} codes in {work.out}{speed}")


@torch.no_grad()
def encode_shard(shard: Shard, model: Dvae, config: TokeniseConfig, device: torch.device) -> list[Sample]:
    """Token samples of one image shard, in its order, without pictures that are too small to be cropped."""
    coded = []
    for first in range(0, len(shard), config.batch):
        samples = [shard.read(number) for number in range(first, min(first + config.batch, len(shard)))]
        crops = [crops_of(sample, model.config.image_side, config) for sample in samples]
        pictures = [crop for each in crops for crop in each]
        parts = [pictures[at : at + config.batch] for at in range(0, len(pictures), config.batch)]
        codes = itertools.chain.from_iterable(encode(np.stack(part), model, device) for part in parts)
        for sample, each in zip(samples, crops, strict=True):
            if each:
                grids = np.stack(list(itertools.islice(codes, len(each))))
                coded.append(Sample(sample.key, {"npy": npy_bytes(grids), "txt": sample.files["txt"]}))
    return coded


def captions_by_tokens(samples: list[Sample], vocabulary: Vocabulary) -> list[int]:
    """How many captions have 0, 1, 2, ... tokens: from it training says how many it must cut."""
    lengths = [len(vocabulary.encode(sample.files["txt"].decode())) for sample in samples]
    return np.bincount(np.array(lengths, np.int64)).tolist()


COMMAND = Command("tokenise", TokeniseConfig, Path(__file__).parent / "configs" / "tokenise", tokenise, __doc__)

if __name__ == "__main__":
    sys.exit(run_command(COMMAND, sys.argv[1:]))
