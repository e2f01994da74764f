"""Held-out losses of the transformer: with each image's own caption, and with another's."""

from collections.abc import Iterator
from dataclasses import replace

import torch

from cluster.process import sum_over_ranks
from data_pipeline.bpe import Vocabulary
from data_pipeline.loader import PAD, Shards, TokenBatch, tokens_batch
from pretrain.engine import Engine

MAX_SAMPLES = 2_048


class HeldOut:
    """The first held-out token samples, encoded without dropout, kept in memory."""

    def __init__(self, shards: Shards, vocabulary: Vocabulary, n_text: int) -> None:
        samples = [sample for sample, _ in zip(shards, range(MAX_SAMPLES), strict=False)]
        self.all = tokens_batch(samples, vocabulary, n_text, 0.0, 0, range(len(samples)))

    def __len__(self) -> int:
        return len(self.all.text)

    def with_other_captions(self) -> TokenBatch:
        """Every image with the caption of the sample half the set away: never its own."""
        return replace(self.all, text=self.all.text.roll(max(1, len(self) // 2), 0))


@torch.no_grad()
def evaluate(engine: Engine, heldout: HeldOut) -> dict[str, float]:
    """Nats per token over the held-out samples, the same on every rank.

    val/image_loss with true captions, val/image_loss_shuffled with other samples' captions (the gap
    is what the model takes from the text), and val/text_loss.
    """
    engine.evaluating()
    text_sum = image_sum = shuffled_sum = n_text = n_image = 0.0
    pairs = zip(_parts(engine, heldout.all), _parts(engine, heldout.with_other_captions()), strict=True)
    for (true, counts), (other, _) in pairs:  # ZeRO-3 gathers weights in forward: all ranks do as many
        tokens = (true.text != PAD).sum().item()
        losses = engine.losses(true)
        shuffled_sum += counts * engine.losses(other).image.item()
        image_sum += counts * losses.image.item()
        text_sum += (tokens * losses.text.item()) if counts else 0.0
        n_image, n_text = n_image + counts, n_text + (tokens if counts else 0)
    names = ("text", "image", "shuffled", "n_text", "n_image")
    total = sum_over_ranks(engine.place, dict(zip(names, (text_sum, image_sum, shuffled_sum, n_text, n_image), strict=True)))
    return {
        "val/image_loss": total["image"] / total["n_image"],
        "val/image_loss_shuffled": total["shuffled"] / total["n_image"],
        "val/text_loss": total["text"] / max(total["n_text"], 1),
    }


def _parts(engine: Engine, batch: TokenBatch) -> Iterator[tuple[TokenBatch, int]]:
    """This rank's share in equal steps on every rank; a rank with nothing left gets sample 0, counted 0."""
    local = max(1, engine.config.data.batch // engine.place.world_size)
    step = local * engine.place.world_size
    for first in range(0, len(batch.text), step):
        at = first + engine.place.rank * local
        chosen = slice(at, at + local) if at < len(batch.text) else slice(0, 1)
        part = TokenBatch(batch.text[chosen], batch.image[chosen], batch.keys[chosen])
        yield part, len(part.text) if at < len(batch.text) else 0
