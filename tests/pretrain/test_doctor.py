"""The doctor before a launch: what is well is told, each trouble named with what to do, and nothing is left behind."""

import json
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.checkpoint import SEAL
from cluster.checks import Finding
from cluster.command import run_command
from cluster.process import Launched, Place
from data_pipeline.bpe import open_vocabulary
from pretrain import doctor
from pretrain.doctor import COMMAND, DoctorConfig, data_here, disk_room, planned, run_folder
from pretrain.plan_machines import GIB, GPUS, kind_of
from tests.data_pipeline.token_folders import MADE_FROM, write_tokens
from tests.small import smalti

ROOT = Path(__file__).resolve().parents[2]
Found = dict[str, dict[str, str]]  # by what was looked at
ALL = [
    "rendezvous", "versions", "plan", "accelerators", "host memory", "open files", "/dev/shm", "extensions", "data",
    "run", "out", "disk", "clocks",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vocabulary, tokens made with it, and the same with a shard cut short, and with a byte changed."""
    folder = tmp_path_factory.mktemp("doctor")
    shutil.copytree(data / "vocab", folder / "vocab")
    made_from = MADE_FROM | {"vocab": open_vocabulary(folder / "vocab")[1]}
    write_tokens(folder / "good", [20, 20, 20], made_from=made_from)
    for name in ("cut", "flipped"):
        shutil.copytree(folder / "good", folder / name)
        shard = folder / name / "train-000001.tar"
        whole = bytearray(shard.read_bytes())
        whole[600] ^= 1
        shard.write_bytes(whole[:-512] if name == "cut" else whole)
    (folder / "runs").mkdir()
    return folder


@pytest.fixture(scope="module")
def cases(folder: Path) -> dict[str, Any]:
    """Of each case of doctor_job.py what four ranks found."""
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node=4", "--standalone"]
    command = [sys.executable, *launcher, "-m", "tests.pretrain.doctor_job", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads((folder / "cases.json").read_text())
    return found


def by_name(findings: list[dict[str, str]]) -> Found:
    return {one["what"]: one for one in findings}


def test_four_healthy_ranks_on_two_hosts_have_nothing_to_mend(cases: dict[str, Any]) -> None:
    found = by_name(cases["healthy"])
    assert list(found) == [*ALL, "bandwidth of shards", "bandwidth of replicas"]
    assert {one["state"] for one in found.values()} == {"ok"}
    assert "4 ranks on 2 hosts met at localhost port 1" in found["rendezvous"]["value"]
    assert "2 groups of 2 ranks" in found["plan"]["value"]
    assert "60 samples in 3 shards" in found["data"]["value"] and "alike on 2 hosts" in found["data"]["value"]
    assert "among 2 on a host" in found["bandwidth of shards"]["value"]
    assert "among 2 across hosts" in found["bandwidth of replicas"]["value"]


@pytest.mark.parametrize(
    ("case", "what", "words"),
    [
        ("version", "versions", ("numpy 1.0 on rank 2 (node1)", "the same numpy")),
        ("denied", "out", ("rank 3 (node1): Permission denied", "all hosts share")),
        ("not shared", "out", ("rank 1 (node0): it does not see", "all hosts share")),
        ("cut", "data", ("train-000001.tar has", "put back")),
        ("flipped", "digests", ("train-000001.tar holds other bytes", "put back")),
        ("full", "disk", ("0.00 GB free", "make room")),
        ("clock", "clocks", ("node1 is 90.0 s ahead of node0", "NTP")),
        ("batch", "plan", ("must be a multiple of 4", "change these")),
        ("settings", "versions", ("settings", "the same settings")),
    ],
)
def test_a_trouble_is_named_with_what_to_do_and_nothing_else_is(
    case: str, what: str, words: tuple[str, str], cases: dict[str, Any]
) -> None:
    found = by_name(cases[case])
    assert [name for name, one in found.items() if one["state"] == "fix"] == [what]
    assert words[0] in found[what]["value"] and words[1] in found[what]["advice"]


def test_links_slower_than_what_was_said_are_named(cases: dict[str, Any]) -> None:
    found = by_name(cases["slow"])
    fixes = [name for name, one in found.items() if one["state"] == "fix"]
    assert fixes == ["bandwidth of shards", "bandwidth of replicas"]
    assert "the plan assumes 750,000.00" in found["bandwidth of shards"]["value"]
    assert "the plan assumes 375,000.00" in found["bandwidth of replicas"]["value"]  # two rings leave a host together


def test_what_cannot_be_seen_without_a_plan_is_passed_over(cases: dict[str, Any]) -> None:
    found = by_name(cases["batch"])
    assert [name for name, one in found.items() if one["state"] == "skip"] == ["disk", "bandwidth"]
    assert "not known" in found["disk"]["value"]


def test_ranks_with_different_settings_do_not_go_on_together(cases: dict[str, Any]) -> None:
    assert [one["what"] for one in cases["settings"]] == ["rendezvous", "versions", "all else"]


def test_nothing_is_left_behind(cases: dict[str, Any]) -> None:
    assert cases["left"] == []


def words_of(folder: Path, tmp_path: Path) -> list[str]:
    return ["emoji", f"tokens={folder}/good", f"vocab={folder}/vocab", f"out={tmp_path}/run"]


def test_one_process_alone_is_examined_by_the_command(folder: Path, tmp_path: Path) -> None:
    done = smalti("doctor", *words_of(folder, tmp_path), "json=true", "deep=2")
    found = by_name([json.loads(line) for line in done.stdout.splitlines()])
    assert sorted(found) == sorted([*ALL, "digests", "bandwidth"])
    assert {name for name, one in found.items() if one["state"] == "skip"} == {"rendezvous", "clocks", "bandwidth"}
    assert "2 of 4 shards" in found["digests"]["value"] and "is new" in found["run"]["value"]
    assert not list(tmp_path.iterdir())


def test_what_must_be_mended_is_counted_in_the_exit_code(folder: Path, tmp_path: Path) -> None:
    words = words_of(folder, tmp_path)
    missing = smalti("doctor", *words, f"tokens={tmp_path}/none", "precision=fp32", check=False)
    assert missing.returncode == 1 and "1 of what was looked at must be mended" in missing.stderr
    line = next(line for line in missing.stdout.splitlines() if line.startswith("fix"))
    assert "none does not exist -> make it with `smalti tokenise`" in line


def test_a_run_that_has_begun_goes_on_or_is_refused_by_name(folder: Path, tmp_path: Path, place: Place) -> None:
    small = ["n_steps=4", "precision=fp32", "model.n_layers=1", "model.n_heads=1", "data.batch=4"]
    words = [*words_of(folder, tmp_path), *small]
    smalti("train", *words, "stop_after_minutes=1e-9", check=False)
    before = sorted(path.name for path in tmp_path.rglob("*"))

    def found(*more: str) -> Finding:
        run = COMMAND.settings([*words, *more]).train
        return run_folder(run, place, data_here(run))

    assert found().state == "ok" and "goes on from global_step1" in found().value
    assert found("optim.clip=0.5").state == "fix" and "optim.clip: 1.0 there, 0.5 here" in found("optim.clip=0.5").value
    assert found("optim.clip=0.5", "allow_change=optim.clip").state == "ok"
    assert found("resume=false").state == "fix" and "resume=false" in found("resume=false").value
    (tmp_path / "run" / "checkpoints" / "global_step1" / SEAL).write_text("{")
    assert found().state == "fix" and "damaged" in found().advice
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


def test_room_is_counted_for_all_checkpoints_that_are_kept(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = COMMAND.settings([*words_of(folder, tmp_path), "precision=fp32", "keep_last=3", "n_steps=10"]).train
    memory, _ = planned(run, 1)
    assert memory
    need = 4 * memory.checkpoint + 4 * memory.plan.numel
    monkeypatch.setattr(doctor, "free_bytes", lambda path: need)
    assert disk_room(run, memory).state == "ok"
    assert disk_room(replace(run, keep_every=5), memory).state == "fix"
    there = tmp_path / "run" / "checkpoints" / "global_step1" / "state.pt"
    there.parent.mkdir(parents=True)
    there.write_bytes(b"x" * 1000)
    monkeypatch.setattr(doctor, "free_bytes", lambda path: need - 1000)
    assert disk_room(run, memory).state == "ok"  # what is there will make room for what comes
    monkeypatch.setattr(doctor, "free_bytes", lambda path: need - 1001)
    assert disk_room(run, memory).state == "fix"


@pytest.mark.parametrize(("rank", "words"), [(0, "not all 2 ranks came"), (1, "nobody listens at 127.0.0.1 port")])
def test_a_rank_that_is_alone_at_the_rendezvous_says_where_it_waited(rank: int, words: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    told = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    environment = os.environ | {name: str(value) for name, value in told.items()}
    command = [sys.executable, "-m", "pretrain.doctor", "emoji", "timeout_seconds=3"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=60, cwd=ROOT, env=environment
    )  # fmt: skip
    assert done.returncode == 1 and "Traceback" not in done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("fix   rendezvous: rank")]
    assert words in line and f"127.0.0.1 port {port}" in line and " -> " in line


def test_a_rank_that_loses_the_others_says_so_in_one_line() -> None:
    said = "[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:8114. This is typically caused by"
    finding = doctor._cut_off(Launched(1, 2), True, said, 9.0)
    assert finding and finding.state == "fix" and finding.value.startswith("rank 1 on ")
    assert finding.value.endswith("lost the others (Connection closed by peer [127.0.0.1]:8114)")


def test_words_of_train_are_taken_and_wrong_ones_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    config: DoctorConfig = COMMAND.settings(["dalle-12b", "deep=3", "zero_shards=4", "--json"])
    assert (config.deep, config.json, config.train.zero_shards, config.train.json) == (3, True, 4, False)
    assert run_command(COMMAND, ["dalle-12b", "deeper=3"]) == 2
    assert "'deeper' does not exist; `smalti doctor` has: timeout_seconds" in capsys.readouterr().err


def test_a_gpu_is_known_by_its_name_and_memory() -> None:
    """As torch.cuda.get_device_properties tells them."""
    names = {
        "Tesla V100-SXM2-16GB": (15.77, "v100-16g"), "Tesla V100-SXM2-32GB": (31.74, "v100-32g"),
        "NVIDIA A100-SXM4-40GB": (39.39, "a100-40g"), "NVIDIA A100-SXM4-80GB": (79.15, "a100-80g"),
        "NVIDIA H100 80GB HBM3": (79.11, "h100-80g"), "NVIDIA H200": (139.72, "h200-141g"),
        "NVIDIA B200": (178.4, "b200"),
        "NVIDIA A100-PCIE-40GB": (39.39, None), "NVIDIA GH200 480GB": (94.5, None), "NVIDIA L4": (22.05, None),
    }  # fmt: skip
    assert {name: kind_of(name, int(gib * GIB)) for name, (gib, _) in names.items()} == {
        name: kind for name, (_, kind) in names.items()
    }
    assert {kind for _, kind in names.values() if kind} == set(GPUS)
