"""Batches: a pure function of the step, alike for any number of ranks, from shards that are whole."""

import io
import shutil
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cluster.manifest import FolderError, write_manifest
from cluster.settings import SettingError
from data_pipeline.augment import dvae_crop
from data_pipeline.bpe import open_vocabulary
from data_pipeline.contents import image_of
from data_pipeline.loader import (
    PAD,
    ImageBatches,
    LoaderConfig,
    Shards,
    TokenBatch,
    TokenBatches,
    caption_of,
    first_pictures,
    pad_text,
    picture_of,
)
from data_pipeline.order import AUGMENT, counter_random
from data_pipeline.shards import Sample, ShardError, write_shard
from tests.pairs import caption, encoded

CONFIG = LoaderConfig(batch=6, seed=5, shuffle_window=2)


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """28 samples in 4 shards; sample n has 3 crops of 2 x 2 codes, 100 n + crop everywhere."""
    folder = tmp_path_factory.mktemp("tokens")
    names = []
    for shard in range(4):
        samples = []
        for n in range(7 * shard, 7 * shard + 7):
            out = io.BytesIO()
            np.save(out, np.stack([np.full((2, 2), 100 * n + crop, np.uint16) for crop in range(3)]))
            samples.append(Sample(f"{n:04d}", {"npy": out.getvalue(), "txt": caption(n).encode()}))
        names.append(f"train-{shard:06d}.tar")
        write_shard(folder / names[-1], samples)
    write_manifest(folder, "tokens", {}, {"train": 28}, names, {})
    return folder


@dataclass
class Maker:
    tokens: Path
    data: Path

    def batches(
        self, rank: int = 0, world_size: int = 1, dropout: float = 0.3, seed: int = 5, empty: float = 0.0
    ) -> TokenBatches:
        vocabulary, _ = open_vocabulary(self.data / "vocab")
        shards, config = Shards(self.tokens, "tokens", "train"), LoaderConfig(6, seed, 2)
        return TokenBatches(shards, config, vocabulary, 40, dropout, empty, rank, world_size)


@pytest.fixture
def maker(tokens: Path, data: Path) -> Maker:
    return Maker(tokens, data)


def assert_same(one: TokenBatch, two: TokenBatch) -> None:
    assert one.keys == two.keys
    assert torch.equal(one.text, two.text) and torch.equal(one.image, two.image)


def test_a_seek_gives_what_iteration_from_the_start_gives(maker: Maker) -> None:
    """A run that resumes at step k sees the batches that it would have seen."""
    straight = maker.batches()
    passed = [next(straight) for _ in range(12)]
    resumed = maker.batches()
    for step in (9, 3, 0):
        resumed.seek(step)
        for expected in passed[step : step + 3]:
            assert_same(next(resumed), expected)
    assert resumed.step == 3


@pytest.mark.parametrize("empty", [0.0, 0.5])
@pytest.mark.parametrize("ranks", [2, 3, 6])
def test_batches_of_all_ranks_make_the_batch_of_one(maker: Maker, ranks: int, empty: float) -> None:
    one = maker.batches(empty=empty)
    parts = [maker.batches(rank, ranks, empty=empty) for rank in range(ranks)]
    for _ in range(6):
        whole, shares = next(one), [next(part) for part in parts]
        assert_same(
            TokenBatch(
                torch.cat([share.text for share in shares]),
                torch.cat([share.image for share in shares]),
                [key for share in shares for key in share.keys],
            ),
            whole,
        )


def test_an_epoch_holds_every_sample_once_though_steps_cross_its_edge(maker: Maker) -> None:
    batches = maker.batches()
    keys = [key for _ in range(14) for key in next(batches).keys]  # 84 = 3 epochs of 28
    for first in range(0, 84, 28):
        assert sorted(keys[first : first + 28]) == [f"{n:04d}" for n in range(28)]


def test_codes_and_text_are_those_of_the_sample_and_drawn_anew_at_each_visit(maker: Maker) -> None:
    vocabulary, _ = open_vocabulary(maker.data / "vocab")
    batches = maker.batches()
    crops: dict[str, set[int]] = {}
    texts: dict[str, set[tuple[int, ...]]] = {}
    for _ in range(28):
        batch = next(batches)
        assert batch.text.shape == (6, 39) and batch.image.shape == (6, 4)
        assert batch.text.dtype == batch.image.dtype == torch.int64
        for key, text, image in zip(batch.keys, batch.text.tolist(), batch.image.tolist(), strict=True):
            assert len(set(image)) == 1 and image[0] // 100 == int(key)
            crops.setdefault(key, set()).add(image[0] % 100)
            ids = [i for i in text if i != PAD]
            assert text[: len(ids)] == ids
            assert vocabulary.decode(ids) == caption(int(key))
            texts.setdefault(key, set()).add(tuple(ids))
    assert Counter(crop for seen in crops.values() for crop in seen).keys() == {0, 1, 2}
    assert sum(len(seen) for seen in texts.values()) > 3 * len(texts)


def test_another_seed_changes_order_and_draws(maker: Maker) -> None:
    assert next(maker.batches(seed=5)).keys != next(maker.batches(seed=6)).keys


def test_without_dropout_the_text_is_the_plain_encoding(maker: Maker) -> None:
    vocabulary, _ = open_vocabulary(maker.data / "vocab")
    batch = next(maker.batches(dropout=0.0))
    for key, text in zip(batch.keys, batch.text.tolist(), strict=True):
        assert [i for i in text if i != PAD] == vocabulary.encode(caption(int(key)))


def test_caption_dropout_empties_whole_captions_and_touches_nothing_else(maker: Maker) -> None:
    plain, dropped, again = maker.batches(), maker.batches(empty=0.3), maker.batches(empty=0.3)
    positions, emptied = 0, 0
    for step in range(100):
        full, some = plain.read(step), dropped.read(step)
        gone = (some.text == PAD).all(1)
        assert not (full.text == PAD).all(1).any()
        assert torch.equal(some.text[~gone], full.text[~gone])
        assert torch.equal(some.image, full.image) and some.keys == full.keys
        assert_same(again.read(step), some)
        positions, emptied = positions + len(gone), emptied + int(gone.sum())
    assert abs(emptied - 0.3 * positions) < 4 * (0.3 * 0.7 * positions) ** 0.5


def test_which_captions_are_emptied_depends_on_the_seed_and_on_each_visit(maker: Maker) -> None:
    def emptied(seed: int) -> list[tuple[str, bool]]:
        batches = maker.batches(seed=seed, empty=0.5)
        read = [batches.read(step) for step in range(14)]  # 3 epochs
        return [pair for b in read for pair in zip(b.keys, (b.text == PAD).all(1).tolist(), strict=True)]

    assert [gone for _, gone in emptied(5)] != [gone for _, gone in emptied(6)]
    kinds = Counter(emptied(5))
    both = [key for key, gone in kinds if not gone and (key, True) in kinds]
    assert len(both) > 14  # of 28 samples, three quarters are expected to be seen with and without


def test_a_smaller_share_empties_some_of_the_same_captions(maker: Maker) -> None:
    few, many = maker.batches(empty=0.2), maker.batches(empty=0.6)
    for step in range(20):
        gone, more = ((batches.read(step).text == PAD).all(1) for batches in (few, many))
        assert not (gone & ~more).any()


def test_long_texts_are_cut_and_short_ones_padded() -> None:
    assert pad_text([[1, 2, 3, 4, 5], [7], []], 4).tolist() == [[1, 2, 3], [7, PAD, PAD], [PAD, PAD, PAD]]


def test_pictures_come_with_their_captions_and_a_mirror_changes_no_order(data: Path) -> None:
    shards = Shards(data / "images", "images", "train")
    plain, flipped = ImageBatches(shards, CONFIG, 8, flip=False), ImageBatches(shards, CONFIG, 8, flip=True)
    one, two = next(plain), next(flipped)
    assert one.pixels.shape == (6, 3, 8, 8) and one.pixels.dtype == torch.float32
    assert one.keys == two.keys and one.captions == two.captions
    samples = {sample.key: sample for sample in shards}
    for key, text, pixels in zip(one.keys, one.captions, one.pixels, strict=True):
        expected = torch.from_numpy(picture_of(samples[key], 8).copy()).permute(2, 0, 1) / 255
        assert torch.equal(pixels, expected) and text == caption_of(samples[key])


def test_about_half_of_the_pictures_are_mirrored_left_to_right(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ramp = np.broadcast_to(np.arange(8, dtype=np.uint8)[None, :, None], (8, 8, 3))
    monkeypatch.setattr("data_pipeline.images._squared", lambda data, side: Image.fromarray(ramp))
    batches = ImageBatches(Shards(data / "images", "images", "train"), LoaderConfig(batch=64), 8, flip=True)
    pixels = (batches.read(0).pixels * 255).round().to(torch.uint8)
    plain = torch.from_numpy(ramp.copy()).permute(2, 0, 1)
    kinds = Counter("plain" if torch.equal(p, plain) else "mirrored" for p in pixels)
    assert all(torch.equal(p, plain) or torch.equal(p, plain.flip(-1)) for p in pixels)
    assert 16 < kinds["mirrored"] < 48


def test_random_crops_are_drawn_anew_at_each_visit_from_the_position_alone(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (21, 20, 30, 3), np.uint8)
    write_shard(
        tmp_path / "train-000000.tar",
        [
            Sample(f"{n}", {"png": encoded(Image.fromarray(picture), "png"), "txt": b"a"})
            for n, picture in enumerate(noise)
        ],
    )
    write_manifest(tmp_path, "images", {}, {"train": 21}, ["train-000000.tar"], {})
    shards = Shards(tmp_path, "images", "train")
    batches = [ImageBatches(shards, LoaderConfig(batch=21), 8, flip=False, crop=True) for _ in range(2)]
    samples = {sample.key: sample for sample in shards}
    first = {step: batches[0].read(step) for step in range(3)}
    by_key = [dict(zip(batch.keys, batch.pixels.clone(), strict=True)) for batch in first.values()]
    assert not any(torch.equal(by_key[0][key], by_key[1][key]) for key in samples)
    for step in reversed(range(3)):
        again = batches[1].read(step)
        for row, (key, position) in enumerate(zip(again.keys, batches[1].positions(step), strict=True)):
            random = counter_random(0, AUGMENT, position)
            expected = dvae_crop(image_of(samples[key]), 8, random).transpose(2, 0, 1)
            assert torch.equal(again.pixels[row], torch.from_numpy(expected / np.float32(255)))
        assert again.keys == first[step].keys


def test_a_picture_too_small_for_a_random_crop_is_a_bad_sample(data: Path) -> None:
    shards = Shards(data / "images", "images", "train")
    assert ImageBatches(shards, LoaderConfig(batch=4), 17, flip=False).read(0).pixels.shape == (4, 3, 17, 17)
    with pytest.raises(ShardError, match="20 x 16 pixels, less than the crop's 17"):
        ImageBatches(shards, LoaderConfig(batch=4), 17, flip=False, crop=True).read(0)


def test_first_pictures_are_the_first_of_the_files(data: Path) -> None:
    shards = Shards(data / "images", "images", "train")
    assert first_pictures(shards, 3, 8).shape == (3, 3, 8, 8)
    assert len(first_pictures(shards, 10_000, 8)) == len(shards) == sum(shards.sizes)


def test_splits_share_no_sample(data: Path) -> None:
    train, heldout = ({sample.key for sample in Shards(data / "images", "images", s)} for s in ("train", "heldout"))
    assert train and heldout and not train & heldout
    assert len(train) + len(heldout) == 29


def test_folders_that_do_not_fit_are_refused(data: Path, tokens: Path, tmp_path: Path) -> None:
    with pytest.raises(FolderError, match="holds images, not tokens"):
        Shards(data / "images", "tokens", "train")
    with pytest.raises(FolderError, match="no heldout shards"):
        Shards(tokens, "tokens", "heldout")
    copy = tmp_path / "copy"
    shutil.copytree(tokens, copy)
    (copy / "train-000002.tar").write_bytes((copy / "train-000002.tar").read_bytes()[:-512])
    with pytest.raises(FolderError, match=r"train-000002\.tar.*cut or changed"):
        Shards(copy, "tokens", "train")


def test_a_batch_that_ranks_cannot_share_is_refused(maker: Maker) -> None:
    with pytest.raises(SettingError, match=r"data\.batch=6 .* 4 processes"):
        maker.batches(0, 4)
    with pytest.raises(SettingError, match=r"data\.batch=0"):
        LoaderConfig(batch=0)


def test_a_sample_without_picture_is_named(maker: Maker) -> None:
    with pytest.raises(ShardError, match="0000 has no picture, only npy, txt"):
        picture_of(Shards(maker.tokens, "tokens", "train").read((0, 0)), 8)
