"""`smalti sample`: the same pictures however the work is cut up, killed and shared; beginnings; what is refused."""

import dataclasses
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from cluster.manifest import FolderError, file_digest
from cluster.process import Place
from cluster.settings import SettingError, UserError
from data_pipeline.loader import Shards, first_pictures, to_pixels
from dvae.likelihood import map_pixels
from dvae.model import Dvae
from dvae.train import open_dvae
from pretrain import sample as stage
from pretrain.config import SampleConfig
from pretrain.prime import read_prime
from pretrain.sample import Picture, in_batches, sample
from tests.small import SMALL_TRAIN, smalti

CAPTIONS = ["a red heart", "two cats", "red apple"]
PLACE = Place(0, 1, torch.device("cpu"))
GRID, SIDE = 8, 64


@pytest.fixture(scope="module")
def config(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> SampleConfig:
    """Three captions with four candidates each, for a run that saw empty captions too; no `out` yet."""
    folder = tmp_path_factory.mktemp("sample")
    words = ["caption_dropout=0.3", f"tokens={tiny}/data/tokens", f"vocab={tiny}/data/vocab", f"out={folder}/run"]
    smalti("train", *SMALL_TRAIN, *words)
    captions = folder / "captions.txt"
    captions.write_text("\n".join(CAPTIONS))
    return SampleConfig(
        str(captions), f"{folder}/run", f"{tiny}/runs/dvae", f"{tiny}/data/vocab",
        candidates=4, temperature=0.9, precision="fp32",
    )  # fmt: skip


def pngs(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*.png"))}


def pixels(path: Path) -> bytes:
    with Image.open(path) as image:
        return image.tobytes()


def drawn(config: SampleConfig, out: Path, **changes: object) -> dict[str, bytes]:
    """The PNGs of a run in this process."""
    sample(dataclasses.replace(config, out=str(out), **changes), PLACE)  # type: ignore[arg-type]
    return pngs(out)


@pytest.fixture(scope="module")
def whole(config: SampleConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The undisturbed run that the others are held against."""
    out = tmp_path_factory.mktemp("whole") / "samples"
    drawn(config, out)
    return out


@pytest.fixture
def codes(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Every batch of codes that is decoded, as it happens."""
    seen: list[Tensor] = []
    decode = stage.decode_codes

    def watched(dvae: Dvae, codes: Tensor) -> np.ndarray:
        seen.append(codes.clone())
        return decode(dvae, codes)

    monkeypatch.setattr(stage, "decode_codes", watched)
    return seen


@pytest.fixture
def saves(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Every picture that is written, as it happens."""
    seen: list[Path] = []
    save = Picture.save

    def watched(self: Picture, pixels: np.ndarray) -> None:
        save(self, pixels)
        seen.append(self.path)

    monkeypatch.setattr(Picture, "save", watched)
    return seen


def test_a_run_gives_every_candidate_and_says_which_it_is(whole: Path) -> None:
    names = [f"{caption:04d}/{candidate:02d}.png" for caption in range(3) for candidate in range(4)]
    found = pngs(whole)
    assert sorted(found) == sorted([*names, "grid.png"])
    assert len(set(found.values())) == 13
    rows = [json.loads(line) for line in (whole / "samples.jsonl").read_text().splitlines()]
    assert [row["file"] for row in rows] == names
    assert [row["caption"] for row in rows] == [caption for caption in CAPTIONS for _ in range(4)]
    with Image.open(whole / names[6]) as picture:
        assert picture.size == (SIDE, SIDE)
        assert picture.text["caption"] == CAPTIONS[1] and picture.text["candidate"] == "2"  # type: ignore[attr-defined]


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_the_batch_changes_no_byte(batch: int, config: SampleConfig, whole: Path, tmp_path: Path) -> None:
    assert drawn(config, tmp_path, batch=batch) == pngs(whole)


def test_a_caption_alone_and_fewer_candidates_give_the_same_pixels(
    config: SampleConfig, whole: Path, tmp_path: Path
) -> None:
    drawn(config, tmp_path, captions=CAPTIONS[1], candidates=2, batch=2)
    for number in range(2):
        assert pixels(tmp_path / f"0000/{number:02d}.png") == pixels(whole / f"0001/{number:02d}.png")


def test_two_processes_draw_what_one_draws(config: SampleConfig, whole: Path, tmp_path: Path) -> None:
    settings = dataclasses.asdict(dataclasses.replace(config, out=str(tmp_path), batch=2))
    words = [f"{key}={settings[key]}" for key in ("captions", "model", "dvae", "vocab", "out", "batch", "candidates")]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launcher, "-m", "pretrain.sample", *words, "temperature=0.9"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert pngs(tmp_path) == pngs(whole)


def test_ranks_share_the_batches(
    config: SampleConfig, whole: Path, tmp_path: Path, saves: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And none draws before all have seen what is left, or a late one would count on other batches."""
    drawn_at_waits: list[int] = []
    monkeypatch.setattr(stage, "wait_for_all", lambda place: drawn_at_waits.append(len(saves)))
    sample(dataclasses.replace(config, out=str(tmp_path), batch=2), Place(1, 2, torch.device("cpu")))
    assert drawn_at_waits == [0, 6]
    assert sorted(pngs(tmp_path)) == sorted(f"{n:04d}/{c:02d}.png" for n in range(3) for c in (2, 3))
    assert pngs(tmp_path).items() < pngs(whole).items()


def test_tasks_share_the_batches_whenever_they_look_and_a_run_without_ends_them(
    config: SampleConfig, whole: Path, tmp_path: Path, saves: list[Path]
) -> None:
    """12 pictures in 6 batches; task 2 of 3 is lost."""
    assert len(drawn(config, tmp_path, batch=2, tasks=3, task=1)) == 4
    assert len(drawn(config, tmp_path, batch=2, tasks=3, task=0)) == 8
    drawn(config, tmp_path, batch=2, tasks=3, task=1)
    assert len(saves) == 8 and not (tmp_path / "manifest.json").exists()
    assert drawn(config, tmp_path, batch=2) == pngs(whole)
    assert len(saves) == 12
    digests = [json.loads((folder / "manifest.json").read_text())["fingerprint"] for folder in (tmp_path, whole)]
    assert digests[0] == digests[1]


def test_a_run_that_was_cut_off_keeps_what_it_has_and_ends_the_same(
    config: SampleConfig, whole: Path, tmp_path: Path, saves: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    save = Picture.save

    def save_five(self: Picture, pixels: np.ndarray) -> None:
        if len(saves) == 5:
            raise KeyboardInterrupt
        save(self, pixels)

    with monkeypatch.context() as patch:
        patch.setattr(Picture, "save", save_five)
        with pytest.raises(KeyboardInterrupt):
            drawn(config, tmp_path, batch=3)
    kept, saves[:] = list(saves), []
    assert sorted(tmp_path.rglob("*.png")) == sorted(kept) and not (tmp_path / "manifest.json").exists()
    cut, times = kept[1], {path: path.stat().st_mtime_ns for path in kept}
    cut.write_bytes(cut.read_bytes()[:-700])
    assert drawn(config, tmp_path, batch=8) == pngs(whole)
    assert len(saves) == 12 - 4 and cut in saves
    assert all(path.stat().st_mtime_ns == times[path] for path in kept if path != cut)


def test_a_finished_folder_is_left_alone_and_other_settings_are_refused(
    config: SampleConfig, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    times = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    drawn(config, whole, batch=5)
    assert "finished already" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*")} == times
    with pytest.raises(FolderError, match="cfg_scale: 1.0 there, 3.0 here"):
        drawn(config, whole, cfg_scale=3.0)


def test_a_picture_counts_as_drawn_only_if_it_is_whole_and_of_this_run(whole: Path, tmp_path: Path) -> None:
    with Image.open(whole / "0000/00.png") as image:
        text = image.text  # type: ignore[attr-defined]
    picture = Picture(tmp_path, 0, 0, CAPTIONS[0], json.loads(text["settings"]), json.loads(text["made_from"]))
    assert not picture.is_drawn()
    picture.path.parent.mkdir()
    data = (whole / "0000/00.png").read_bytes()
    picture.path.write_bytes(data)
    assert picture.is_drawn()
    others = [("candidate", 1), ("caption", "else"), ("settings", picture.settings | {"seed": 1}), ("made_from", {})]
    for name, value in others:
        other = dataclasses.replace(picture, **{name: value})  # type: ignore[arg-type]
        other.path.write_bytes(data)
        assert not other.is_drawn()
    for length in [0, 1, 20, *range(50, len(data) - 40, 97), len(data) - 40]:  # checksums follow the pixels
        picture.path.write_bytes(data[:length])
        assert not picture.is_drawn(), length


@pytest.mark.parametrize("size", [1, 2, 3, 4, 6, 7, 12, 64])
def test_a_batch_holds_equally_many_of_each_of_its_captions(size: int, tmp_path: Path) -> None:
    todo = [Picture(tmp_path, n, c, "", {}, {}) for n, count in enumerate((4, 4, 1, 3, 3, 7)) for c in range(count)]
    batches = list(in_batches(todo, size))
    assert [picture for batch in batches for picture in batch] == todo
    for batch in batches:
        numbers = [picture.number for picture in batch]
        assert len(batch) <= size and len({numbers.count(number) for number in numbers}) == 1
    assert list(in_batches([], size)) == []


def test_guidance_draws_other_pictures_the_same_in_any_batch(config: SampleConfig, whole: Path, tmp_path: Path) -> None:
    guided = drawn(config, tmp_path / "one", cfg_scale=3.0, captions=CAPTIONS[0], top_k=20, top_p=0.9)
    assert guided == drawn(config, tmp_path / "two", cfg_scale=3.0, captions=CAPTIONS[0], top_k=20, top_p=0.9, batch=3)
    assert pixels(tmp_path / "one/0000/00.png") != pixels(whole / "0000/00.png")


# beginnings


def opaque(tiny: Path) -> Image.Image:
    """A picture of the set, at the dVAE's side."""
    first = first_pictures(Shards(tiny / "data/images", "images", "train"), 1, SIDE)[0]
    return Image.fromarray((first * 255).round().byte().permute(1, 2, 0).numpy())


def saved(picture: Image.Image, path: Path) -> str:
    picture.save(path)
    return str(path)


@torch.no_grad()
def encoded(picture: Image.Image, tiny: Path) -> Tensor:
    """(I,) codes of an RGB picture."""
    dvae, _ = open_dvae(tiny / "runs/dvae", torch.device("cpu"))
    return dvae.encode(map_pixels(to_pixels(np.asarray(picture)[None])))[0].flatten()


def test_given_rows_of_codes_begin_every_candidate(
    config: SampleConfig, tiny: Path, tmp_path: Path, codes: list[Tensor]
) -> None:
    prime = saved(opaque(tiny), tmp_path / "prime.png")
    drawn(config, tmp_path / "out", prime=prime, prime_rows=3, captions=CAPTIONS[0])
    (last,), given = codes, encoded(opaque(tiny), tiny)
    assert last.shape == (4, GRID**2)
    assert (last[:, : 3 * GRID] == given[: 3 * GRID]).all()
    assert (last[:, 3 * GRID : 4 * GRID] != given[3 * GRID : 4 * GRID]).any(1).all()
    assert len(last[:, 3 * GRID :].unique(dim=0)) == 4
    with Image.open(tmp_path / "out/0000/00.png") as picture:
        about = picture.text  # type: ignore[attr-defined]
    assert json.loads(about["made_from"])["prime"] == file_digest(Path(prime))
    assert json.loads(about["settings"])["prime_rows"] == 3


def test_what_is_transparent_in_the_beginning_is_drawn_and_all_else_is_kept(
    config: SampleConfig, tiny: Path, tmp_path: Path, codes: list[Tensor]
) -> None:
    alpha = np.full((SIDE, SIDE), 255, np.uint8)
    alpha[24:40, 16:64] = 0  # patch rows 3 and 4, columns 2 to 7
    alpha[7, 8] = 254  # one pixel of patch (0, 1), not quite opaque
    picture = opaque(tiny)
    picture.putalpha(Image.fromarray(alpha))
    prime = saved(picture, tmp_path / "prime.png")
    one = drawn(config, tmp_path / "one", prime=prime, captions=CAPTIONS[0])
    flat = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    given = torch.ones(GRID, GRID, dtype=torch.bool)
    given[3:5, 2:] = given[0, 1] = False
    known = read_prime(Path(prime), 0, open_dvae(tiny / "runs/dvae", torch.device("cpu"))[0])
    assert torch.equal(known, torch.where(given.flatten(), encoded(flat, tiny), -1))
    (last,) = codes
    assert (last[:, given.flatten()] == encoded(flat, tiny)[given.flatten()]).all()
    assert len(last[:, ~given.flatten()].unique(dim=0)) == 4
    assert drawn(config, tmp_path / "two", prime=prime, captions=CAPTIONS[0], batch=1) == one


def test_another_beginning_is_another_run(config: SampleConfig, tiny: Path, tmp_path: Path) -> None:
    prime = tmp_path / "prime.png"
    changes = {"prime": saved(opaque(tiny), prime), "prime_rows": 4, "captions": CAPTIONS[0], "candidates": 1}
    drawn(config, tmp_path / "out", **changes)
    opaque(tiny).rotate(180).save(prime)
    with pytest.raises(FolderError, match="other inputs"):
        drawn(config, tmp_path / "out", **changes)


def test_a_preview_shows_the_rows_that_are_done(
    config: SampleConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[tuple[float, np.ndarray]] = []
    write = stage.save_preview

    def save_preview(path: Path, pictures: np.ndarray, done: float) -> None:
        write(path, pictures, done)
        with Image.open(io.BytesIO(path.read_bytes())) as image:
            shown.append((done, np.asarray(image)))

    monkeypatch.setattr(stage, "save_preview", save_preview)
    drawn(config, tmp_path, captions=CAPTIONS[0], preview=True)
    assert [done for done, _ in shown] == [row / GRID for row in range(1, GRID + 1)]
    for done, image in shown:
        assert image.shape == (SIDE, 4 * SIDE, 3) and (image[round(SIDE * done) :] == 255).all()
    pictures = [np.asarray(Image.open(tmp_path / f"0000/{number:02d}.png")) for number in range(4)]
    assert np.array_equal(shown[-1][1], np.concatenate(pictures, 1))


# refusals


@pytest.mark.parametrize(
    ("changes", "wants"),
    [
        ({"prime": "nowhere.png"}, "prime picture nowhere.png does not exist"),
        ({"prime": "captions.txt"}, "image unreadable"),
        ({"prime": "clear.png"}, "gives no code"),
        ({"prime": "opaque.png"}, "gives every code: set prime_rows, or make transparent"),
        ({"prime": "opaque.png", "prime_rows": 9}, "prime_rows=9 is more than the 8 rows"),
        ({"prime": "opaque.png", "prime_rows": 8}, "gives every code"),
        ({"prime_rows": 2}, "prime_rows=2 must be at least 0, and needs prime=PICTURE"),
        ({"cfg_scale": -1.0}, "cfg_scale=-1.0 must be at least 0"),
        ({"captions": ""}, "captions is empty"),
    ],
)
def test_a_mistake_gets_one_line(
    changes: dict[str, object], wants: str, config: SampleConfig, tiny: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("captions.txt").write_text("a red heart")
    saved(opaque(tiny), Path("opaque.png"))
    Image.new("RGBA", (SIDE, SIDE), (0, 0, 0, 0)).save("clear.png")
    with pytest.raises(UserError, match=wants) as caught:
        drawn(config, Path("out"), **changes)
    assert "\n" not in str(caught.value) and not Path("out").exists()


def test_guidance_needs_a_model_that_saw_empty_captions(config: SampleConfig, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for path in Path(config.model).iterdir():
        if path.is_file():
            (run / path.name).write_bytes(path.read_bytes())
    manifest = json.loads((run / "manifest.json").read_text())
    for dropout in (0.0, None):  # None: a run from before there was such a setting
        manifest["settings"].pop("caption_dropout")
        manifest["settings"] |= {} if dropout is None else {"caption_dropout": dropout}
        (run / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(SettingError, match=r"cfg_scale=3\.0 needs a model trained with caption_dropout; .* had 0"):
            drawn(config, tmp_path / "out", model=str(run), cfg_scale=3.0)
