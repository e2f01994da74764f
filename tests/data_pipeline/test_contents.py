"""What a sample holds: read as numpy and the decoders read it, and refused when it is not what it should be."""

import io

import numpy as np
import pytest

from data_pipeline.contents import MOST_CAPTION_BYTES, Codes, caption_of, picture_of, read_npy
from data_pipeline.shards import Sample, ShardError
from tests.data_pipeline.token_folders import npy
from tests.pairs import picture


def codes(data: bytes) -> np.ndarray:
    return Codes(2, 512).read(Sample("k", {"npy": data}))


@pytest.mark.parametrize("dtype", ["<u2", ">u2", "u1", "<i8"])
@pytest.mark.parametrize("shape", [(3, 2, 2), (1, 2, 2)])
def test_arrays_are_read_as_numpy_reads_them(dtype: str, shape: tuple[int, ...]) -> None:
    array = np.random.default_rng(0).integers(0, 250, shape).astype(dtype)
    for data in (npy(array), npy(np.asfortranarray(array))):
        expected = np.load(io.BytesIO(data))
        for _ in range(2):  # the second time by the header that is remembered
            assert read_npy(data).dtype == expected.dtype and (read_npy(data) == expected).all()
            assert (codes(data) == array).all()


GOOD = npy(np.zeros((3, 2, 2), np.uint16))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "no array in the format of numpy"),
        (GOOD[:-1], "npy cannot be read"),
        (GOOD[:50], "npy cannot be read"),
        (GOOD[:10] + b"x" * 118 + GOOD[128:], "npy cannot be read"),
        (npy(np.array([[[{}]]], object)), "npy cannot be read"),
        (npy(np.zeros((3, 4, 4), np.uint16)), r"holds uint16 \(3, 4, 4\), not crops of 2 x 2 codes"),
        (npy(np.zeros((2, 2), np.uint16)), "not crops of 2 x 2 codes"),
        (npy(np.zeros((0, 2, 2), np.uint16)), "not crops of 2 x 2 codes"),
        (npy(np.zeros((3, 2, 2), np.float32)), "holds float32"),
        (npy(np.full((3, 2, 2), 512, np.uint16)), "codes outside of 0 to 511"),
        (npy(np.full((3, 2, 2), -1, np.int16)), "codes outside of 0 to 511"),
    ],
)
def test_codes_that_would_train_on_nonsense_are_refused(data: bytes, message: str) -> None:
    with pytest.raises(ShardError, match=f"^sample k.*{message}"):
        codes(data)


def test_codes_of_any_folder_need_only_be_square() -> None:
    assert Codes().read(Sample("k", {"npy": npy(np.full((1, 5, 5), 9999, np.uint16))})).shape == (1, 5, 5)
    with pytest.raises(ShardError, match="crops of G x G codes"):
        Codes().read(Sample("k", {"npy": npy(np.zeros((1, 5, 4), np.uint16))}))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"png": b""}, "has no caption, only png"),
        ({"txt": b"\xff"}, "has a caption that is not UTF-8"),
        ({"txt": b"x" * (MOST_CAPTION_BYTES + 1)}, "has a caption of 65537 bytes"),
    ],
)
def test_a_caption_that_is_none_is_refused(files: dict[str, bytes], message: str) -> None:
    with pytest.raises(ShardError, match=f"^sample k {message}"):
        caption_of(Sample("k", files))


def test_the_caption_may_have_each_of_its_endings() -> None:
    assert [caption_of(Sample("k", {ending: b"a tile"})) for ending in ("txt", "caption", "cap")] == ["a tile"] * 3


@pytest.mark.parametrize("files", [{"txt": b""}, {"png": b"x"}, {"png": picture("red")[:60]}])
def test_a_picture_that_is_none_is_refused(files: dict[str, bytes]) -> None:
    with pytest.raises(ShardError, match=r"^sample k(\\n)?(:| has no picture)"):
        picture_of(Sample("k", files), 8)


def test_names_with_terminal_codes_are_escaped_in_messages() -> None:
    with pytest.raises(ShardError) as caught:
        picture_of(Sample("k\x1b[31m\n", {}), 8)
    assert "\x1b" not in str(caught.value) and "\n" not in str(caught.value)
