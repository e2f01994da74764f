"""Train the contrastive scorer: image shards -> a run folder that `smalti rerank` reads.

    smalti scorer emoji images=data/images vocab=data/vocab out=runs/scorer

A small two-tower model under CLIP's loss (Radford et al. 2021, arXiv 2103.00020, section 2.3): a
convolutional picture tower, a causal text transformer read at its last token, linear projections,
a learned temperature. `emoji` takes about 2 minutes on 2 CPU cores.
"""

import itertools
import math
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cluster.command import Command, run_command
from cluster.manifest import Manifest, read_manifest
from cluster.process import Place, lone_place
from cluster.run import Run, due
from cluster.settings import from_dict
from cluster.weights import WEIGHTS, load_state, load_weights, save_state, save_weights
from data_pipeline.bpe import Vocabulary, open_vocabulary
from data_pipeline.contents import caption_of, picture_of
from data_pipeline.folders import Shards, open_folders
from data_pipeline.loader import PAD, ImageBatch, ImageBatches, pad_text, to_pixels
from data_pipeline.order import AUGMENT, DROPOUT, SAMPLE, counter_random
from kernels.attention import attention
from kernels.layout import Layout, Sparsity
from pretrain.config import ScorerConfig, ScorerTrainConfig, TransformerConfig
from pretrain.model import Layer, Norm
from pretrain.optim import decay_groups
from pretrain.schedule import cosine

FIRST_TEMPERATURE = 0.07  # CLIP section 2.5: logits start at cosine / 0.07
MAX_SCALE = 100.0  # and are never scaled by more than 100
RECALL_POOL, RECALL_BEST, RECALL_DRAWS = 64, 5, 50


class PictureTower(nn.Module):
    """(B, 3, P, P) pixels in [0, 1] -> (B, E): folded pixels, three stages of convs, mean over places."""

    def __init__(self, config: ScorerConfig) -> None:
        super().__init__()
        widths = [config.width, 2 * config.width, 2 * config.width]
        n_in = 3 * config.fold**2
        self.fold = config.fold
        self.stages = nn.ModuleList()
        for n_out in widths:
            self.stages.append(nn.Sequential(
                nn.Conv2d(n_in, n_out, 3, padding=1), nn.GroupNorm(8, n_out), nn.GELU(),
                nn.Conv2d(n_out, n_out, 3, padding=1), nn.GroupNorm(8, n_out), nn.GELU(),
            ))  # fmt: skip
            n_in = n_out
        self.project = nn.Linear(n_in, config.embed, bias=False)

    def forward(self, pixels: Tensor) -> Tensor:
        x = F.pixel_unshuffle(pixels - 0.5, self.fold)
        for number, stage in enumerate(self.stages):
            x = stage(F.max_pool2d(x, 2) if number else x)
        return self.project(x.mean((2, 3)))


class TextTower(nn.Module):
    """(B, T-1) ids with PAD -> (B, E): a causal transformer read at the last token."""

    def __init__(self, config: ScorerConfig, text_vocab: int) -> None:
        super().__init__()
        shape = TransformerConfig(n_text=config.n_text, n_layers=config.n_layers, n_heads=config.n_heads, d_head=32)
        self.token = nn.Embedding(text_vocab, shape.d_model)
        self.position = nn.Embedding(config.n_text, shape.d_model)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(config.n_layers))
        self.norm = Norm(shape.d_model)
        self.project = nn.Linear(shape.d_model, config.embed, bias=False)
        self.attend = partial(attention, sparsity=Sparsity("dense", Layout(config.n_text - 1, 0, 0)))
        for module in (self.token, self.position):
            nn.init.normal_(module.weight, std=0.02)

    def forward(self, text: Tensor) -> Tensor:
        x = self.token(text.clamp(min=0)) + self.position.weight[: text.shape[1]]
        branch = None
        for layer in self.layers:
            x, branch = layer(x, branch, self.attend)
        last = (text != PAD).sum(1).clamp(min=1) - 1
        return self.project(self.norm(x, branch)[1][torch.arange(len(x)), last])


class Scorer(nn.Module):
    """Both towers and the temperature."""

    def __init__(self, config: ScorerConfig, text_vocab: int) -> None:
        super().__init__()
        self.config = config
        self.picture = PictureTower(config)
        self.text = TextTower(config, text_vocab)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / FIRST_TEMPERATURE)))

    def embed(self, pixels: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Unit vectors (B, E) of the pictures and (B', E) of the texts."""
        return F.normalize(self.picture(pixels), dim=-1), F.normalize(self.text(text), dim=-1)

    def forward(self, pixels: Tensor, text: Tensor) -> Tensor:
        """CLIP's symmetric cross-entropy of a batch of pairs, in nats."""
        pictures, texts = self.embed(pixels, text)
        logits = self.log_scale.exp().clamp(max=MAX_SCALE) * pictures @ texts.T
        target = torch.arange(len(logits), device=logits.device)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


class Trainer:
    """Model, optimiser and augmentation of one run."""

    def __init__(self, config: ScorerTrainConfig, vocabulary: Vocabulary, place: Place) -> None:
        self.config, self.vocabulary, self.place = config, vocabulary, place
        torch.manual_seed(config.seed)
        self.model = Scorer(config.model, vocabulary.size).to(place.device)
        self.optimizer = torch.optim.AdamW(
            decay_groups(self.model, config.optim.weight_decay),
            betas=(config.optim.beta1, config.optim.beta2),
            eps=config.optim.eps,
        )

    def step(self, number: int, batch: ImageBatch) -> dict[str, float]:
        lr = cosine(self.config.optim, number, self.config.n_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        random = counter_random(self.config.seed, DROPOUT, number)
        dropout = self.config.bpe_dropout
        ids = [self.vocabulary.encode_with_dropout(c, dropout, random) for c in batch.captions]
        pixels = shifted(batch.pixels, self.config.shift, counter_random(self.config.seed, AUGMENT, number).integers)
        loss = self.model(pixels.to(self.place.device), pad_text(ids, self.config.model.n_text).to(self.place.device))
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optim.clip)
        self.optimizer.step()
        return {"train/loss": loss.item(), "train/lr": lr, "train/grad_norm": norm.item()}

    def save(self, folder: Path, tag: str) -> None:
        save_state(folder / tag, self.model, self.optimizer)

    def load(self, folder: Path, tag: str) -> None:
        load_state(folder / tag, self.model, self.optimizer, self.place.device)


class HeldOut:
    """Held-out pictures and captions, in memory."""

    def __init__(self, shards: Shards, vocabulary: Vocabulary, config: ScorerConfig, limit: int = 2_048) -> None:
        samples = list(itertools.islice(shards, limit))
        self.pixels = to_pixels(np.stack([picture_of(sample, config.image_side) for sample in samples]))
        self.text = pad_text([vocabulary.encode(caption_of(sample)) for sample in samples], config.n_text)


@torch.no_grad()
def evaluate(model: Scorer, heldout: HeldOut, device: torch.device) -> dict[str, float]:
    """val/top5_of_64: the share of captions whose own picture is among the best 5 of 64, averaged over
    50 fixed draws of 64 held-out pairs (over all pairs, if there are fewer)."""
    pictures, texts = model.embed(heldout.pixels.to(device), heldout.text.to(device))
    similarity = (texts @ pictures.T).cpu()
    hits = []
    for draw in range(RECALL_DRAWS):
        chosen = counter_random(draw, SAMPLE).permutation(len(similarity))[:RECALL_POOL]
        pool = similarity[chosen][:, chosen]
        rank = (pool > pool.diag()[:, None]).sum(1)
        hits.append((rank < RECALL_BEST).double().mean().item())
    return {"val/top5_of_64": sum(hits) / len(hits)}


def shifted(pixels: Tensor, limit: int, random: Callable[..., np.ndarray]) -> Tensor:
    """Each picture moved by up to `limit` pixels either way, the border repeated."""
    if not limit:
        return pixels
    side = pixels.shape[-1]
    padded = F.pad(pixels, (limit,) * 4, mode="replicate")
    offsets = random(0, 2 * limit + 1, size=(len(pixels), 2)).tolist()
    return torch.stack([p[:, y : y + side, x : x + side] for p, (y, x) in zip(padded, offsets, strict=True)])


def train(config: ScorerTrainConfig) -> None:
    """Run the stage; see the module's text."""
    place = lone_place()
    folders = open_folders(config.images, "images", config.cache)
    shards = Shards(folders, "images", "train")
    vocabulary, vocab = open_vocabulary(Path(config.vocab))
    run = Run(config, "scorer", ("images", "vocab"), {"images": shards.manifest.fingerprint, "vocab": vocab}, place)
    if run.is_finished:
        run.say("finished already")
        return
    heldout = HeldOut(Shards(folders, "images", "heldout"), vocabulary, config.model)
    trainer = Trainer(config, vocabulary, place)
    batches = ImageBatches(shards, config.data, config.model.image_side, flip=False)
    first = run.begin(trainer.load, batches.about_order)
    batches.seek(first)
    for step in range(first, config.n_steps):
        batch = next(batches)
        run.record(step, trainer.step(step, batch))
        run.record_samples(step, batch.seen)
        stop = run.told_to_stop()
        if due(step, config.evaluate_every, config.n_steps):
            run.record_evaluation(step, evaluate(trainer.model, heldout, place.device))
        if stop or due(step, config.save_every, config.n_steps):
            run.save(step + 1, trainer.save)
        if stop and step + 1 < config.n_steps:
            run.stopped(step + 1)
    save_weights(run.folder, trainer.model.state_dict())
    counts = {"steps": config.n_steps} | evaluate(trainer.model, heldout, place.device)
    about = {"model_type": "smalti-scorer", "text_vocab": vocabulary.size, **asdict(config.model)}
    run.finish(counts, about, [WEIGHTS])
    run.close()


def open_scorer(folder: Path, vocabulary: Vocabulary, device: torch.device) -> tuple[Scorer, Manifest]:
    """The trained scorer of a finished run folder, in eval mode, and its manifest."""
    manifest = read_manifest(folder, "scorer")
    model = Scorer(from_dict(ScorerConfig, manifest.settings["model"]), vocabulary.size)
    load_weights(folder, model)
    return model.eval().to(device), manifest


COMMAND = Command("scorer", ScorerTrainConfig, Path(__file__).parent / "configs" / "scorer", train, __doc__)

if __name__ == "__main__":
    sys.exit(run_command(COMMAND, sys.argv[1:]))
