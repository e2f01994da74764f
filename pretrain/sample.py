"""Draw pictures for captions: a trained run -> PNGs that carry how they were made.

    smalti sample captions=captions.txt candidates=16 out=samples

Writes OUT/0000/00.png ... (a folder a caption), OUT/samples.jsonl, OUT/grid.png. Each PNG holds its
caption, seed, settings and the fingerprints of the weights. Killed and run again, it keeps finished
captions. Drawing 16 candidates of 24 captions at 64 px takes some seconds.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from cluster.command import Command, run_command
from cluster.manifest import (
    FolderError,
    Manifest,
    is_done,
    read_manifest,
    refuse_other_origin,
    write_json,
    write_manifest,
)
from cluster.metrics import Progress
from cluster.process import lone_place
from cluster.settings import SettingError, from_dict, to_dict
from cluster.weights import load_weights
from data_pipeline.bpe import Vocabulary, open_vocabulary
from data_pipeline.loader import pad_text
from dvae.likelihood import most_likely_pixels
from dvae.model import Dvae
from dvae.train import open_dvae
from pretrain.config import SampleConfig, TransformerConfig
from pretrain.draw import draw_codes, uniforms
from pretrain.model import Sizes, Transformer
from pretrain.pictures import caption_grid, save_rows


def open_transformer(folder: Path, device: torch.device) -> tuple[Transformer, Manifest]:
    """The trained transformer of a finished run folder, in eval mode, and its manifest."""
    manifest = read_manifest(folder, "transformer")
    config = json.loads((folder / "config.json").read_text())
    sizes = Sizes(config["text_vocab"], config["codebook"], config["grid"])
    model = Transformer(from_dict(TransformerConfig, manifest.settings["model"]), sizes)
    load_weights(folder, model)
    return model.eval().to(device), manifest


def sample(config: SampleConfig) -> None:
    """Run the stage; see the module's text."""
    captions = read_captions(config.captions)
    place = lone_place()
    model, about = open_transformer(Path(config.model), place.device)
    dvae, dvae_about = open_dvae(Path(config.dvae), place.device)
    vocabulary, vocab = open_vocabulary(Path(config.vocab))
    refuse_other_origin(Path(config.model), about, "dvae", Path(config.dvae), dvae_about.fingerprint)
    refuse_other_origin(Path(config.model), about, "vocab", Path(config.vocab), vocab)
    made_from = {"model": about.fingerprint, "dvae": dvae_about.fingerprint, "vocab": vocab}
    free = ("captions", "model", "dvae", "vocab", "out", "batch")
    settings = {key: value for key, value in to_dict(config).items() if key not in free} | {"captions": captions}
    out = Path(config.out)
    if is_done(out, "samples", settings, made_from):
        print(f"{out} is finished already")
        return
    origin = {"settings": {k: v for k, v in settings.items() if k != "captions"}, "made_from": made_from}
    text = encode_captions(captions, vocabulary, model.config.n_text)
    progress = Progress("sample", len(captions) * config.candidates, unit="picture")
    for number, caption in enumerate(captions):
        folder = out / f"{number:04d}"
        if not _is_drawn(folder, origin | {"caption": caption}):
            folder.mkdir(parents=True, exist_ok=True)
            pictures = draw_caption(config, model, dvae, caption, text[number])
            for candidate, picture in enumerate(pictures):
                own = {"caption": caption, "candidate": candidate}
                save_png(folder / f"{candidate:02d}.png", picture, own | origin)
            write_json(folder / "done.json", origin | {"caption": caption})
        progress.advance(config.candidates)
    progress.close()
    _finish(out, captions, config, settings, made_from)


def draw_caption(config: SampleConfig, model: Transformer, dvae: Dvae, caption: str, text: Tensor) -> np.ndarray:
    """(N, P, P, 3) uint8: the candidates of one caption with ids `text` (T-1,)."""
    n_image = model.layout.n_image
    device = model.row.weight.device
    drawn = []
    for first in range(0, config.candidates, config.batch):
        numbers = range(first, min(first + config.batch, config.candidates))
        uniform = torch.stack([uniforms(caption, config.seed, n, n_image) for n in numbers])
        codes = draw_codes(
            model, text.expand(len(numbers), -1).to(device), uniform, config.temperature, config.top_k, config.top_p
        )
        drawn.append(decode_codes(dvae, codes))
    return np.concatenate(drawn)


@torch.no_grad()
def decode_codes(dvae: Dvae, codes: Tensor) -> np.ndarray:
    """(N, I) codes -> (N, P, P, 3) uint8 pictures."""
    grid = dvae.config.grid
    pixels = most_likely_pixels(dvae.decode(codes.unflatten(1, (grid, grid))))
    return (pixels * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def read_captions(source: str) -> list[str]:
    """Captions of a text file, one a line, or the caption itself; SettingError if there is none."""
    if not source.strip():
        raise SettingError("captions is empty: give a text file with one caption a line, or a caption")
    path = Path(source)
    if path.suffix == ".txt" and not path.is_file():
        raise FolderError(f"captions file {source} does not exist")
    lines = path.read_text().splitlines() if path.suffix == ".txt" else [source]
    captions = [line.strip() for line in lines if line.strip()]
    if not captions:
        raise FolderError(f"captions file {source} holds no caption")
    return captions


def encode_captions(captions: list[str], vocabulary: Vocabulary, n_text: int) -> Tensor:
    """(N, T-1) ids; a caption longer than the text length is refused by name, not cut."""
    ids = [vocabulary.encode(caption) for caption in captions]
    for caption, tokens in zip(captions, ids, strict=True):
        if len(tokens) > n_text - 1:
            raise FolderError(f"caption {caption!r} has {len(tokens)} tokens, the model reads {n_text - 1}: shorten it")
    return pad_text(ids, n_text)


def save_png(path: Path, picture: np.ndarray, origin: dict[str, Any]) -> None:
    """Write a picture (P, P, 3) with its origin in the PNG's text chunks."""
    text = PngInfo()
    for key, value in origin.items():
        text.add_text(key, value if isinstance(value, str) else json.dumps(value))
    Image.fromarray(picture).save(path, pnginfo=text)


def _is_drawn(folder: Path, origin: dict[str, Any]) -> bool:
    done = folder / "done.json"
    return done.is_file() and json.loads(done.read_text()) == origin


def _finish(out: Path, captions: list[str], config: SampleConfig, settings: dict, made_from: dict[str, str]) -> None:
    rows = [
        {"caption": caption, "file": f"{number:04d}/{candidate:02d}.png", "candidate": candidate, "seed": config.seed}
        for number, caption in enumerate(captions)
        for candidate in range(config.candidates)
    ]
    save_rows(out, rows)
    caption_grid(out, rows)
    counts = {"captions": len(captions), "candidates": config.candidates}
    files = ["samples.jsonl", *(str(row["file"]) for row in rows)]
    write_manifest(out, "samples", settings, counts, files, made_from)
    print(f"{len(rows)} pictures of {len(captions)} captions in {out}; overview in {out / 'grid.png'}")


COMMAND = Command("sample", SampleConfig, Path(__file__).parent / "configs" / "sample", sample, __doc__)

if __name__ == "__main__":
    sys.exit(run_command(COMMAND, sys.argv[1:]))
