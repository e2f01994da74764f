"""The whole path as a user runs it, in miniature: every stage, the page, and a second call."""

import json
import time
from pathlib import Path

import pytest
from PIL import Image

from tests.small import SMALL_DVAE, SMALL_SCORER, SMALL_TRAIN, smalti


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    out = tmp_path_factory.mktemp("demo") / "demo"
    words = [
        f"out={out}", "captions=3", "candidates=4",
        "dvae=" + " ".join(SMALL_DVAE[1:]), "train=" + " ".join(SMALL_TRAIN[1:]),
        "scorer=" + " ".join(SMALL_SCORER[1:]),
    ]  # fmt: skip
    said = smalti("demo", *words)
    assert said.stdout.strip().endswith(str(out / "index.html"))
    return out, words


def test_the_numbers_are_there_for_scripts(finished: tuple[Path, list[str]]) -> None:
    numbers = json.loads((finished[0] / "demo.json").read_text())
    assert numbers["dvae"]["psnr_db"] > 5 and 0 < numbers["dvae"]["codes_used"] <= 1
    assert numbers["transformer"]["image_loss_true"] > 0 and numbers["transformer"]["image_loss_shuffled"] > 0
    assert 0 <= numbers["scorer"]["top5_of_64"] <= 1
    assert numbers["seconds"]["total"] == pytest.approx(
        sum(value for name, value in numbers["seconds"].items() if name != "total")
    )
    assert 0.1 < numbers["peak_memory_gib"] < 6
    assert numbers["versions"]["torch"].startswith("2.13.0") and numbers["commit"]


def test_the_page_holds_everything_and_asks_no_network(finished: tuple[Path, list[str]]) -> None:
    page = (finished[0] / "index.html").read_text()
    assert page.count("data:image/png;base64,") == 3 * (1 + 4) + 2
    assert "http" not in page and 'src="data:' in page
    for command in ("smalti preprocess emoji", "smalti tokenise", "--module pretrain.train emoji", "smalti rerank"):
        assert command in page
    assert Image.open(finished[0] / "index.png").width > 800


def test_pictures_carry_how_they_were_made(finished: tuple[Path, list[str]]) -> None:
    out = finished[0]
    captions = (out / "captions.txt").read_text().splitlines()
    with Image.open(out / "samples" / "0001" / "02.png") as picture:
        about = picture.text  # type: ignore[attr-defined]
    assert about["caption"] == captions[1] and about["candidate"] == "2"
    made_from = json.loads(about["made_from"])
    assert made_from["model"] == json.loads((out / "runs/train/manifest.json").read_text())["fingerprint"]
    assert json.loads(about["settings"])["temperature"] == 0.8


def test_ranked_pictures_are_best_first_and_none_is_lost(finished: tuple[Path, list[str]]) -> None:
    out = finished[0]
    ranked = [json.loads(line) for line in (out / "ranked" / "samples.jsonl").read_text().splitlines()]
    for folder in ("0000", "0001", "0002"):
        rows = [row for row in ranked if row["file"].startswith(folder)]
        scores = [row["score"] for row in rows]
        assert scores == sorted(scores, reverse=True) and len(set(scores)) > 1
        assert sorted(row["candidate"] for row in rows) == [0, 1, 2, 3]
        for row in rows:
            drawn = out / "samples" / folder / f"{row['candidate']:02d}.png"
            assert (out / "ranked" / row["file"]).read_bytes() == drawn.read_bytes()


def test_a_second_call_finds_every_stage_finished(finished: tuple[Path, list[str]]) -> None:
    out, words = finished
    before = json.loads((out / "demo.json").read_text())
    weights = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    start = time.monotonic()
    smalti("demo", *words)
    assert time.monotonic() - start < 60
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")} == weights
    assert json.loads((out / "demo.json").read_text())["seconds"] == before["seconds"]


def test_a_sample_run_does_not_depend_on_its_batch(finished: tuple[Path, list[str]], tmp_path: Path) -> None:
    out = finished[0]
    words = [
        f"captions={out}/captions.txt", f"model={out}/runs/train", f"dvae={out}/runs/dvae", f"vocab={out}/data/vocab",
        "candidates=4", "temperature=0.8", "batch=3", f"out={tmp_path}/samples",
    ]  # fmt: skip
    smalti("sample", *words)
    for number in range(4):
        mine, theirs = tmp_path / "samples/0002" / f"{number:02d}.png", out / "samples/0002" / f"{number:02d}.png"
        assert mine.read_bytes() == theirs.read_bytes()


@pytest.mark.parametrize(
    ("verb", "words", "wants"),
    [
        ("sample", ["captions=nowhere.txt"], "nowhere.txt does not exist"),
        ("sample", ["captions="], "captions is empty"),
        ("sample", ["captions=" + "very " * 40 + "long"], "tokens, the model reads"),
        ("sample", ["captions=x", "dvae=nowhere"], "nowhere does not exist"),
        ("sample", ["captions=x", "--top-p", "2"], "top_p=2.0"),
        ("rerank", ["scorer=nowhere"], "nowhere does not exist"),
        ("rerank", ["samples=nowhere"], "nowhere does not exist"),
        ("sample", ["captions=x", "temprature=1"], "temprature"),
    ],
)
def test_a_mistake_gets_one_line(
    verb: str, words: list[str], wants: str, finished: tuple[Path, list[str]], tmp_path: Path
) -> None:
    out = finished[0]
    usual = {
        "sample": [f"model={out}/runs/train", f"dvae={out}/runs/dvae", f"vocab={out}/data/vocab"],
        "rerank": [f"samples={out}/samples", f"scorer={out}/runs/scorer", f"vocab={out}/data/vocab"],
    }
    failed = smalti(verb, *usual[verb], *words, f"out={tmp_path}/x", check=False)
    lines = failed.stderr.strip().splitlines()
    assert failed.returncode in (1, 2) and len(lines) == 1 and wants in lines[0]


def test_tokens_made_with_another_dvae_are_refused(
    finished: tuple[Path, list[str]], tiny: Path, tmp_path: Path
) -> None:
    out = finished[0]
    words = ["captions=x", f"model={out}/runs/train", f"dvae={tiny}/runs/dvae", f"vocab={out}/data/vocab"]
    refused = smalti("sample", *words, f"out={tmp_path}/x", check=False)
    assert refused.returncode == 1 and "was made with another dvae" in refused.stderr


def test_a_cut_weight_file_is_named(finished: tuple[Path, list[str]], tmp_path: Path) -> None:
    out, copy = finished[0], tmp_path / "dvae"
    copy.mkdir()
    for path in (out / "runs/dvae").iterdir():
        if path.is_file():
            (copy / path.name).write_bytes(path.read_bytes())
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    words = ["captions=x", f"model={out}/runs/train", f"dvae={copy}", f"vocab={out}/data/vocab", f"out={tmp_path}/x"]
    failed = smalti("sample", *words, check=False)
    assert failed.returncode == 1 and "model.safetensors" in failed.stderr and "Traceback" not in failed.stderr
