"""Which pictures are copies: the marks of a picture, and who stays."""

import io

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from cluster.settings import SettingError
from data_pipeline import dedupe
from data_pipeline.dedupe import NO_HASH, DedupeConfig, copies, marks
from data_pipeline.images import decode
from data_pipeline.shards import read_foreign
from data_pipeline.sources import EMBEDDED

NEAR = 4


def picture(seed: int, side: int = 256) -> Image.Image:
    """Soft blobs of colour, not symmetric: (side, side) RGB."""
    small = np.random.default_rng(seed).integers(0, 256, (7, 7, 3), np.uint8)
    return Image.fromarray(small).resize((side, side), Image.Resampling.BICUBIC)


def embedded(count: int) -> list[Image.Image]:
    """The first pictures of the embedded set."""
    tar = min(EMBEDDED.glob("train-*.tar.gz"))
    samples = [sample for sample, _ in zip(read_foreign(tar), range(count), strict=False)]
    return [decode(next(v for k, v in one.files.items() if k in ("png", "webp", "jpg")), 10**6) for one in samples]


def as_jpeg(image: Image.Image, quality: int = 50) -> Image.Image:
    out = io.BytesIO()
    image.save(out, "jpeg", quality=quality)
    return decode(out.getvalue(), 10**8)


def halved(image: Image.Image) -> Image.Image:
    return image.resize((image.width // 2, image.height // 2), Image.Resampling.BICUBIC)


CHANGES = {
    "JPEG quality 50": as_jpeg,
    "half the size": halved,
    "half the size as JPEG": lambda image: as_jpeg(halved(image), 70),
    "a tenth less contrast": lambda image: ImageEnhance.Contrast(image).enhance(0.9),
    "a twentieth darker": lambda image: ImageEnhance.Brightness(image).enhance(0.95),
}


def bits_between(ours: Image.Image, theirs: Image.Image) -> int:
    return (marks(ours)[1] ^ marks(theirs)[1]).bit_count()


def marks_of(images: list[Image.Image]) -> tuple[np.ndarray, np.ndarray]:
    digests, hashes = zip(*map(marks, images), strict=True)
    return np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 32), np.array(hashes, np.uint64)


def test_the_digest_is_of_size_and_pixels() -> None:
    image = picture(0)
    digest, _ = marks(image)
    assert len(digest) == 32
    assert marks(image.copy())[0] == digest
    changed = image.copy()
    changed.putpixel((3, 5), (1, 2, 3))
    wide, tall = (Image.frombytes("RGB", size, bytes(24)) for size in ((4, 2), (2, 4)))
    assert len({digest, marks(changed)[0], marks(wide)[0], marks(tall)[0]}) == 4


def test_the_hash_is_the_same_on_every_machine() -> None:
    """Whole numbers from the picture on; a change of the rule makes all stored marks worthless."""
    rows, columns = np.mgrid[0:32, 0:32]
    pixels = (rows * rows * 3 + columns * rows * 5 + columns * 7) % 251
    image = Image.fromarray(np.repeat(pixels[:, :, None], 3, axis=2).astype(np.uint8))
    assert marks(image)[1] == 563018758969889


def plain_looks(image: Image.Image) -> list[bool]:
    """The definition, in floating point."""
    grey = np.asarray(image.convert("L").resize((32, 32), Image.Resampling.LANCZOS, reducing_gap=3.0), np.float64)
    steps = np.pi * (2 * np.arange(32) + 1) / 64
    by_frequency = {
        (u * u + v * v, max(u, v), u, v): float((np.outer(np.cos(u * steps), np.cos(v * steps)) * grey).sum())
        for u in range(12)
        for v in range(12)
    }
    lowest = [by_frequency[at] for at in sorted(by_frequency)[1:65]]
    return [value > np.sqrt(np.mean(np.square(lowest))) / 20 for value in lowest]


def test_the_hash_is_which_of_the_64_lowest_frequencies_are_clearly_positive() -> None:
    """Whole numbers round: a frequency at the border may fall to the other side."""
    for image in [*embedded(50), *map(picture, range(10))]:
        bits = [bool(marks(image)[1] >> (63 - place) & 1) for place in range(64)]
        assert sum(ours != theirs for ours, theirs in zip(bits, plain_looks(image), strict=True)) <= 1


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_picture_is_near_the_first(change: str) -> None:
    """99 of 100 drawings of the embedded set, and every soft picture: symmetric ones are where plain pHash fails."""
    distances = [bits_between(image, CHANGES[change](image)) for image in embedded(200)]
    assert np.mean([distance <= NEAR for distance in distances]) >= 0.99
    assert max(bits_between(picture(seed), CHANGES[change](picture(seed))) for seed in range(20)) <= NEAR


def test_other_pictures_are_far() -> None:
    _, hashes = marks_of([picture(seed) for seed in range(100)])
    distances = np.bitwise_count(hashes[:, None] ^ hashes[None])[np.triu_indices(100, 1)]
    assert distances.min() > 3 * NEAR
    _, hashes = marks_of(embedded(200))  # of 19,900 pairs a few are people and faces in two styles
    distances = np.bitwise_count(hashes[:, None] ^ hashes[None])[np.triu_indices(200, 1)]
    assert np.mean(distances <= NEAR) < 0.001


@pytest.mark.parametrize("colour", ["white", "black", "#807f80"])
def test_a_flat_picture_has_no_hash(colour: str) -> None:
    flat = Image.new("RGB", (64, 48), colour)
    noisy = Image.fromarray(np.asarray(flat) // 2 + np.random.default_rng(0).integers(0, 3, (48, 64, 3), np.uint8))
    assert marks(flat)[1] == marks(noisy)[1] == NO_HASH
    flat.paste("red", (20, 10, 40, 30))
    assert marks(flat)[1] != NO_HASH


def test_a_tiny_picture_has_marks() -> None:
    digest, look = marks(Image.new("RGB", (1, 1)))
    assert (len(digest), look) == (32, NO_HASH)
    assert 0 <= marks(picture(0, 8).crop((0, 0, 8, 1)))[1] < 2**64


def made(kinds: str, looks: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Marks of made-up samples: digests by letter, hashes as given."""
    digests = np.array([[ord(letter)] * 32 for letter in kinds], np.uint8).reshape(-1, 32)
    return digests, np.array(looks, np.uint64)


def test_the_first_of_equal_pictures_stays() -> None:
    digests, hashes = made("abacab", [1, 2, 1, 3, 1, 2])
    assert copies(digests, hashes, -1, 1).tolist() == [-1, -1, 0, -1, 0, 1]


def test_digests_that_end_in_zeros_are_told_apart() -> None:
    digests, hashes = made("ab\0", [1, 2, 3])
    digests[:2, 1:] = 0
    digests[1, 0] = digests[0, 0]
    assert copies(digests, hashes, -1, 1).tolist() == [-1, 0, -1]


def test_looks_count_only_where_they_are_asked_for() -> None:
    digests, hashes = made("abc", [0b1111, 0b1111, 0b0111])
    assert copies(digests, hashes, -1, 1).tolist() == [-1, -1, -1]
    assert copies(digests, hashes, 0, 1).tolist() == [-1, 0, -1]
    assert copies(digests, hashes, 1, 1).tolist() == [-1, 0, 0]


def test_a_copy_makes_nobody_a_copy() -> None:
    digests, hashes = made("abcd", [0b00001, 0b00011, 0b00111, 0b01111])
    assert copies(digests, hashes, 1, 1).tolist() == [-1, 0, -1, 2]


def test_flat_pictures_are_copies_only_if_equal() -> None:
    digests, hashes = made("abac", [NO_HASH, NO_HASH, NO_HASH, 1])
    assert copies(digests, hashes, 4, 1).tolist() == [-1, -1, 0, -1]


def test_the_set_to_keep_clear_of_is_kept_whole_and_takes_its_copies() -> None:
    digests, hashes = made("abcaxb", [0b0001, 0b0011, 0b1100_0000, 0b0001, 0b0111, 0b0011])
    assert copies(digests, hashes, 1, 1, fixed=2).tolist() == [-1, -1, -1, 0, 1, 0]
    assert copies(digests, hashes, -1, 1, fixed=4).tolist() == [-1, -1, -1, -1, -1, 1]


def test_no_samples_have_no_copies() -> None:
    digests, hashes = made("", [])
    assert copies(digests, hashes, 4, 2).tolist() == []


def plain_copies(digests: np.ndarray, hashes: np.ndarray, near: int, fixed: int) -> list[int]:
    """The definition, in words of one loop."""
    kept: list[int] = []
    answer = []
    for i in range(len(digests)):
        alike = (
            j
            for j in kept
            if bytes(digests[i]) == bytes(digests[j])
            or (hashes[i] != NO_HASH and hashes[j] != NO_HASH and (int(hashes[i]) ^ int(hashes[j])).bit_count() <= near)
        )
        answer.append(-1 if i < fixed else next(alike, -1))
        if answer[-1] < 0:
            kept.append(i)
    return answer


@pytest.mark.parametrize("seed", range(30))
def test_copies_equal_the_plain_definition(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the pairs do not fit in memory, on any number of workers, and beside a fixed set."""
    random = np.random.default_rng(seed)
    count, near = int(random.integers(1, 120)), int(random.integers(-1, 11))
    fixed = int(random.integers(0, count)) if seed % 2 else 0
    hashes = random.integers(1, 2**63, 4, np.uint64)[random.integers(0, 4, count)]
    for _ in range(int(random.integers(1, 8))):
        hashes = hashes ^ (np.uint64(1) << random.integers(0, 64, count).astype(np.uint64))
    hashes[random.random(count) < 0.15] = NO_HASH
    digests = np.zeros((count, 32), np.uint8)
    digests[:, :8] = hashes.view(np.uint8).reshape(count, 8)  # equal pixels have equal hashes
    digests[:, 9] = random.integers(0, 3, count)
    monkeypatch.setattr(dedupe, "PAIRS_AT_ONCE", (1, 5, 10**6)[seed % 3])
    wanted = plain_copies(digests, hashes, near, fixed)
    assert copies(digests, hashes, near, 1 + seed % 4, fixed).tolist() == wanted


def test_a_crowd_of_equal_or_nearly_equal_pictures_is_no_crowd_of_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """All pairs of 50,000 would be a billion; never more than these few are held, or it would not end."""
    monkeypatch.setattr(dedupe, "PAIRS_AT_ONCE", 50_000)
    count, random = 50_000, np.random.default_rng(0)
    digests = random.integers(0, 256, (count, 32), np.uint8)
    for look in (NO_HASH, 12345):
        hashes = np.full(count, look, np.uint64)
        assert (copies(digests, hashes, 4, 1) >= 0).sum() == (count - 1 if look else 0)
    for _ in range(3):
        hashes = hashes ^ (np.uint64(1) << random.integers(0, 64, count).astype(np.uint64))
    assert (copies(digests, hashes, 4, 1) < 0).sum() < 200


@pytest.mark.parametrize("near", [-2, 11])
def test_bits_that_make_no_sense_are_refused(near: int) -> None:
    with pytest.raises(SettingError, match=f"dedupe.near={near} must be from 0 to 10"):
        DedupeConfig(near=near)


def test_a_set_to_keep_clear_of_needs_a_rule() -> None:
    with pytest.raises(SettingError, match=r"dedupe\.against needs"):
        DedupeConfig(against="elsewhere")
    assert DedupeConfig(against="elsewhere", exact=True)
    assert DedupeConfig(against="elsewhere", near=0)
