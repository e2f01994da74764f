"""Put each caption's candidates in order, best first, by a contrastive model.

    smalti rerank samples=samples scorer=runs/scorer out=ranked

Writes OUT/0000/00.png (the best of caption 0) and so on, OUT/samples.jsonl with scores, OUT/grid.png.
The score is the cosine of picture and caption (Ramesh et al. 2021, section 2.6).
"""

import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from cluster.command import Command, run_command
from cluster.manifest import check_files, is_done, read_manifest, refuse_other_origin, write_manifest
from cluster.metrics import Progress
from cluster.process import lone_place
from data_pipeline.bpe import Vocabulary, open_vocabulary
from data_pipeline.loader import pad_text, to_pixels
from pretrain.config import RerankConfig
from pretrain.pictures import caption_grid, read_rows, save_rows
from pretrain.scorer import Scorer, open_scorer


def rerank(config: RerankConfig) -> None:
    """Run the stage; see the module's text."""
    place = lone_place()
    samples, out = Path(config.samples), Path(config.out)
    about = read_manifest(samples, "samples")
    check_files(samples, about)
    vocabulary, vocab = open_vocabulary(Path(config.vocab))
    scorer, scorer_about = open_scorer(Path(config.scorer), vocabulary, place.device)
    refuse_other_origin(Path(config.scorer), scorer_about, "vocab", Path(config.vocab), vocab)
    made_from = {"samples": about.fingerprint, "scorer": scorer_about.fingerprint}
    settings = {"keep": config.keep}
    if is_done(out, "ranked", settings, made_from):
        print(f"{out} is finished already")
        return
    ranked = []
    groups = read_rows(samples)
    progress = Progress("rerank", len(groups), unit="caption")
    for name, rows in groups.items():
        pictures = [Image.open(samples / row["file"]).convert("RGB") for row in rows]
        scores = score(scorer, vocabulary, rows[0]["caption"], pictures)
        order = sorted(range(len(rows)), key=lambda i: -scores[i])[: config.keep or None]
        (out / name).mkdir(parents=True, exist_ok=True)
        for rank, i in enumerate(order):
            file = f"{name}/{rank:02d}.png"
            shutil.copyfile(samples / rows[i]["file"], out / file)
            ranked.append(rows[i] | {"file": file, "rank": rank, "score": scores[i]})
        progress.advance()
    progress.close()
    save_rows(out, ranked)
    caption_grid(out, ranked)
    files = ["samples.jsonl", *(row["file"] for row in ranked)]
    write_manifest(out, "ranked", settings, {"captions": len(groups)}, files, made_from)
    print(f"{len(ranked)} pictures of {len(groups)} captions, best first, in {out}")


@torch.no_grad()
def score(scorer: Scorer, vocabulary: Vocabulary, caption: str, pictures: list[Image.Image]) -> list[float]:
    """Cosine of each picture with the caption, in [-1, 1]."""
    side = scorer.config.image_side
    pixels = to_pixels(np.stack([np.asarray(p.resize((side, side), Image.Resampling.LANCZOS)) for p in pictures]))
    device = scorer.log_scale.device
    text = pad_text([vocabulary.encode(caption)], scorer.config.n_text)
    seen, said = scorer.embed(pixels.to(device), text.to(device))
    return (seen @ said[0]).tolist()


COMMAND = Command("rerank", RerankConfig, Path(__file__).parent / "configs" / "rerank", rerank, __doc__)

if __name__ == "__main__":
    sys.exit(run_command(COMMAND, sys.argv[1:]))
