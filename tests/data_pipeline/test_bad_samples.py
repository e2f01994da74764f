"""Bad samples: every kind is survived, none hides a fault of the machine, and too many stop the run."""

import errno
import os
import re
from pathlib import Path

import pytest

from cluster.ledger import GRACE, Bad, refuse_too_many
from cluster.manifest import FolderError
from data_pipeline.bad_samples import usable_sample
from data_pipeline.contents import caption_of, picture_of
from data_pipeline.folders import Shards
from data_pipeline.loader import ImageBatches, LoaderConfig
from data_pipeline.order import Order
from data_pipeline.shards import Sample, ShardError
from tests.data_pipeline.token_folders import overwrite, write_tokens


@pytest.fixture
def shards(tmp_path: Path) -> Shards:
    return Shards(write_tokens(tmp_path / "tokens", [5, 7]), "tokens", "train")


def caption_at(sample: Sample, position: int) -> str:
    return caption_of(sample)


def test_a_position_whose_replacement_is_bad_too_goes_on_to_the_next(shards: Shards) -> None:
    order = Order(shards.sizes, 0, 2)
    chain = [order[4], order.replacement(4, 1), order.replacement(4, 2), order.replacement(4, 3)]
    assert chain[0] != chain[1] and chain[3] not in chain[:3]
    for shard, number in chain[:3]:
        overwrite(shards.shards[shard].path, number, "txt", b"\xff")
    bad: list[Bad] = []
    place, key, _ = usable_sample(shards, order, 4, caption_at, bad)
    assert place == chain[3] and key == shards.read(place).key
    assert [(b.position, b.shard, b.number) for b in bad] == [(4, *at) for at in chain[:3]]


def test_it_ends_when_nothing_is_good(shards: Shards) -> None:
    for shard in shards.shards:
        shard.path.unlink()
    with pytest.raises(ShardError, match=r"64 samples in a row were bad; the last: .*train-.*No such file"):
        usable_sample(shards, Order(shards.sizes, 0, 2), 0, caption_at, [])


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENOSPC, errno.ENOMEM])
def test_a_fault_of_the_machine_is_not_a_bad_sample(
    shards: Shards, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def fail(fd: int, n: int, at: int) -> bytes:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("data_pipeline.open_files.os.pread", fail)
    with pytest.raises(OSError, match=re.escape(os.strerror(number))):
        usable_sample(shards, Order(shards.sizes, 0, 2), 0, caption_at, [])


def test_a_mistake_of_the_program_is_not_a_bad_sample(shards: Shards) -> None:
    def make(sample: Sample, position: int) -> str:
        raise IndexError("wrong")

    with pytest.raises(IndexError, match="wrong"):
        usable_sample(shards, Order(shards.sizes, 0, 2), 0, make, [])


def test_a_picture_that_cannot_be_decoded_is_replaced_and_named_alike_everywhere(data: Path, tmp_path: Path) -> None:
    """The decoder's own words hold an address in memory; a ledger must not."""
    copy = tmp_path / "images"
    copy.mkdir()
    for file in (data / "images").iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    overwrite(copy / "train-000001.tar", 2, "png", b"garbage!")
    shards = Shards(copy, "images", "train")
    key = shards.shards[1].keys[2]
    config = LoaderConfig(batch=8, seed=3)
    read = [ImageBatches(shards, config, 8, flip=True).read(step) for step in range(8)]
    bad = [bad for batch in read for bad in batch.seen.bad]
    assert len(bad) > 1 and {(b.key, b.reason) for b in bad} == {
        (key, "png cannot be decoded (cannot identify image file)")
    }
    assert key not in {key for batch in read for key in batch.keys}
    for batch in read:
        for at, key in enumerate(batch.keys):
            place = next((s, n) for s, shard in enumerate(shards.shards) for n, k in enumerate(shard.keys) if k == key)
            seen = batch.pixels[at].permute(1, 2, 0).mul(255).round().byte().numpy()
            expected = picture_of(shards.read(place), 8)
            assert (seen == expected).all() or (seen == expected[:, ::-1]).all()


@pytest.mark.parametrize(
    ("n_replaced", "n_consumed", "max_share", "stops"),
    [
        (1, 10, 0.01, False),
        (GRACE, 10, 0.01, False),
        (GRACE + 1, 10, 0.01, True),
        (GRACE + 1, 1100, 0.01, False),
        (GRACE + 1, 1099, 0.01, True),
        (1, 10**9, 0.0, True),
        (0, 10, 0.0, False),
        (1000, 1000, 1.0, False),
    ],
)
def test_a_run_stops_at_the_share_that_is_allowed_and_not_for_a_few(
    n_replaced: int, n_consumed: int, max_share: float, stops: bool
) -> None:
    if not stops:
        refuse_too_many(n_replaced, n_consumed, max_share, "x")
        return
    with pytest.raises(
        FolderError, match=rf"^{n_replaced} of {n_consumed} samples .* data\.max_bad_share=.*the last: x\."
    ):
        refuse_too_many(n_replaced, n_consumed, max_share, "x")
