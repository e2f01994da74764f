"""Draw pictures for captions: a trained run -> PNGs that carry how they were made.

    smalti sample captions=captions.txt candidates=16 out=samples

Writes OUT/0000/00.png ... (a folder a caption), OUT/samples.jsonl, OUT/grid.png. Each PNG holds its
caption, candidate, settings and the fingerprints of the weights, which decide it whatever else is
drawn. Killed and run again, it keeps the pictures that are there. Under `torchrun` or `deepspeed`, the
processes share the work; so do tasks (tasks=8 task=0, ...), after which the same words without both
draw what is missing and write the overview. Drawing 16 candidates of 24 captions at 64 px takes some seconds.
"""

import io
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from PIL.PngImagePlugin import PngImageFile, PngInfo
from torch import Tensor

from cluster.command import Command, run_command
from cluster.manifest import (
    FolderError,
    Manifest,
    file_digest,
    is_done,
    read_manifest,
    refuse_other_origin,
    write_bytes,
    write_manifest,
)
from cluster.metrics import Progress
from cluster.process import Place, computes_bf16, joined_place, share_cores, wait_for_all
from cluster.settings import SettingError, from_dict, to_dict
from cluster.weights import load_weights
from data_pipeline.bpe import Vocabulary, open_vocabulary
from data_pipeline.loader import pad_text
from dvae.likelihood import most_likely_pixels
from dvae.model import Dvae
from dvae.train import open_dvae
from pretrain.config import SampleConfig, TransformerConfig
from pretrain.draw import Taste, draw_rows, noise_keys
from pretrain.model import Sizes, Transformer
from pretrain.pictures import caption_grid, save_preview, save_rows
from pretrain.prime import read_prime

# paths, and what changes no picture
FREE = ("captions", "model", "dvae", "vocab", "out", "batch", "prime", "preview", "tasks", "task")


def open_transformer(folder: Path, device: torch.device, dtype: torch.dtype) -> tuple[Transformer, Manifest]:
    """The trained transformer of a finished run folder, ready to draw, and its manifest."""
    manifest = read_manifest(folder, "transformer")
    config = json.loads((folder / "config.json").read_text())
    sizes = Sizes(config["text_vocab"], config["codebook"], config["grid"])
    model = Transformer(from_dict(TransformerConfig, manifest.settings["model"]), sizes)
    load_weights(folder, model)
    return model.eval().to(device, dtype).pack(), manifest


def sample(config: SampleConfig, place: Place) -> None:
    """Run the stage; see the module's text."""
    captions = read_captions(config.captions)
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    model, about = open_transformer(Path(config.model), place.device, dtype)
    dvae, dvae_about = open_dvae(Path(config.dvae), place.device)
    vocabulary, vocab = open_vocabulary(Path(config.vocab))
    refuse_other_origin(Path(config.model), about, "dvae", Path(config.dvae), dvae_about.fingerprint)
    refuse_other_origin(Path(config.model), about, "vocab", Path(config.vocab), vocab)
    if config.cfg_scale != 1 and not about.settings.get("caption_dropout"):
        raise SettingError(
            f"cfg_scale={config.cfg_scale} needs a model trained with caption_dropout; {config.model} had 0"
        )
    made_from = {"model": about.fingerprint, "dvae": dvae_about.fingerprint, "vocab": vocab}
    prime = read_prime(Path(config.prime), config.prime_rows, dvae) if config.prime else None
    if prime is not None:
        made_from["prime"] = file_digest(Path(config.prime))
    settings = {key: value for key, value in to_dict(config).items() if key not in FREE}
    out = Path(config.out)
    if is_done(out, "samples", settings | {"captions": captions}, made_from):
        if place.is_main:
            print(f"{out} is finished already")
        return
    artist = Artist(config, model, dvae, encode_captions(captions, vocabulary, model.config.n_text), prime)
    pictures = [
        Picture(out, n, c, text, settings, made_from)
        for n, text in enumerate(captions)
        for c in range(config.candidates)
    ]
    todo = share_of_task(pictures, config)
    batches = list(in_batches([picture for picture in todo if not picture.is_drawn()], config.batch))
    wait_for_all(place)  # all must have looked before the first draws, or they would not share the same work
    progress = Progress("sample", len(todo), unit="picture") if place.is_main else None
    if progress:
        progress.advance(len(todo) - sum(map(len, batches)))
    for number, batch in enumerate(batches):
        if number % place.world_size == place.rank:
            artist.draw(batch, out / "preview.png" if config.preview and place.is_main else None)
        if progress:
            progress.advance(len(batch))
    wait_for_all(place)
    if progress:
        progress.close()
        if not config.tasks:
            _finish(out, captions, config, settings | {"captions": captions}, made_from)


@dataclass(frozen=True)
class Picture:
    """One candidate of one caption, its file, and all that decides how it looks."""

    out: Path
    number: int
    candidate: int
    caption: str
    settings: dict[str, Any]
    made_from: dict[str, str]

    @property
    def path(self) -> Path:
        return self.out / f"{self.number:04d}" / f"{self.candidate:02d}.png"

    @property
    def origin(self) -> dict[str, str]:
        """What its PNG says of it."""
        words = {"settings": self.settings, "made_from": self.made_from}
        own = {"caption": self.caption, "candidate": str(self.candidate)}
        return own | {key: json.dumps(value) for key, value in words.items()}

    def is_drawn(self) -> bool:
        """True if its file is there, whole, and was drawn in this way."""
        try:
            with Image.open(self.path) as image:
                return isinstance(image, PngImageFile) and image.text == self.origin
        except OSError:
            return False

    def save(self, pixels: np.ndarray) -> None:
        """Write (P, P, 3) uint8 with its origin in the PNG's text chunks; the file appears whole or not at all."""
        text = PngInfo()
        for key, value in self.origin.items():
            text.add_text(key, value)
        data = io.BytesIO()
        Image.fromarray(pixels).save(data, "png", pnginfo=text)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(self.path, data.getvalue())


def in_batches(pictures: list[Picture], size: int) -> Iterator[list[Picture]]:
    """At most `size` at a time: candidates of one caption, or equally many of each of some captions."""
    batch: list[Picture] = []
    length = 0
    for _, group in groupby(pictures, key=lambda picture: picture.number):
        of_caption = list(group)
        for first in range(0, len(of_caption), size):
            piece = of_caption[first : first + size]
            if batch and (len(piece) != length or len(batch) + len(piece) > size):
                yield batch
                batch = []
            batch, length = batch + piece, len(piece)
    if batch:
        yield batch


def share_of_task(pictures: list[Picture], config: SampleConfig) -> list[Picture]:
    """Those that this task draws: whole batches, and the same ones whatever the others have drawn already."""
    if not config.tasks:
        return pictures
    batches = list(in_batches(pictures, config.batch))
    return [picture for batch in batches[config.task :: config.tasks] for picture in batch]


class Artist:
    """The models of one run of `smalti sample`."""

    def __init__(
        self, config: SampleConfig, model: Transformer, dvae: Dvae, text: Tensor, prime: Tensor | None
    ) -> None:
        """text (captions, T-1) ids; prime (I,) codes as of read_prime."""
        self.seed, self.model, self.dvae, self.text, self.prime = config.seed, model, dvae, text, prime
        self.taste = Taste(config.temperature, config.top_k, config.top_p, config.cfg_scale)

    def draw(self, batch: list[Picture], preview: Path | None) -> None:
        """Draw and save a batch of `in_batches`; with `preview`, show it there after each row."""
        device = self.model.row.weight.device
        numbers = list(dict.fromkeys(picture.number for picture in batch))
        n_image = self.model.layout.n_image
        keys = torch.stack([noise_keys(p.caption, self.seed, p.candidate, n_image) for p in batch]).to(device)
        known = None if self.prime is None else self.prime.expand(len(numbers), -1).to(device)
        rows = draw_rows(self.model, self.text[numbers].to(device), keys, self.taste, known)
        for codes in rows:
            if preview or codes.shape[1] == n_image:
                pixels = decode_codes(self.dvae, F.pad(codes, (0, n_image - codes.shape[1])))
            if preview:
                save_preview(preview, pixels, codes.shape[1] / n_image)
        for picture, drawn in zip(batch, pixels, strict=True):
            picture.save(drawn)


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


def run_sample(config: SampleConfig) -> None:
    """Join the job and draw."""
    with joined_place() as place:
        share_cores(place)
        if config.precision == "auto":  # the pictures' record names what was used
            halved = place.device.type == "cuda" and computes_bf16(place)
            config = replace(config, precision="bf16" if halved else "fp32")
        sample(config, place)


COMMAND = Command("sample", SampleConfig, Path(__file__).parent / "configs" / "sample", run_sample, __doc__)

if __name__ == "__main__":
    sys.exit(run_command(COMMAND, sys.argv[1:]))
