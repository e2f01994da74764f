"""Codes are checked: 16 bit against fp32 before the work, pictures drawn from the written codes after it."""

import dataclasses
import io
import itertools
import json
import math
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from cluster.command import run_command
from cluster.manifest import FolderError, is_done, read_manifest, write_manifest
from cluster.settings import SettingError, UserError
from cluster.weights import WEIGHTS, save_weights
from data_pipeline.contents import npy_bytes, picture_of, read_npy
from data_pipeline.convert import PreprocessConfig
from data_pipeline.folders import Shards
from data_pipeline.loader import to_pixels
from data_pipeline.preprocess import preprocess
from data_pipeline.shards import ShardError, write_shard
from dvae import token_work
from dvae.check_codes import draw_back, encode, equal_share
from dvae.config import DvaeConfig
from dvae.likelihood import most_likely_pixels
from dvae.model import Dvae
from dvae.token_work import crops_of
from dvae.tokenise import COMMAND, TokeniseConfig, merge, rate, tokenise
from dvae.train import open_dvae
from tests.pairs import caption, encoded, tree, write_tar

CPU = torch.device("cpu")
SIDE, PATCH = 16, 4
SHAPE = DvaeConfig(image_side=SIDE, fold=PATCH, width=16, n_groups=1, n_blocks=1, n_init=16, codebook=8)
BF16: dict[str, Any] = {"precision": "bf16"}


def tiles(seed: int, times: int = 1) -> bytes:
    """A picture of (PATCH, PATCH) tiles, each of one of 8 pure colours; `times` as large."""
    bits = np.random.default_rng(seed).integers(0, 2, (SIDE // PATCH, SIDE // PATCH, 3), np.uint8) * 255
    return encoded(Image.fromarray(bits.repeat(times * PATCH, 0).repeat(times * PATCH, 1)), "png")


def colour_codec() -> Dvae:
    """Codes of pure colours, far from each other, and back: code = red + 2 green + 4 blue. Blocks add nothing."""
    model = Dvae(SHAPE)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        stem, head = model.encoder.stem, model.encoder.head
        for colour in range(3):  # channels 2c and 2c + 1: how light and how dark; pixels are from 0.1 to 0.9
            stem.weight[2 * colour, colour * PATCH**2, 1, 1] = 1.0
            stem.weight[2 * colour + 1, colour * PATCH**2, 1, 1] = -1.0
            stem.bias[2 * colour + 1] = 1.0  # type: ignore[index]
        for code in range(8):
            for colour in range(3):
                head.weight[code, 2 * colour + 1 - (code >> colour & 1)] = 1.0
                model.decoder.embed.weight[2 * colour + 1 - (code >> colour & 1), code] = 1.0
        for colour in range(3):
            rows = slice(colour * PATCH**2, (colour + 1) * PATCH**2)
            skip = model.decoder.head.weight
            skip[rows, 2 * colour], skip[rows, 2 * colour + 1] = 2.0, -2.0  # the sigmoid of 2 is 0.88 of 0.9
    return model


def write_dvae(folder: Path, model: Dvae, counts: dict[str, float]) -> None:
    folder.mkdir()
    save_weights(folder, model.state_dict())
    write_manifest(folder, "dvae", {"model": asdict(SHAPE)}, counts, [WEIGHTS], {})


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """images/ of 3 shards of 4 pictures and 3 held out; vocab/; sure/, a dVAE for them; rough/, an untrained one."""
    folder = tmp_path_factory.mktemp("made")
    for tar in range(3):
        numbers = range(4 * tar, 4 * tar + 4)
        pairs = [((f"{n:02d}.txt", caption(n).encode()), (f"{n:02d}.png", tiles(n))) for n in numbers]
        write_tar(folder / "raw" / f"{tar}.tar", [member for pair in pairs for member in pair])
    held = [((f"h{n}.txt", caption(n).encode()), (f"h{n}.png", tiles(n))) for n in range(20, 23)]
    write_tar(folder / "held.tar", [member for pair in held for member in pair])
    preprocess(
        PreprocessConfig(
            source=str(folder / "raw"), heldout_source=str(folder / "held.tar"), out=str(folder), image_format="png",
            vocab_size=290,
        )
    )  # fmt: skip
    write_dvae(folder / "sure", colour_codec(), {"val/psnr_db": 30.0})
    torch.manual_seed(0)
    write_dvae(folder / "rough", Dvae(SHAPE), {"val/psnr_db": 30.0})
    return folder


def config_of(made: Path, out: Path, dvae: str = "sure", **changes: Any) -> TokeniseConfig:
    config = TokeniseConfig(str(made / "images"), str(made / "vocab"), str(made / dvae), str(out), batch=3)
    return dataclasses.replace(config, **changes)


def flip(monkeypatch: pytest.MonkeyPatch, share: float) -> list[int]:
    """Let bf16 give this share of equal codes; the numbers of pictures that are compared, as they are."""
    compared: list[int] = []

    def measured(dvae: Path, pictures: list[np.ndarray], device: torch.device) -> float:
        compared.append(len(pictures))
        return share

    monkeypatch.setattr(token_work, "equal_share", measured)
    return compared


def pictures(made: Path, split: str = "train") -> list[np.ndarray]:
    return [picture_of(sample, SIDE) for sample in Shards(made / "images", "images", split)]


def test_the_share_of_equal_codes_counts_those_of_both_precisions(made: Path) -> None:
    """Noise, so that an untrained dVAE's codes lie close to each other, in more than one batch."""
    noise = list(np.random.default_rng(0).integers(0, 256, (40, SIDE, SIDE, 3), np.uint8))
    share = equal_share(made / "rough", noise, CPU)
    fp32, bf16 = (open_dvae(made / "rough", CPU, kind)[0] for kind in (torch.float32, torch.bfloat16))
    with torch.no_grad():
        same = sum((encode(one[None], fp32, CPU) == encode(one[None], bf16, CPU)).sum() for one in noise)
    assert share == same / (40 * 16) and 0.9 < share < 1
    assert equal_share(made / "sure", pictures(made), CPU) == 1


def test_bf16_writes_its_share_into_the_manifest_and_is_a_setting_of_the_folder(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenise(config_of(made, tmp_path / "a", **BF16))
    manifest = read_manifest(tmp_path / "a", "tokens")
    assert manifest.settings == {"precision": "bf16"} and manifest.counts["codes_equal_to_fp32"] == 1
    assert capsys.readouterr().out.startswith("bf16 gives 100.000% of a sample's codes as fp32 does\n")
    tokenise(config_of(made, tmp_path / "b"))
    plain = read_manifest(tmp_path / "b", "tokens")
    assert plain.settings == {} and "codes_equal_to_fp32" not in plain.counts
    assert json.loads((tmp_path / "b" / "begun.json").read_text()) == plain.made_from
    assert "precision" not in json.loads((tmp_path / "b" / "train-000000.done.json").read_text())
    assert plain.fingerprint == manifest.fingerprint  # all codes are equal, and the fingerprint is of them alone
    with pytest.raises(FolderError, match="precision: 'bf16' there, None here"):
        tokenise(config_of(made, tmp_path / "a"))


def test_the_work_is_done_in_bf16_where_it_is_asked(made: Path, tmp_path: Path) -> None:
    """Shown by a dVAE whose codes differ in it."""
    noise = tmp_path / "noise.tar"
    random = np.random.default_rng(0).integers(0, 256, (100, SIDE, SIDE, 3), np.uint8)
    members = [
        (f"{n:02d}.{end}", data)
        for n, one in enumerate(random)
        for end, data in (("png", encoded(Image.fromarray(one), "png")), ("txt", caption(n % 20).encode()))
    ]
    write_tar(noise, members)
    preprocess(PreprocessConfig(source=str(noise), out=str(tmp_path), image_format="png", vocab_size=280))
    expected = {}
    for precision, kind in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        expected[precision] = encode(np.stack(pictures(tmp_path)), open_dvae(made / "rough", CPU, kind)[0], CPU)
    assert (expected["fp32"] != expected["bf16"]).any()
    for precision, codes in expected.items():
        out = tmp_path / precision
        config = config_of(made, out, "rough", images=str(tmp_path / "images"), precision=precision, min_equal=0.5)
        tokenise(dataclasses.replace(config, batch=100))
        coded = np.concatenate([read_npy(sample.files["npy"]) for sample in Shards(out, "tokens", "train")])
        assert np.array_equal(coded, codes)


def test_bf16_below_the_bar_is_refused_before_anything_is_written(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    compared = flip(monkeypatch, 0.9989)
    words = [f"{name}={made}/{name}" for name in ("images", "vocab")] + [f"dvae={made}/sure", f"out={tmp_path}/out"]
    assert run_command(COMMAND, [*words, "precision=bf16"]) == 1
    assert capsys.readouterr().err == (
        "smalti tokenise: bf16 gives 99.890% of a sample's codes as fp32 does, less than min_equal=0.999; "
        "use precision=fp32\n"
    )
    assert not (tmp_path / "out").exists() and compared == [12]  # all training pictures, where there are so few
    assert run_command(COMMAND, [*words, "precision=bf16", "min_equal=0.9989"]) == 0
    with pytest.raises(UserError, match="99.890% .* less than min_equal=0.999;"):
        tokenise(config_of(made, tmp_path / "out", **BF16))
    assert len(compared) == 2  # a folder remembers


def test_so_many_pictures_are_compared_as_give_the_number_of_codes(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_work, "N_CODES", 5 * 16 - 1)
    compared = flip(monkeypatch, 1.0)
    tokenise(config_of(made, tmp_path, **BF16))
    assert compared == [5]


@pytest.mark.parametrize("tasks", [1, 3])
def test_tasks_give_the_bytes_of_one_process_and_measure_once(
    made: Path, tmp_path: Path, tasks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared = flip(monkeypatch, 0.9995)
    tokenise(config_of(made, tmp_path / "whole", **BF16))
    for task in reversed(range(tasks)):
        tokenise(config_of(made, tmp_path / "shared", tasks=tasks, task=task, **BF16))
    merge(config_of(made, tmp_path / "shared", tasks=tasks, **BF16))
    assert tree(tmp_path / "shared") == tree(tmp_path / "whole") and len(compared) == 2
    assert read_manifest(tmp_path / "shared", "tokens").counts["codes_equal_to_fp32"] == 0.9995


@pytest.mark.parametrize(
    ("is_fast", "share", "decided"), [(True, 1.0, "bf16"), (True, 0.5, "fp32"), (False, 1.0, "fp32")]
)
def test_auto_is_bf16_where_it_is_fast_and_equal_and_the_first_task_decides(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_fast: bool, share: float, decided: str
) -> None:
    flip(monkeypatch, share)
    monkeypatch.setattr("dvae.tokenise.computes_bf16", lambda place: is_fast)
    tokenise(config_of(made, tmp_path / "auto", precision="auto", tasks=2, task=0))
    monkeypatch.setattr("dvae.tokenise.computes_bf16", lambda place: not is_fast)  # another machine
    tokenise(config_of(made, tmp_path / "auto", precision="auto", tasks=2, task=1))
    merge(config_of(made, tmp_path / "auto", precision="auto", tasks=2))
    tokenise(config_of(made, tmp_path / "told", precision=decided))
    assert tree(tmp_path / "auto") == tree(tmp_path / "told")
    tokenise(config_of(made, tmp_path / "auto", precision="auto"))
    tokenise(config_of(made, tmp_path / "auto", precision=decided))
    (tmp_path / "auto" / "begun.json").unlink()  # the manifest says it too
    tokenise(config_of(made, tmp_path / "auto", precision="auto"))


def test_a_merge_of_nothing_measures_nothing(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compared = flip(monkeypatch, 1.0)
    with pytest.raises(FolderError, match="4 of 4 shards are not made"):
        merge(config_of(made, tmp_path, precision="auto", tasks=2))
    assert compared == []


def test_precisions_are_not_mixed_in_a_folder(made: Path, tmp_path: Path) -> None:
    tokenise(config_of(made, tmp_path, tasks=3, task=0, **BF16))
    with pytest.raises(FolderError, match="begun with another .* precision"):
        tokenise(config_of(made, tmp_path, tasks=3, task=1))
    whole = (tmp_path / "begun.json").read_text()
    (tmp_path / "begun.json").unlink()  # as if both had begun in the same instant
    tokenise(config_of(made, tmp_path, tasks=3, task=1))
    (tmp_path / "begun.json").write_text(whole)
    tokenise(config_of(made, tmp_path, tasks=3, task=2, **BF16))
    with pytest.raises(FolderError, match="shards are not made: .* task=1$"):
        merge(config_of(made, tmp_path, tasks=3, **BF16))
    (tmp_path / "begun.json").write_text(whole[:-3])
    with pytest.raises(FolderError, match="begun.json is damaged; remove"):
        merge(config_of(made, tmp_path, tasks=3, **BF16))


def psnr_of(codes: np.ndarray, originals: list[np.ndarray], model: Dvae) -> float:
    """Mean over pictures of -10 log10 of the mean squared error."""
    with torch.no_grad():
        drawn = most_likely_pixels(model.decode(torch.from_numpy(codes.astype(np.int64))))
    pairs = zip(to_pixels(np.stack(originals)), drawn, strict=True)
    return sum(-10 * math.log10((a - b).square().mean().item()) for a, b in pairs) / len(drawn)


def test_pictures_drawn_from_the_written_codes_are_measured_and_shown(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenise(config_of(made, tmp_path / "a"))
    manifest = read_manifest(tmp_path / "a", "tokens")
    model, _ = open_dvae(made / "sure", CPU)
    psnr = psnr_of(encode(np.stack(pictures(made, "heldout")), model, CPU), pictures(made, "heldout"), model)
    assert manifest.counts["sample_psnr_db"] == pytest.approx(psnr, abs=0.01) and psnr > 30  # it is rounded
    said = capsys.readouterr().out
    assert f"3 pictures drawn from their codes have {psnr:.1f} dB PSNR (its run measured 30.0 dB" in said
    assert "warning" not in said
    sheet = np.asarray(Image.open(io.BytesIO((tmp_path / "a" / "sample.png").read_bytes())))
    assert sheet.shape == (2 * SIDE, 3 * SIDE, 3)
    assert (sheet[:SIDE] == np.concatenate(pictures(made, "heldout"), 1)).all()
    assert np.abs(sheet[SIDE:].astype(int) - sheet[:SIDE]).max() <= 8
    assert "sample.png" not in manifest.files


def test_a_dvae_that_does_not_fit_is_warned_of_and_one_that_measured_nothing_is_not(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenise(config_of(made, tmp_path / "rough", "rough"))
    psnr = read_manifest(tmp_path / "rough", "tokens").counts["sample_psnr_db"]
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert psnr < 24 and len(warnings) == 1
    assert warnings[0].startswith(f"warning: that is {30 - psnr:.1f} dB below what the dVAE reached")
    for own, warned in ((psnr + 5.9, False), (psnr + 6.1, True), (None, False)):
        name = f"rough-{own}"
        torch.manual_seed(0)
        write_dvae(tmp_path / name, Dvae(SHAPE), {} if own is None else {"val/psnr_db": own})
        tokenise(config_of(made, tmp_path / f"tokens-{own}", str(tmp_path / name)))
        said = capsys.readouterr().out
        assert ("warning" in said) == warned and ("its run measured" in said) == (own is not None)


def test_it_is_the_written_codes_that_are_drawn(made: Path, tmp_path: Path) -> None:
    """Others in the shard, and codes that no such dVAE has, are found out."""
    tokenise(config_of(made, tmp_path))
    whole = read_manifest(tmp_path, "tokens").counts["sample_psnr_db"]
    sample = [
        ("heldout-000000.tar", one.key, picture_of(one, SIDE)) for one in Shards(made / "images", "images", "heldout")
    ]
    assert draw_back(tmp_path, made / "sure", sample, CPU) == whole
    path = tmp_path / "heldout-000000.tar"
    coded = list(Shards(tmp_path, "tokens", "heldout"))
    for one in coded:
        one.files["npy"] = npy_bytes(7 - read_npy(one.files["npy"]))  # each colour's opposite
    write_shard(path, coded)
    assert draw_back(tmp_path, made / "sure", sample, CPU) < 3
    for one in coded:
        one.files["npy"] = npy_bytes(read_npy(one.files["npy"]) + np.uint16(1))
    write_shard(path, coded)
    with pytest.raises(ShardError, match="codes outside of 0 to 7"):
        draw_back(tmp_path, made / "sure", sample, CPU)


def test_training_pictures_are_drawn_where_none_is_held_out_and_of_crops_the_first(made: Path, tmp_path: Path) -> None:
    pairs = [((f"{n:02d}.txt", caption(n).encode()), (f"{n:02d}.png", tiles(n, 2))) for n in range(20)]
    write_tar(tmp_path / "raw.tar", [member for pair in pairs for member in pair])
    preprocess(
        PreprocessConfig(
            source=str(tmp_path / "raw.tar"), out=str(tmp_path), image_format="png", vocab_size=280,
            heldout_fraction=0.0,
        )
    )  # fmt: skip
    config = config_of(made, tmp_path / "tokens", images=str(tmp_path / "images"), augment="transformer", crops=2)
    tokenise(config)
    crops = [
        crops_of(sample, SIDE, config)
        for sample in itertools.islice(Shards(tmp_path / "images", "images", "train"), 16)
    ]
    coded = itertools.islice(Shards(tmp_path / "tokens", "tokens", "train"), 16)
    codes = np.stack([read_npy(sample.files["npy"]) for sample in coded])
    model, _ = open_dvae(made / "sure", CPU)
    first, second = (psnr_of(codes[:, n], [each[0] for each in crops], model) for n in (0, 1))
    assert read_manifest(tmp_path / "tokens", "tokens").counts["sample_psnr_db"] == pytest.approx(first, abs=0.01)
    assert abs(first - second) > 0.1  # the other crop would be seen
    sheet = np.asarray(Image.open(tmp_path / "tokens" / "sample.png"))
    assert (sheet[:SIDE] == np.concatenate([each[0] for each in crops[:8]], 1)).all()


def test_counts_do_not_decide_whether_a_folder_is_done(made: Path, tmp_path: Path) -> None:
    tokenise(config_of(made, tmp_path))
    about = read_manifest(tmp_path, "tokens")
    counts = about.counts | {"sample_psnr_db": 1.0}
    other = write_manifest(tmp_path, "tokens", about.settings, counts, about.files, about.made_from)
    assert other.fingerprint == about.fingerprint
    assert is_done(tmp_path, "tokens", {}, about.made_from)


def test_the_last_line_tells_the_throughput(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenise(config_of(made, tmp_path / "a"))
    last = capsys.readouterr().out.splitlines()[-1]
    assert re.fullmatch(r"15 pictures as 4x4 codes in .*, [\d,]+\.\d pictures/s", last)
    tokenise(config_of(made, tmp_path / "b", tasks=1, task=0))
    assert re.search(r"4 of 4 shards are done, [\d,]+\.\d pictures/s; when", capsys.readouterr().out)
    merge(config_of(made, tmp_path / "b", tasks=1))
    assert capsys.readouterr().out.splitlines()[-1] == f"15 pictures as 4x4 codes in {tmp_path / 'b'}"
    assert rate(3, 2.0) == ", 1.5 pictures/s" and rate(0, 2.0) == ""


@pytest.mark.parametrize("share", [-0.1, 1.1])
def test_a_share_is_from_0_to_1(share: float) -> None:
    with pytest.raises(SettingError, match=f"min_equal={share} must be from 0 to 1"):
        TokeniseConfig(min_equal=share)


def test_bf16_of_nothing_but_small_pictures_is_refused(made: Path, tmp_path: Path) -> None:
    small = encoded(Image.new("RGB", (20, SIDE - 1), "red"), "png")
    write_tar(tmp_path / "raw.tar", [("a.txt", b"a red tile"), ("a.png", small)])
    preprocess(
        PreprocessConfig(source=str(tmp_path / "raw.tar"), out=str(tmp_path), vocab_size=270, heldout_fraction=0.0)
    )
    changes = {"images": str(tmp_path / "images"), "augment": "transformer", "precision": "bf16"}
    with pytest.raises(FolderError, match="no training picture of .* has 16 pixels along its short side"):
        tokenise(config_of(made, tmp_path / "tokens", **changes))
