"""Held-out losses of the transformer: with each image's own caption, and with another's."""

from collections.abc import Iterator
from dataclasses import replace

from cluster.process import sum_over_ranks
from data_pipeline.bpe import Vocabulary
from data_pipeline.loader import Shards, TokenBatch, tokens_batch, words_in
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


def evaluate(engine: Engine, heldout: HeldOut) -> dict[str, float]:
    """Nats per token over the held-out samples, the same on every rank.

    val/image_loss with true captions, val/image_loss_shuffled with other samples' captions (the gap
    is what the model takes from the text), and val/text_loss.
    """
    sums = dict.fromkeys(("text", "image", "shuffled", "words", "pictures"), 0.0)
    other = heldout.with_other_captions()
    with engine.evaluating():
        for chosen, counted in _shares(engine, len(heldout)):
            true = _part(heldout.all, chosen)
            losses, shuffled = engine.losses(true, words_in(true)), engine.losses(_part(other, chosen), 1.0)
            pictures, words = len(true.text) * counted, words_in(true) * counted
            sums["pictures"] += pictures
            sums["words"] += words
            sums["image"] += pictures * losses.image.item()
            sums["shuffled"] += pictures * shuffled.image.item()
            sums["text"] += words * losses.text.item()
    total = sum_over_ranks(engine.place, sums)
    return {
        "val/image_loss": total["image"] / total["pictures"],
        "val/image_loss_shuffled": total["shuffled"] / total["pictures"],
        "val/text_loss": total["text"] / max(total["words"], 1),
    }


def _shares(engine: Engine, count: int) -> Iterator[tuple[slice, bool]]:
    """This rank's slices of `count` samples, and whether they count.

    Every rank gets as many slices (ZeRO-3 gathers weights in each forward pass, so all must take
    part); a rank with nothing left runs sample 0 and does not count it.
    """
    place = engine.place
    local = max(1, engine.config.data.batch // (place.world_size * engine.config.accumulate))
    for first in range(0, count, local * place.world_size):
        at = first + place.rank * local
        yield (slice(at, at + local), True) if at < count else (slice(0, 1), False)


def _part(batch: TokenBatch, chosen: slice) -> TokenBatch:
    return TokenBatch(batch.text[chosen], batch.image[chosen], batch.keys[chosen])
