"""Preprocessing shared by tasks and ranks: killed, raced and rerun, the result is what one process gives."""

import dataclasses
import random
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from cluster.command import run_command
from cluster.manifest import FolderError, read_manifest, temporary
from cluster.settings import SettingError
from data_pipeline.convert import PreprocessConfig
from data_pipeline.filters import FilterConfig
from data_pipeline.merge import COMMAND as MERGE
from data_pipeline.merge import merge
from data_pipeline.preprocess import preprocess
from data_pipeline.shards import TEXT_BYTES
from tests.pairs import make_pairs, pair_members, tree, write_tar
from tests.processes import ended, in_child, run_ranks

JOIN_AND_DIE = """
import os
from cluster.process import meeting_place
with meeting_place(on_cpu=True):
    os._exit(9)
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine tars of five pairs."""
    folder = tmp_path_factory.mktemp("raw")
    for number in range(9):
        write_tar(folder / f"{number}.tar", pair_members(range(5 * number, 5 * number + 5)))
    return folder


def config_of(source: Path, out: Path, **changes: Any) -> PreprocessConfig:
    config = PreprocessConfig(
        source=str(source), out=str(out), image_side=16, image_format="png", heldout_fraction=0.2, vocab_size=300
    )
    return dataclasses.replace(config, **changes)


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Every file that one process writes."""
    out = tmp_path_factory.mktemp("whole")
    preprocess(config_of(source, out))
    return tree(out)


@pytest.mark.parametrize("tasks", [1, 2, 4, 8])
def test_tasks_give_the_bytes_of_one_process(source: Path, whole: dict[str, bytes], tmp_path: Path, tasks: int) -> None:
    for task in reversed(range(tasks)):
        preprocess(config_of(source, tmp_path, tasks=tasks, task=task))
    assert not (tmp_path / "vocab").exists() and not (tmp_path / "images" / "manifest.json").exists()
    merge(config_of(source, tmp_path, tasks=tasks))
    assert tree(tmp_path) == whole


def test_each_part_is_done_by_one_task(source: Path, tmp_path: Path) -> None:
    done: list[str] = []
    for task in range(4):
        preprocess(config_of(source, tmp_path / str(task), tasks=4, task=task))
        names = [path.name for path in (tmp_path / str(task) / "images").glob("*.done.json")]
        assert len(names) == (3 if task == 0 else 2)
        done += names
    assert sorted(done) == [f"train-{number:06d}.done.json" for number in range(9)]


@pytest.mark.parametrize("seed", range(6))
def test_a_task_killed_at_any_byte_and_rerun_gives_the_same_bytes(
    source: Path, whole: dict[str, bytes], tmp_path: Path, seed: int
) -> None:
    largest = max(len(content) for name, content in whole.items() if name.startswith("images/"))
    limit = random.Random(seed).randrange(largest)
    config = config_of(source, tmp_path, tasks=4, task=1)
    assert ended(in_child(lambda: preprocess(config), limit + 1)) == -signal.SIGXFSZ
    assert list((tmp_path / "images").glob("*.part"))
    for task in (0, 2, 3, 1):
        preprocess(dataclasses.replace(config, task=task))
    merge(config)
    assert tree(tmp_path) == whole


@pytest.mark.parametrize("round_", range(3))
def test_tasks_that_race_on_the_same_parts_give_the_same_bytes(
    source: Path, whole: dict[str, bytes], tmp_path: Path, round_: int
) -> None:
    configs = [config_of(source, tmp_path, tasks=2, task=task) for task in (0, 1, 0, 1, 0)]
    children = [in_child(lambda c=config: preprocess(c)) for config in configs]  # type: ignore[misc]
    children[-1].kill()
    assert [ended(child) for child in children[:-1]] == [0] * 4 and ended(children[-1]) in (0, -signal.SIGKILL)
    merge(configs[0])
    assert tree(tmp_path) == whole


def test_what_a_task_left_that_was_killed_after_another_had_done_its_part_is_swept_away(
    source: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    preprocess(config_of(source, tmp_path, tasks=1, task=0))
    temporary(tmp_path / "images" / "train-000001.tar").write_bytes(b"half")
    merge(config_of(source, tmp_path))
    assert tree(tmp_path) == whole


def test_a_task_after_the_end_changes_nothing(source: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    preprocess(config_of(source, tmp_path))
    preprocess(config_of(source, tmp_path, tasks=4, task=3))
    merge(config_of(source, tmp_path, tasks=4))
    assert tree(tmp_path) == whole


def test_a_gap_is_refused_by_name_and_with_the_command(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for task in (0, 2):
        preprocess(config_of(source, tmp_path, tasks=4, task=task))
    words = [f"source={source}", f"out={tmp_path}", "image_side=16", "image_format=png", "heldout_fraction=0.2",
             "vocab_size=300"]  # fmt: skip
    capsys.readouterr()
    assert run_command(MERGE, [*words, "tasks=4"]) == 1
    assert capsys.readouterr().err == (
        "smalti preprocess merge: 4 of 9 shards are not made: train-000001, train-000003, train-000005, train-000007; "
        "run `smalti preprocess` with the same words tasks=4 and task=1,3\n"
    )
    assert not (tmp_path / "images" / "manifest.json").exists()
    for task in (1, 3):
        preprocess(config_of(source, tmp_path, tasks=4, task=task))
    lost = next((tmp_path / "images").glob("train-000003.tar"))
    lost.write_bytes(lost.read_bytes()[:-512])
    with pytest.raises(FolderError, match="1 of 9 shards are not made: train-000003; .* task=3$"):
        merge(config_of(source, tmp_path, tasks=4))
    with pytest.raises(FolderError, match="9 of 9 shards are not made: train-000000, .* and 4 more; .* same words$"):
        merge(config_of(source, tmp_path / "nowhere"))


def test_one_process_finishes_what_tasks_left(source: Path, whole: dict[str, bytes], tmp_path: Path) -> None:
    preprocess(config_of(source, tmp_path, tasks=4, task=2))
    made = tmp_path / "images" / "train-000002.tar"
    before = made.stat().st_mtime_ns
    preprocess(config_of(source, tmp_path))
    assert tree(tmp_path) == whole and made.stat().st_mtime_ns == before


def test_a_source_that_changes_between_tasks_is_refused(tmp_path: Path) -> None:
    pairs = make_pairs(tmp_path / "in", 12)
    config = config_of(pairs, tmp_path / "out", samples_per_shard=5, tasks=2, task=0)
    preprocess(config)
    shutil.copy(pairs / "0000.png", pairs / "00000.png")
    with pytest.raises(FolderError, match="begun with a source of other files"):
        preprocess(dataclasses.replace(config, task=1))
    with pytest.raises(FolderError, match="begun with a source of other files"):
        merge(config)


@pytest.mark.parametrize(
    "changes", [{"image_side": 8}, {"heldout_fraction": 0.5}, {"filters": FilterConfig(min_words=2)}]
)
def test_merging_with_other_words_than_the_tasks_is_refused(
    source: Path, whole: dict[str, bytes], tmp_path: Path, changes: dict[str, Any]
) -> None:
    """Or the manifest would tell of settings that the shards were not made with."""
    preprocess(config_of(source, tmp_path, tasks=1, task=0))
    with pytest.raises(FolderError, match=r"images was begun with other settings; use another `out` or remove"):
        merge(config_of(source, tmp_path, tasks=1, **changes))
    assert not (tmp_path / "images" / "manifest.json").exists()
    merge(config_of(source, tmp_path, tasks=1))
    assert tree(tmp_path) == whole


def test_a_tar_that_was_cut_and_is_fetched_again_is_read_again(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = tmp_path / "raw"
    shutil.copytree(source, raw)
    intact = (raw / "4.tar").read_bytes()
    (raw / "4.tar").write_bytes(intact[: len(intact) // 2])
    config = config_of(raw, tmp_path / "out", tasks=1, task=0)
    preprocess(config)
    assert f"{raw / '4.tar'} is truncated" in capsys.readouterr().err
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "images").glob("*.done.json")}
    (raw / "4.tar").write_bytes(intact)
    with pytest.raises(FolderError, match="1 of 9 shards are not made: train-000004"):
        merge(config)
    preprocess(config)
    assert [path.name for path, at in made.items() if path.stat().st_mtime_ns != at] == ["train-000004.done.json"]
    merge(config)
    preprocess(config_of(raw, tmp_path / "whole"))
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_a_missing_tar_is_refused_by_tasks_and_merge(source: Path, tmp_path: Path) -> None:
    pattern = Path(f"{source}/{{0..9}}.tar")
    for stage, task in ((preprocess, 0), (merge, -1)):
        with pytest.raises(FolderError, match=r"9\.tar does not exist"):
            stage(config_of(pattern, tmp_path, tasks=2, task=task))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"tasks": -1}, "tasks=-1 must be at least 0"),
        ({"task": 0}, "task=0 must be from 0 to tasks-1"),
        ({"tasks": 4, "task": 4}, "task=4 must be from 0 to tasks-1"),
        ({"tasks": 4, "task": -2}, "task=-2 must be"),
    ],
)
def test_a_share_that_is_none_is_refused(source: Path, tmp_path: Path, changes: dict[str, int], said: str) -> None:
    with pytest.raises(SettingError, match=said):
        config_of(source, tmp_path, **changes)


def test_tasks_without_task_are_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="tasks=4 needs task=0 to task=3"):
        preprocess(config_of(source, tmp_path, tasks=4))
    assert not (tmp_path / "images").exists()


def module_words(source: Path, out: Path) -> list[str]:
    return ["-m", "data_pipeline.preprocess", f"source={source}", f"out={out}", "image_side=16", "image_format=png",
            "heldout_fraction=0.2", "vocab_size=300"]  # fmt: skip


def test_ranks_of_a_launch_share_the_work_and_rank_0_ends_it(
    source: Path, whole: dict[str, bytes], tmp_path: Path
) -> None:
    codes, said = run_ranks([module_words(source, tmp_path)] * 2)
    assert codes == [0, 0], said
    assert "5/5 shards" in said[0][1] and "4/4 shards" in said[1][1]
    assert "report in" in said[0][0] and not said[1][0]
    assert tree(tmp_path) == whole


def test_a_rank_that_dies_ends_the_others_with_a_line(source: Path, tmp_path: Path) -> None:
    codes, said = run_ranks([module_words(source, tmp_path), ["-c", JOIN_AND_DIE]])
    assert codes == [1, 9]
    assert said[0][1].splitlines()[-1].startswith("smalti preprocess: another process of this job ended before")
    with pytest.raises(FolderError, match="not a finished images folder"):
        read_manifest(tmp_path / "images", "images")


def test_a_rank_says_what_it_found_in_its_own_share(tmp_path: Path) -> None:
    """Rank 1's share has the text that is too large; rank 0 cannot know of it."""
    pairs = make_pairs(tmp_path / "in", 4)
    with (pairs / "0002.txt").open("wb") as file:
        file.truncate(TEXT_BYTES + 1)
    codes, said = run_ranks([[*module_words(pairs, tmp_path / "out"), "samples_per_shard=2"]] * 2)
    assert codes == [1, 1]
    found = f"{pairs}/0002.txt has {TEXT_BYTES + 1} bytes, more than {TEXT_BYTES}; remove it from {pairs}"
    assert said[1][1].splitlines()[-1] == f"smalti preprocess: {found}"
    assert "another process of this job ended before" in said[0][1].splitlines()[-1]
