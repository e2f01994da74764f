"""DeepSpeed's checkpoint files, read by name and brought back on every other layout, bit for bit."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cluster.manifest import FolderError
from pretrain import engine_files
from pretrain.engine_files import AVERAGE, WEIGHT, EngineFiles, Span
from tests.pretrain.zero_files import MOMENTS, STEP, Group, moment, write_zero

JOB = Path(__file__).with_name("engine_job.py")
LAYOUTS = [f"stage {stage} on {shards}" for stage in (1, 2, 3) for shards in (1, 2, 4)]
RESUMED = [
    *(f"stage {stage} in {precision}, smalti restores" for stage in (1, 2, 3) for precision in ("fp32", "bf16")),
    *(f"stage {stage} in bf16, DeepSpeed restores" for stage in (1, 2, 3)),
    *(f"stage {stage}, a group without an update" for stage in (1, 2, 3)),
]


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], list[str]]:
    """What went wrong in each case of engine_job.py, by kind and name: nothing, if it is right."""
    folder = tmp_path_factory.mktemp("job")
    words = ["-m", "torch.distributed.run", "--nproc-per-node=4", "--standalone", str(JOB), str(folder)]
    settings = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(JOB.parents[2])}
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=400, env=settings)
    assert done.returncode == 0, done.stderr[-3000:]
    return {(case["kind"], case["name"]): case["wrong"] for case in json.loads((folder / "cases.json").read_text())}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["read", "details", "average"])
def test_what_deepspeed_wrote_is_read_by_name(cases: dict[tuple[str, str], list[str]], kind: str, layout: str) -> None:
    assert cases[kind, layout] == []


@pytest.mark.parametrize("layout", LAYOUTS)
def test_deepspeeds_own_tool_reads_what_the_snapshot_wrote(
    cases: dict[tuple[str, str], list[str]], layout: str
) -> None:
    assert cases["zero_to_fp32", layout] == []


@pytest.mark.parametrize("there", LAYOUTS)
@pytest.mark.parametrize("here", LAYOUTS)
def test_every_layout_restores_every_other_one(cases: dict[tuple[str, str], list[str]], there: str, here: str) -> None:
    """Weights, what the model computes with, int16 and bf16 moments, average and step counts: to the last bit."""
    assert cases["restore", f"{there} -> {here}"] == []
    assert cases["goes on", f"{there} -> {here}"] == []


@pytest.mark.parametrize("name", RESUMED)
def test_a_restored_run_goes_on_bit_for_bit(cases: dict[tuple[str, str], list[str]], name: str) -> None:
    assert cases["bit for bit", name] == []


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


GROUPS: list[Group] = [
    {"a.weight": random(5, 3), "a.bias": random(7)},
    {"b.weight": random(4, 4), "b.scale": random(1), "b.long": random(129)},
]


def written(folder: Path, stage: int, n_ranks: int, average: bool = False) -> EngineFiles:
    folder.mkdir()
    write_zero(folder, GROUPS, stage, n_ranks, average)
    return EngineFiles(folder)


def parameters() -> Iterator[tuple[int, str, Tensor]]:
    return ((number, name, weight) for number, group in enumerate(GROUPS) for name, weight in group.items())


@pytest.mark.parametrize("n_ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_weights_states_and_averages_are_whole_and_of_their_own_dtype(tmp_path: Path, stage: int, n_ranks: int) -> None:
    files = written(tmp_path / "step", stage, n_ranks, average=True)
    assert (
        files.stage == stage and files.n_ranks == n_ranks and files.has_average() and files.caller == {"note": "ours"}
    )
    assert files.names == [name for _, name, _ in parameters()]
    for number, name, weight in parameters():
        assert torch.equal(files.tensor(name), weight) and torch.equal(files.tensor(name, AVERAGE), -weight)
        assert files.keys(name) == (list(MOMENTS) if number else [])
        assert files.scalars(name) == {"step": torch.tensor(STEP)}
        for key in files.keys(name):
            read = files.tensor(name, key)
            assert read.dtype == MOMENTS[key] and torch.equal(read, moment(weight, key))


@pytest.mark.parametrize("stage", [1, 3])
def test_any_part_of_a_parameter_can_be_read(tmp_path: Path, stage: int) -> None:
    files = written(tmp_path / "step", stage, 3)
    want = GROUPS[1]["b.long"]
    for start in range(0, 129, 16):
        for stop in (start, start + 1, 77, 129):
            if stop >= start:
                assert torch.equal(files.read("b.long", WEIGHT, start, stop), want[start:stop])


def test_pieces_tell_where_each_element_lies() -> None:
    """Against the definition, element by element."""
    for span in (Span((11,), 0, 3, 4, True), Span((11,), 0, 5, 4, False)):
        for start in range(12):
            for stop in range(start, 12):
                found = [(rank, at + i) for rank, at, count in span.pieces(start, stop) for i in range(count)]
                if span.whole_group:
                    want = [((3 + i) // 4, (3 + i) % 4) for i in range(start, stop)]
                else:
                    want = [(i // 4, 5 + i % 4) for i in range(start, stop)]
                assert found == want


def test_mappings_are_closed_and_opened_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = written(tmp_path / "step", 1, 2)
    loads = []
    real = torch.load

    def counted(path: Path, **words: object) -> object:
        loads.append(path)
        return real(path, **words)  # type: ignore[arg-type]

    monkeypatch.setattr(torch, "load", counted)
    files.tensor("b.long")
    assert len(loads) == 1  # the other rank's; this one is open
    monkeypatch.setattr(engine_files, "MAPPED_BYTES", 0)
    for _ in range(3):
        assert torch.equal(files.tensor("b.long"), GROUPS[1]["b.long"])
    assert len(loads) >= 5


def test_what_is_read_is_not_tied_to_the_file(tmp_path: Path) -> None:
    files = written(tmp_path / "step", 3, 2)
    files.tensor("a.bias").zero_()
    assert torch.equal(files.tensor("a.bias"), GROUPS[0]["a.bias"])


def test_a_folder_that_cannot_be_read_is_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(FolderError, match="no checkpoint of DeepSpeed's"):
        EngineFiles(tmp_path)
    written(tmp_path / "missing", 1, 3)
    (tmp_path / "missing" / "zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    with pytest.raises(FolderError, match="of 2 ranks, not of 3"):
        EngineFiles(tmp_path / "missing")
    written(tmp_path / "cut", 1, 1)
    os.truncate(tmp_path / "cut" / "zero_pp_rank_0_mp_rank_00_optim_states.pt", 900)
    with pytest.raises(FolderError, match="cannot be read"):
        EngineFiles(tmp_path / "cut")
    (tmp_path / "none").mkdir()
    torch.save({"param_shapes": None, "module": {}}, tmp_path / "none" / "mp_rank_00_model_states.pt")
    with pytest.raises(FolderError, match="stage 1, 2 or 3"):
        EngineFiles(tmp_path / "none")


class Loud:
    """What a stranger might put into a file: unpickling it would run code."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("loud",)


def test_a_file_cannot_run_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "step", 1, 1)
    torch.save(Loud(), tmp_path / "step" / "mp_rank_00_model_states.pt")
    with pytest.raises(FolderError, match="cannot be read"):
        EngineFiles(tmp_path / "step")
    assert not (tmp_path / "loud").exists()


def test_parameters_of_another_model_are_named(tmp_path: Path) -> None:
    files = written(tmp_path / "step", 1, 2)
    wanted = {name: tuple(weight.shape) for _, name, weight in parameters()}
    files.refuse_others(wanted)
    with pytest.raises(FolderError, match=r"in 1 parameters \(a.bias is \(7,\) there and \(8,\) here"):
        files.refuse_others(wanted | {"a.bias": (8,)})
    with pytest.raises(FolderError, match=r"more is missing there and \(2,\) here"):
        files.refuse_others(wanted | {"more": (2,)})
