"""One order for every layout: ranks, readers and resume points change no sample, no draw and no replacement."""

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from cluster.ledger import NAME, Bad, Ledger, whole_digest
from data_pipeline.bpe import open_vocabulary
from data_pipeline.folders import JOINT, Shards, open_folders
from data_pipeline.loader import LoaderConfig, TokenBatch, TokenBatches
from data_pipeline.remote import CacheConfig
from tests.data_pipeline.token_folders import npy, overwrite, write_tokens

BATCH = 24
STEPS = 9  # 216 positions: four epochs and a half of 48 samples
LAYOUTS = [(ranks, readers) for ranks in (1, 2, 3, 4, 8) for readers in (1, 3)]
SIZES = ([7, 1, 12, 5, 9], [6, 8])
MIXED = (3.0, 1.0)


@dataclass
class Data:
    """Two folders of token shards, 48 samples in 7 shards."""

    folders: list[Path]
    vocab: Path

    def batches(
        self, rank: int = 0, ranks: int = 1, readers: int = 1, weights: tuple[float, ...] = MIXED, batch: int = BATCH
    ) -> TokenBatches:
        shards = Shards(open_folders(JOINT.join(map(str, self.folders)), "tokens", CacheConfig()), "tokens", "train")
        config = LoaderConfig(batch, 11, 2, weights, readers=readers)
        return TokenBatches(shards, config, open_vocabulary(self.vocab)[0], 40, 0.3, 0.2, rank, ranks)

    def all_ranks(self, ranks: int, readers: int = 1, weights: tuple[float, ...] = MIXED) -> list[TokenBatches]:
        return [self.batches(rank, ranks, readers, weights) for rank in range(ranks)]

    def damage(self) -> None:
        """What may befall shards in the middle of a run: a tar lost, a tar cut, members garbled."""
        first, second = self.folders
        overwrite(first / "train-000002.tar", 4, "npy", b"not an array")
        overwrite(first / "train-000002.tar", 5, "npy", npy(np.full((3, 2, 2), 600, np.uint16)))
        overwrite(first / "train-000003.tar", 1, "txt", b"\xff\xfe")
        os.truncate(first / "train-000004.tar", (first / "train-000004.tar").stat().st_size // 2)
        (second / "train-000000.tar").unlink()


@pytest.fixture
def two(tmp_path: Path, data: Path) -> Data:
    folders = [write_tokens(tmp_path / name, sizes, at) for name, sizes, at in zip("ab", SIZES, (0, 100), strict=True)]
    return Data(folders, data / "vocab")


@dataclass
class Step:
    """What all ranks of a layout read for one step."""

    batch: TokenBatch
    digest: int
    replaced: int
    bad: list[Bad]

    def same_as(self, other: "Step") -> bool:
        one, two = self.batch, other.batch
        tensors = torch.equal(one.text, two.text) and torch.equal(one.image, two.image)
        return tensors and one.keys == two.keys and (self.digest, self.bad) == (other.digest, other.bad)


def read_together(ranks: list[TokenBatches], first: int = 0) -> Iterator[Step]:
    """The ranks' batches from step `first` to the end, put together as the trainer does."""
    for batches in ranks:
        batches.seek(first)
    for _ in range(first, STEPS):
        parts = [next(batches) for batches in ranks]
        sums = Counter[str]()
        for part in parts:
            sums.update(part.seen.sums)
        batch = TokenBatch(
            torch.cat([part.text for part in parts]),
            torch.cat([part.image for part in parts]),
            [key for part in parts for key in part.keys],
        )
        bad = [bad for part in parts for bad in part.seen.bad]
        yield Step(batch, whole_digest(dict(sums)), int(sums["ledger/replaced"]), bad)


@pytest.mark.parametrize("weights", [(), MIXED])
def test_samples_and_draws_are_those_of_one_rank_on_any_layout_from_any_step(
    two: Data, weights: tuple[float, ...]
) -> None:
    """Codes show the crop that was drawn, text the merges and captions that were dropped."""
    straight = list(read_together(two.all_ranks(1, 1, weights)))
    assert len({tuple(step.batch.keys) for step in straight}) == STEPS
    for ranks, readers in LAYOUTS:  # 8 ranks are more than there are shards
        layout = two.all_ranks(ranks, readers, weights)
        for first in (0, 1, 4, STEPS - 1):
            again = list(read_together(layout, first))
            assert all(one.same_as(other) for one, other in zip(straight[first:], again, strict=True))


def test_replacements_are_those_of_one_rank_on_any_layout_from_any_step(two: Data) -> None:
    opened = {layout: two.all_ranks(*layout) for layout in LAYOUTS}
    whole = list(read_together(two.all_ranks(1)))
    two.damage()
    straight = list(read_together(opened[1, 1]))
    for ranks in opened.values():
        for first in (0, 5):
            again = list(read_together(ranks, first))
            assert all(one.same_as(other) for one, other in zip(straight[first:], again, strict=True))
    bad = {(step, b.position) for step, found in enumerate(straight) for b in found.bad}
    assert sum(step.replaced for step in straight) == len(bad) > 30
    for step, (before, after) in enumerate(zip(whole, straight, strict=True)):
        for at, (key, other) in enumerate(zip(before.batch.keys, after.batch.keys, strict=True)):
            assert (key != other) == ((step, step * BATCH + at) in bad)  # no other position is touched
            if key == other:
                assert torch.equal(before.batch.text[at], after.batch.text[at])
                assert torch.equal(before.batch.image[at], after.batch.image[at])
        assert (before.digest == after.digest) == (not after.bad)


def test_bad_samples_are_named_with_file_key_and_reason(two: Data) -> None:
    batches = two.all_ranks(1)
    two.damage()
    found = {str(bad).replace(str(two.folders[0].parent), "") for step in read_together(batches) for bad in step.bad}
    assert {
        "/a/train-000002.tar, sample 0012: npy cannot be read (no array in the format of numpy)",
        "/a/train-000002.tar, sample 0013: npy holds codes outside of 0 to 511",
        "/a/train-000003.tar, sample 0021: has a caption that is not UTF-8 (invalid start byte)",
        "/a/train-000004.tar, sample 0033: npy is cut: the tar ends before it",
        "/b/train-000000.tar, sample 0100: No such file or directory",
    } <= found


def test_a_replacement_comes_from_the_source_of_the_bad_one(two: Data) -> None:
    batches = two.all_ranks(1)
    two.damage()
    of_second = [sum(key >= "0100" for key in step.batch.keys) for step in read_together(batches)]
    assert of_second == [BATCH // 4] * STEPS


def test_a_ledger_is_the_same_bytes_on_any_layout_and_after_a_kill_and_a_resume(two: Data, tmp_path: Path) -> None:
    opened = {layout: two.all_ranks(*layout) for layout in LAYOUTS}
    two.damage()

    def write(folder: Path, ranks: list[TokenBatches], first: int, last: int) -> None:
        ledger = Ledger(folder, first, ranks[0].about_order)
        for number, step in zip(range(first, last), read_together(ranks, first), strict=False):
            ledger.record(number, range(number * BATCH, number * BATCH + BATCH), step.digest, step.bad)
        ledger.close()

    write(tmp_path / "straight", opened[1, 1], 0, STEPS)
    expected = (tmp_path / "straight" / NAME).read_bytes()
    assert expected.count(b'"bad"') == STEPS
    for n, (layout, ranks) in enumerate(opened.items()):
        folder = tmp_path / f"{layout}"
        write(folder, ranks, 0, 3 + n % 4)
        (folder / NAME).write_bytes((folder / NAME).read_bytes()[: -n - 1])  # the kill cuts the last line
        write(folder, opened[LAYOUTS[n - 1]], 2, STEPS)
        assert (folder / NAME).read_bytes() == expected


def test_without_weights_folders_are_one_set_of_samples_each_once_an_epoch(two: Data) -> None:
    keys = [key for step in read_together(two.all_ranks(1, weights=())) for key in step.batch.keys]
    everything = sorted(sample.key for sample in two.batches().shards)
    assert len(everything) == 48
    for first in range(0, 192, 48):
        assert sorted(keys[first : first + 48]) == everything


def test_a_batch_of_any_size_continues_where_the_positions_say(two: Data) -> None:
    """Batch 24 from step 3 and batch 8 from step 9 stand at the same position."""
    large, small = two.batches(), two.batches(batch=8)
    assert large.read(3).keys == [key for step in (9, 10, 11) for key in small.read(step).keys]
