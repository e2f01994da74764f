"""Where pairs come from, and what the embedded set holds."""

import json
from collections import Counter
from pathlib import Path

import pytest

from cluster.manifest import FolderError
from data_pipeline.images import decode
from data_pipeline.shards import Sample, read_foreign
from data_pipeline.sources import EMBEDDED, find_parts, fraction_of, read_part
from tests.pairs import make_pairs, pair_members, write_tar


def keys_of(source: Path | str, samples_per_part: int = 100) -> list[list[str]]:
    return [[sample.key for sample in read_part(part)] for part in find_parts(str(source), samples_per_part, "train")]


def test_img2dataset_tars_are_read_and_its_other_files_left_alone(tmp_path: Path) -> None:
    for shard in (1, 0):
        write_tar(tmp_path / f"{shard:05d}.tar", pair_members(range(3 * shard, 3 * shard + 3)))
        (tmp_path / f"{shard:05d}.parquet").write_bytes(b"PAR1")
        (tmp_path / f"{shard:05d}_stats.json").write_text("{}")
    write_tar(tmp_path / "_tmp" / "00002.tar", pair_members(range(9)))
    assert keys_of(tmp_path) == [["0000", "0001", "0002"], ["0003", "0004", "0005"]]


def test_img2dataset_files_are_read_with_their_captions(tmp_path: Path) -> None:
    for shard in range(2):
        make_pairs(tmp_path / f"{shard:05d}", 2)
        (tmp_path / f"{shard:05d}" / "0000.json").write_text('{"caption": null}')
    assert keys_of(tmp_path) == [["00000/0000", "00000/0001", "00001/0000", "00001/0001"]]
    (part,) = find_parts(str(tmp_path), 100, "train")
    assert [sorted(sample.files) for sample in read_part(part)] == [["json", "png", "txt"], ["png", "txt"]] * 2


def test_loose_pictures_are_cut_into_parts_and_named_by_their_path(tmp_path: Path) -> None:
    for name in ("cat/1.png", "dog/1.JPG", "dog/b.c.webp"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"picture of " + name.encode())
    (tmp_path / "dog/b.c.txt").write_text("a dog")
    (tmp_path / "notes.md").write_text("no picture")
    assert keys_of(tmp_path, 2) == [["cat/1", "dog/1"], ["dog/b.c"]]
    assert list(read_part(find_parts(str(tmp_path), 2, "train")[1])) == [
        Sample("dog/b.c", {"webp": b"picture of dog/b.c.webp", "txt": b"a dog"})
    ]
    assert keys_of(tmp_path / "cat" / "1.png") == [["1"]]


def test_a_folder_below_one_named_tmp_is_read(tmp_path: Path) -> None:
    assert keys_of(make_pairs(tmp_path / "_tmp" / "pairs", 1)) == [["0000"]]


def test_a_brace_pattern_names_tars_in_order_and_a_gap_is_named(tmp_path: Path) -> None:
    for n in (8, 9, 10):
        write_tar(tmp_path / f"x{n:03d}.tar", pair_members(range(n, n + 1)))
    assert keys_of(tmp_path / "x{008..010}.tar") == [["0008"], ["0009"], ["0010"]]
    assert keys_of(tmp_path / "x009.tar") == [["0009"]]
    with pytest.raises(FolderError, match=r"x011\.tar does not exist \(and 1 more\)"):
        find_parts(str(tmp_path / "x{010..012}.tar"), 5, "train")


def test_nothing_to_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(FolderError, match="nowhere does not exist"):
        find_parts(str(tmp_path / "nowhere"), 5, "train")
    (tmp_path / "a.txt").write_text("a caption without picture")
    with pytest.raises(FolderError, match="holds no tar and no picture"):
        find_parts(str(tmp_path), 5, "train")
    with pytest.raises(FolderError, match="emoji:nosuch is not embedded"):
        find_parts("emoji:nosuch", 5, "train")


def test_held_out_share_is_near_what_was_asked() -> None:
    fractions = [fraction_of(f"{n:09d}") for n in range(20_000)]
    assert min(fractions) >= 0 and max(fractions) < 1
    for asked in (0.01, 0.2):
        assert sum(fraction < asked for fraction in fractions) / 20_000 == pytest.approx(asked, rel=0.1)


Cell = tuple[str, str]


def cells_of(split: str) -> dict[Cell, Sample]:
    cells = {}
    for part in find_parts(f"emoji:{split}", 1, split):
        for sample in read_part(part):
            about = json.loads(sample.files["json"])
            assert (about["concept"], about["style"]) not in cells
            cells[about["concept"], about["style"]] = sample
    return cells


@pytest.fixture(scope="module")
def emoji() -> tuple[dict[Cell, Sample], dict[Cell, Sample]]:
    return cells_of("train"), cells_of("heldout")


def test_embedded_set_is_1200_concepts_in_three_styles_and_at_most_6_mb(
    emoji: tuple[dict[Cell, Sample], dict[Cell, Sample]],
) -> None:
    train, heldout = emoji
    cells = train | heldout
    concepts = {concept for concept, _ in cells}
    styles = Counter(style for _, style in cells)
    assert len(concepts) >= 1_200
    assert len(styles) == 3 and set(styles.values()) == {len(concepts)}
    assert sum(path.stat().st_size for path in EMBEDDED.iterdir() if path.is_file()) <= 6_000_000


def test_embedded_held_out_cells_are_5_percent_and_their_concepts_known_in_another_style(
    emoji: tuple[dict[Cell, Sample], dict[Cell, Sample]],
) -> None:
    train, heldout = emoji
    assert not train.keys() & heldout.keys()
    assert len(heldout) / (len(train) + len(heldout)) == pytest.approx(0.05, abs=0.002)
    assert {concept for concept, _ in heldout} <= {concept for concept, _ in train}
    assert {style for _, style in heldout} == {style for _, style in train}
    assert not {s.files["webp"] for s in heldout.values()} & {s.files["webp"] for s in train.values()}


def test_every_embedded_pair_names_its_licence_concept_and_style(
    emoji: tuple[dict[Cell, Sample], dict[Cell, Sample]],
) -> None:
    train, heldout = emoji
    keys = set()
    licences: dict[str, set[str]] = {}
    for (concept, style), sample in (*train.items(), *heldout.items()):
        about = json.loads(sample.files["json"])
        licences.setdefault(style, set()).add(about["license"])
        assert about["license"].strip() and about["group"].strip()
        caption = sample.files["txt"].decode()
        assert concept in caption and style in caption
        keys.add(sample.key)
    assert len(keys) == len(train) + len(heldout)
    assert all(len(names) == 1 for names in licences.values())


def test_embedded_pictures_decode_to_128_pixels() -> None:
    for sample in read_foreign(EMBEDDED / "heldout-00000.tar.gz"):
        assert decode(sample.files["webp"], 128 * 128).size == (128, 128)
