"""`smalti ledger`: proves what a run has seen, and finds every change of its ledger or its shards."""

import json
import os
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.command import run_command
from cluster.ledger import NAME, Ledger, whole_digest
from cluster.settings import to_toml
from data_pipeline.bpe import open_vocabulary
from data_pipeline.folders import Shards, open_folders
from data_pipeline.loader import LoaderConfig, TokenBatches
from data_pipeline.proof import COMMAND
from data_pipeline.remote import CacheConfig
from pretrain.config import TrainConfig
from tests.data_pipeline.token_folders import overwrite, write_tokens

BATCH, STEPS = 6, 7  # 42 positions of 12 and 5 samples
WEIGHTS = (3.0, 1.0)
SKIPPED = 4


def train(run: Path, data: Path, vocab: Path, weights: tuple[float, ...], first: int = 0) -> list[list[str]]:
    """What a trainer leaves: settings and a ledger; update 4 was not applied. Returns the keys of each step."""
    text = f"{data}/a::{data}/b"
    config = LoaderConfig(BATCH, 3, 2, weights)
    shards = Shards(open_folders(text, "tokens", CacheConfig()), "tokens", "train")
    overwrite(data / "a" / "train-000001.tar", 0, "npy", b"garbage")
    overwrite(data / "b" / "train-000000.tar", 1, "txt", b"\xff")
    batches = TokenBatches(shards, config, open_vocabulary(vocab)[0], 40, 0.0)
    ledger = Ledger(run, first, batches.about_order)
    (run / "settings.toml").write_text(to_toml(TrainConfig(tokens=text, data=config)))
    keys = []
    for step in range(first, STEPS):
        batch = batches.read(step)
        keys.append(batch.keys)
        positions = range(step * BATCH, step * BATCH + BATCH)
        skipped = "gradient is Inf" if step == SKIPPED else ""
        ledger.record(step, positions, whole_digest(batch.seen.sums), batch.seen.bad, skipped)
    ledger.close()
    return keys


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    write_tokens(tmp_path / "a", [5, 7])
    write_tokens(tmp_path / "b", [5], 50)
    return tmp_path


@pytest.fixture
def run(folders: Path, data: Path) -> Path:
    train(folders / "run", folders, data / "vocab", WEIGHTS)
    return folders / "run"


@pytest.mark.parametrize("weights", [(), WEIGHTS])
def test_a_ledger_is_proved_and_says_what_was_seen_how_often(
    folders: Path, data: Path, capsys: pytest.CaptureFixture[str], weights: tuple[float, ...]
) -> None:
    keys = train(folders / "run", folders, data / "vocab", weights)
    assert run_command(COMMAND, [str(folders / "run"), "json=true"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["proved"] and found["wrong"] == []
    assert (found["steps"], found["samples"]) == (STEPS, STEPS * BATCH)
    seen = Counter(key for step, step_keys in enumerate(keys) if step != SKIPPED for key in step_keys)
    expected = Counter(seen.values()) | {0: 17 - len(seen)}
    assert {int(times): count for times, count in found["seen"].items()} == expected
    assert [name.rpartition(" ")[2] for name in found["skipped_keys"]] == keys[SKIPPED]
    assert found["skipped"] == [f"step {SKIPPED}: gradient is Inf"]
    assert {text.partition("a/train")[2] or text.partition("b/train")[2] for text in found["replaced"]} == {
        "-000001.tar, sample 0005: npy cannot be read (no array in the format of numpy)",
        "-000000.tar, sample 0051: has a caption that is not UTF-8 (invalid start byte)",
    }
    assert found["epochs"] == pytest.approx([32 / 12, 10 / 5] if weights else [42 / 17])


def test_people_are_told_the_same(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(COMMAND, [str(run)]) == 0
    out = capsys.readouterr().out
    assert "7 steps consumed 42 samples, 2.67 and 2 epochs" in out
    assert "updates not applied: 1\n  step 4: gradient is Inf\nsamples of those updates: 6\n" in out
    assert "sample 0005: npy cannot be read" in out
    assert out.endswith("proved: every step's digest is that of the samples that the order gives\n")


def test_shards_may_be_damaged_gone_or_elsewhere(run: Path, folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.truncate(folders / "a" / "train-000000.tar", 100)
    (folders / "b" / "train-000000.tar").unlink()
    assert run_command(COMMAND, [str(run)]) == 0
    (folders / "b").rename(folders / "c")
    assert run_command(COMMAND, [str(run)]) == 1
    assert "data=FOLDER" in capsys.readouterr().err
    assert run_command(COMMAND, [str(run), f"data={folders}/a::{folders}/c"]) == 0


def test_a_resumed_run_is_proved_as_one(run: Path, folders: Path, data: Path) -> None:
    whole = (run / NAME).read_bytes()
    train(run, folders, data / "vocab", WEIGHTS, first=2)
    assert (run / NAME).read_bytes() == whole
    assert run_command(COMMAND, [str(run)]) == 0


def test_another_seed_from_a_step_on_is_followed(run: Path, folders: Path, data: Path) -> None:
    shards = Shards(open_folders(f"{folders}/a::{folders}/b", "tokens", CacheConfig()), "tokens", "train")
    batches = TokenBatches(shards, LoaderConfig(BATCH, 99, 2, WEIGHTS), open_vocabulary(data / "vocab")[0], 40, 0.0)
    ledger = Ledger(run, 5, batches.about_order)
    for step in (5, 6):
        seen = batches.read(step).seen
        ledger.record(step, range(step * BATCH, step * BATCH + BATCH), seen.digest, seen.bad)
    ledger.close()
    assert run_command(COMMAND, [str(run)]) == 0


def swapped(lines: list[str], one: int, other: int) -> list[str]:
    return [lines[{one: other, other: one}.get(n, n)] for n in range(len(lines))]


def changed(lines: list[str], at: int, old: str, new: str) -> list[str]:
    assert old in lines[at]
    return [*lines[:at], lines[at].replace(old, new, 1), *lines[at + 1 :]]


def with_digest(lines: list[str], at: int, source: int) -> list[str]:
    return changed(lines, at, json.loads(lines[at])["digest"], json.loads(lines[source])["digest"])


def without_bad(lines: list[str]) -> list[str]:
    """Deny a replacement that there was."""
    at = next(n for n, line in enumerate(lines) if '"bad"' in line)
    line = json.loads(lines[at])
    del line["bad"]
    return [*lines[:at], json.dumps(line), *lines[at + 1 :]]


@pytest.mark.parametrize(
    ("tamper", "message"),
    [
        (lambda lines: lines[:3] + lines[4:], "step 3 from position 18 on follows where step 2 from position 12"),
        (lambda lines: [*lines[:4], *lines[3:]], "step 2 from position 12 on follows where step 3"),
        (lambda lines: swapped(lines, 3, 4), "follows where"),
        (lambda lines: with_digest(lines, 4, 5), "step 3: its digest is not that of the samples at its positions"),
        (lambda lines: changed(lines, 3, '"first":12', '"first":13'), "step 2 from position 13"),
        (lambda lines: changed(lines, 3, '"count":6', '"count":5'), "follows where|digest"),
        (without_bad, "its digest is not"),
        (lambda lines: changed(lines, 0, '"seed":3', '"seed":4'), "step 0.*(digest|never drawn there)"),
        (lambda lines: changed(lines, 0, "3.0,1.0", "2.0,1.0"), "digest|never drawn there"),
        (lambda lines: changed(lines, 0, '"shuffle_window":2', '"shuffle_window":0'), "cannot be made"),
        (
            lambda lines: changed(lines, 0, '"shards":"', '"shards":"0'),
            "from step 0 on it read other shards than these",
        ),
        (lambda lines: lines[1:], "no line before it says in which order"),
        (lambda lines: [*lines[:2], "{", *lines[3:]], "line 3 cannot be read"),
    ],
)
def test_a_change_of_the_ledger_is_found(
    run: Path,
    capsys: pytest.CaptureFixture[str],
    tamper: Callable[[list[str]], list[str]],
    message: str,
) -> None:
    lines = (run / NAME).read_text().splitlines()
    (run / NAME).write_text("\n".join(tamper(lines)) + "\n")
    assert run_command(COMMAND, [str(run)]) == 1
    said = capsys.readouterr()
    assert "is not proved: " in said.err and said.err.count("\n") == 1
    assert re.search(message, said.err)
    assert "proved: every" not in said.out


def test_an_invented_replacement_is_found(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = (run / NAME).read_text().splitlines()
    at = next(n for n, line in enumerate(lines) if '"bad"' in line)
    line = json.loads(lines[at])
    line["bad"][0][3] = "0007"
    (run / NAME).write_text("\n".join([*lines[:at], json.dumps(line), *lines[at + 1 :]]) + "\n")
    assert run_command(COMMAND, [str(run)]) == 1
    assert "0007, was replaced, but never drawn there" in capsys.readouterr().err


def test_a_ledger_that_ends_before_its_run_is_found(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A finished run's manifest says how many steps there were; the cut ledger of one going on is just shorter."""
    lines = (run / NAME).read_text().splitlines()
    (run / NAME).write_text("\n".join(lines[:-1]) + "\n")
    assert run_command(COMMAND, [str(run)]) == 0
    (run / "manifest.json").write_text(json.dumps({"counts": {"steps": STEPS}}))
    assert run_command(COMMAND, [str(run)]) == 1
    assert "it holds 6 steps, the run has done 7" in capsys.readouterr().err


def test_other_keys_in_an_index_are_found(run: Path, folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index = folders / "a" / "train-000000.json"
    index.write_text(index.read_text().replace("0002", "0222"))
    assert run_command(COMMAND, [str(run)]) == 1
    assert "its digest is not" in capsys.readouterr().err


def test_a_folder_without_a_ledger_or_settings_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(COMMAND, [str(tmp_path)]) == 1
    assert "has no ledger.jsonl" in capsys.readouterr().err
    (tmp_path / NAME).write_text("")
    assert run_command(COMMAND, [str(tmp_path)]) == 1
    assert "settings.toml cannot be read" in capsys.readouterr().err
    (tmp_path / "settings.toml").write_text("seed = 1\n")
    assert run_command(COMMAND, [str(tmp_path)]) == 1
    assert "names no tokens or images" in capsys.readouterr().err
