"""A release from a checkpoint: the run's own weights, whatever wrote it, within the memory of a few tensors."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from cluster.checkpoint import Checkpoints
from cluster.command import run_command
from cluster.manifest import read_manifest
from cluster.process import Place
from cluster.weights import INDEX
from data_pipeline.bpe import open_vocabulary
from pretrain.config import TransformerConfig
from pretrain.export import COMMAND
from pretrain.model import Sizes, Transformer
from pretrain.sample import open_transformer
from pretrain.weight_files import write_weights
from tests.pretrain.zero_files import write_zero
from tests.small import smalti

SHAPE = {"n_text": 8, "n_layers": 2, "n_heads": 2, "d_head": 8}
SIZES = Sizes(text_vocab=320, codebook=64, grid=4)
STEPS = (5, 7)


def model_of(step: int) -> Transformer:
    torch.manual_seed(step)
    model = Transformer(TransformerConfig(**SHAPE), SIZES)
    torch.nn.init.normal_(model.image_head.weight)  # zero at the start
    return model


def make_run(folder: Path, place: Place, vocab: Path, stage: int = 3, average: bool = False) -> Path:
    """A run folder with checkpoints as DeepSpeed leaves them, settings and metrics."""
    checkpoints = Checkpoints(folder / "checkpoints", place, 9)
    made_from = {"vocab": open_vocabulary(vocab)[1], "tokens": "a" * 64, "dvae": "d" * 64}
    for step in STEPS:
        weights = {name: p.detach() for name, p in model_of(step).named_parameters()}
        names = list(weights)
        groups = [{name: weights[name] for name in part} for part in (names[::2], names[1::2])]

        def write(part: Path, tag: str, groups: Any = groups) -> None:
            write_zero(part / tag, groups, stage, 3, average)

        about = {"settings": {"model": SHAPE, "caption_dropout": 0.1, "optim": {"lr": 0.1}}, "made_from": made_from}
        assert checkpoints.save(step, about, write)
    (folder / "settings.toml").write_text(f'vocab = "{vocab}"\ntokens = "gone"\n')
    records = [{"step": step, "train/loss": 10.0 - step, "perf/step_seconds": 1.0} for step in range(9)]
    records += [{"step": 3, "val/image_loss": 4.0}, {"step": 6, "val/image_loss": 3.5}, {"step": 8, "val/loss": 1.0}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


@pytest.fixture
def vocab(data: Path) -> Path:
    return data / "vocab"


@pytest.fixture
def run(tmp_path: Path, place: Place, vocab: Path) -> Path:
    return make_run(tmp_path / "run", place, vocab)


def export(run: Path, out: Path, *words: str) -> int:
    return run_command(COMMAND, [str(run), f"out={out}", *words])


def weights_of(folder: Path) -> dict[str, Tensor]:
    index = folder / INDEX
    files = set(json.loads(index.read_text())["weight_map"].values()) if index.is_file() else {"model.safetensors"}
    found: dict[str, Tensor] = {}
    for name in files:
        found |= load_file(folder / name)
    return found


def same(found: dict[str, Tensor], model: Transformer) -> bool:
    wanted = dict(model.named_parameters())
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_newest_checkpoint_is_released_from_any_stage(
    stage: int, tmp_path: Path, place: Place, vocab: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = make_run(tmp_path / "run", place, vocab, stage), tmp_path / "out"
    assert export(run, out) == 0, capsys.readouterr().err
    assert same(weights_of(out), model_of(7))
    with safe_open(out / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"} and list(file.keys()) == sorted(weights_of(out))
    assert json.loads((out / "config.json").read_text()) == {
        "model_type": "smalti-transformer", **SHAPE, "conv_kernel": 11, "conv_half_window": False,
        "text_vocab": 320, "codebook": 64, "grid": 4,
    }  # fmt: skip
    assert open_vocabulary(out / "vocab")[1] == open_vocabulary(vocab)[1]


def test_sampling_reads_a_release(run: Path, tmp_path: Path) -> None:
    """The same logits as the model that was trained."""
    export(run, tmp_path / "out", "step=5")
    model, manifest = open_transformer(tmp_path / "out", torch.device("cpu"), torch.float32)
    text, image = torch.arange(7).expand(2, 7), torch.arange(32).view(2, 16)
    want = model_of(5).eval().pack()(text, image)
    assert all(torch.equal(a, b) for a, b in zip(model(text, image), want, strict=True))
    assert manifest.counts["steps"] == 5 and manifest.settings["caption_dropout"] == 0.1
    assert manifest.made_from["dvae"] == "d" * 64


def test_a_large_release_is_split_with_an_index(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert export(run, out, "file_gb=2e-5") == 0
    index = json.loads((out / INDEX).read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert not (out / "model.safetensors").exists()
    assert same(weights_of(out), model_of(7))
    for name in files:
        tensors = load_file(out / name)
        assert sum(tensor.nbytes for tensor in tensors.values()) <= 20_000 or len(tensors) == 1
        assert all(index["weight_map"][weight] == name for weight in tensors)
    assert index["metadata"]["total_size"] == sum(p.nbytes for p in model_of(7).parameters())
    assert {*files, INDEX} <= read_manifest(out, "transformer").files.keys()
    assert open_transformer(out, torch.device("cpu"), torch.float32)[1].counts["steps"] == 7


def test_bf16_is_the_rounded_weights_in_half_the_space(run: Path, tmp_path: Path) -> None:
    assert export(run, tmp_path / "out", "dtype=bf16") == 0
    found = weights_of(tmp_path / "out")
    wanted = dict(model_of(7).named_parameters())
    assert all(found[name].dtype == torch.bfloat16 for name in wanted)
    assert all(torch.equal(found[name], wanted[name].bfloat16()) for name in wanted)


def test_the_average_is_released_if_there_is_one(
    tmp_path: Path, place: Place, vocab: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    averaged = make_run(tmp_path / "averaged", place, vocab, average=True)
    assert export(averaged, tmp_path / "auto") == 0 and export(averaged, tmp_path / "plain", "weights=trained") == 0
    plain = weights_of(tmp_path / "plain")
    assert same(plain, model_of(7))
    assert all(torch.equal(-tensor, plain[name]) for name, tensor in weights_of(tmp_path / "auto").items())
    assert read_manifest(tmp_path / "auto", "transformer").counts["weights"] == "average"
    assert export(run, tmp_path / "none", "weights=average") == 1
    assert "has no average" in capsys.readouterr().err


def test_the_card_tells_what_is_known(run: Path, tmp_path: Path) -> None:
    export(run, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: smalti\n")
    n_parameters = sum(p.numel() for p in model_of(7).parameters())
    for words in (
        "after 7 updates", f"{n_parameters:,} parameters in fp32", "4x4 codes", "| val/image_loss | 3.5 |",
        "| train/loss | 4 |", "more than 7 tokens are refused", "fingerprint of dvae = " + "d" * 64, "optim.lr = 0.1",
        "Samples: not known any more", "`cfg_scale` works",
    ):  # fmt: skip
        assert words in card, words
    assert "val/loss" not in card  # measured after this checkpoint


def test_an_export_can_be_killed_and_run_again_and_spares_what_is_finished(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "model.safetensors.part").write_bytes(b"cut")
    assert export(run, out) == 0 and not list(out.glob("*.part"))
    before = (out / "model.safetensors").stat().st_mtime_ns
    assert export(run, out) == 0 and "finished already" in capsys.readouterr().out
    assert (out / "model.safetensors").stat().st_mtime_ns == before
    assert export(run, out, "step=5") == 1 and "holds another run or release" in capsys.readouterr().err
    assert export(run, run) == 1 and "folder of a run" in capsys.readouterr().err
    assert not (run / "manifest.json").exists()


def test_what_does_not_fit_is_refused_in_words(
    run: Path, tmp_path: Path, place: Place, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert export(run, tmp_path / "out", "step=6") == 1
    assert "no checkpoint of step 6" in capsys.readouterr().err
    other = tmp_path / "other"
    other.mkdir()
    (other / "bpe.model").write_bytes((data / "vocab" / "bpe.model").read_bytes())
    manifest = json.loads((data / "vocab" / "manifest.json").read_text()) | {"fingerprint": "other"}
    (other / "manifest.json").write_text(json.dumps(manifest))
    assert export(run, tmp_path / "out", f"vocab={other}") == 1
    assert "not the vocabulary that the run was trained with" in capsys.readouterr().err
    assert export(run, tmp_path / "out", "file_gb=0") == 2
    newest = run / "checkpoints" / "global_step7"
    (newest / "zero_pp_rank_1_mp_rank_00_optim_states.pt").write_bytes(b"cut")
    assert export(run, tmp_path / "out") == 0
    told = capsys.readouterr()
    assert "passing over" in told.err and "step 5" in told.out and same(weights_of(tmp_path / "out"), model_of(5))


def test_a_tensor_of_another_shape_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a has shape"):
        write_weights(tmp_path, {"a": (2, 3)}, torch.float32, 10**9, lambda name: torch.zeros(3, 2))
    assert not (tmp_path / "model.safetensors").exists()


PEAK = """
import re, sys, torch
from pathlib import Path
torch.set_num_threads(1)
from pretrain import engine_files
from pretrain.engine_files import EngineFiles
from pretrain.weight_files import write_weights
engine_files.MAPPED_BYTES = 8 * 2**20
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024
files = EngineFiles(Path(sys.argv[1]))
files.tensor(files.names[0])
before = peak()
write_weights(Path(sys.argv[2]), {n: files.shape(n) for n in files.names}, torch.float32, 10**9, files.tensor)
print(peak() - before)
"""


@pytest.mark.parametrize("stage", [1, 3])
def test_memory_is_that_of_a_few_tensors(stage: int, tmp_path: Path) -> None:
    """128 MiB of weights and as much of moments in tensors of 4 MiB, read through mappings of at most 8 MiB each."""
    group = {f"weight{number}": torch.full((1024, 1024), float(number)) for number in range(32)}
    (tmp_path / "step").mkdir()
    write_zero(tmp_path / "step", [{"first": torch.ones(4)}, group], stage, 2)
    words = [sys.executable, "-c", PEAK, str(tmp_path / "step"), str(tmp_path)]
    settings = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    settings["MALLOC_MMAP_THRESHOLD_"] = str(2**20)  # freed memory goes back at once, as that of large tensors does
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, env=settings, check=True)
    # the tensor: 4 MiB; of each of two ranks what was read before its mapping is closed: 4 and half a tensor: 12 MiB
    assert float(done.stdout) < 1.5 * 16
    assert torch.equal(load_file(tmp_path / "model.safetensors")["weight31"], group["weight31"])


@pytest.fixture(scope="module")
def trained(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """A run of `smalti train` on two ranks, its release by `checkpoint export`, and what that said."""
    folder = tmp_path_factory.mktemp("trained")
    words = [f"tokens={tiny}/data/tokens", f"vocab={tiny}/data/vocab", "zero_stage=3", f"out={folder}/run"]
    launch = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "-m", "pretrain.train"]
    done = subprocess.run(
        [sys.executable, *launch, *TRAIN, *words], capture_output=True, text=True, timeout=150, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    made = [sys.executable, "-m", "pretrain.export", f"{folder}/run", f"out={folder}/release"]
    done = subprocess.run(made, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "run", folder / "release", done.stdout


TRAIN = [
    "emoji", "n_steps=4", "precision=fp32", "model.n_layers=2", "model.n_heads=2", "model.d_head=16",
    "data.batch=8", "evaluate_every=4", "save_every=2", "optim.warmup_steps=2",
]  # fmt: skip


def test_a_release_of_the_last_checkpoint_is_that_of_the_run(trained: tuple[Path, Path, str]) -> None:
    run, release, said = trained
    want, got = weights_of(run), weights_of(release)
    assert want.keys() == got.keys() and all(torch.equal(want[name], got[name]) for name in want)
    assert json.loads((run / "config.json").read_text()) == json.loads((release / "config.json").read_text())
    assert re.search(r"step 4 of .*run, trained weights in fp32: model.safetensors", said)
    assert re.search(r"Samples: train: \d+; heldout: \d+\.", (release / "README.md").read_text())


def test_pictures_drawn_from_a_release_are_those_of_the_run(
    trained: tuple[Path, Path, str], tiny: Path, tmp_path: Path
) -> None:
    run, release, _ = trained
    for name, folder, vocab in (("a", run, tiny / "data" / "vocab"), ("b", release, release / "vocab")):
        smalti(
            "sample", "captions=a red heart", "candidates=2", f"model={folder}", f"dvae={tiny}/runs/dvae",
            f"vocab={vocab}", f"out={tmp_path / name}", "precision=fp32",
        )  # fmt: skip
    pictures = sorted((tmp_path / "a").glob("0000/*.png"))
    assert len(pictures) == 2
    for picture in pictures:  # in their text chunks they name other folders as their origin
        with Image.open(picture) as ours, Image.open(tmp_path / "b" / "0000" / picture.name) as theirs:
            assert np.array_equal(np.asarray(ours), np.asarray(theirs))
