"""A checkpoint of a run -> a release: weights as safetensors, configuration, tokenizer, model card.

    smalti checkpoint export runs/train out=released               the newest checkpoint that verifies
    smalti checkpoint export runs/train step=500 dtype=bf16        another one, in half the space

Works on any ZeRO stage and number of ranks, on a CPU, while the run goes on or after it was given up; needs the
memory of the largest parameter. `smalti sample model=released vocab=released/vocab` draws with it.
"""

import shutil
import sys
import tomllib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from cluster.checkpoint import Checkpoint, find_checkpoint
from cluster.command import Command, run_command
from cluster.manifest import NAME, FolderError, read_manifest, write_bytes, write_json, write_manifest
from cluster.metrics import read_metrics
from cluster.settings import SettingError, from_dict, setting
from data_pipeline.bpe import MODEL_NAME, open_vocabulary
from pretrain.config import TransformerConfig
from pretrain.engine_files import AVERAGE, WEIGHT, EngineFiles
from pretrain.model import Sizes, Transformer
from pretrain.model_card import Card, card_text
from pretrain.weight_files import Shapes, write_weights

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CONFIG, CARD, VOCAB = "config.json", "README.md", "vocab"


@dataclass(frozen=True)
class ExportConfig:
    """What is read and written."""

    run: str = setting("runs/train", "run of `smalti train`, finished or not (first plain word)")
    out: str = setting("released", "folder to write")
    step: int = setting(-1, "checkpoint to take, by its step; -1: the newest that verifies")
    weights: Literal["auto", "trained", "average"] = setting("auto", "auto: the average, if the run keeps one")
    dtype: Literal["fp32", "bf16"] = setting("fp32", "fp32: the weights that are updated; bf16: rounded")
    vocab: str = setting("", "the BPE; empty: where the run read it")
    file_gb: float = setting(5.0, "largest size of a file of weights, in 10^9 bytes; more go into several")

    def __post_init__(self) -> None:
        if self.file_gb <= 0:
            raise SettingError(f"file_gb={self.file_gb} must be above 0")


def export(config: ExportConfig) -> None:
    """Run the stage; see the module's text."""
    run, out = Path(config.run), Path(config.out)
    source = find_checkpoint(run, config.step)
    files = EngineFiles(source.folder)
    if config.weights == "average" and not files.has_average():
        raise FolderError(f"{source.folder} has no average of the weights: use weights=trained")
    weights = "average" if config.weights != "trained" and files.has_average() else "trained"
    made = {"steps": source.step, "weights": weights, "dtype": config.dtype}
    if _is_there(out, made, source):
        print(f"{out}: finished already")
        return
    asked = _asked_of(run)
    vocab = _vocabulary(Path(config.vocab or asked.get("vocab", "")), source)
    model = from_dict(TransformerConfig, source.about["settings"]["model"])
    sizes = sizes_of(files)
    shapes = _shapes(model, sizes, files)
    measured = _measured(run, source.step)

    def tensor(name: str) -> Tensor:
        return files.tensor(name, AVERAGE if weights == "average" else WEIGHT)

    out.mkdir(parents=True, exist_ok=True)
    names = write_weights(out, shapes, DTYPES[config.dtype], int(config.file_gb * 1e9), tensor)
    write_json(out / CONFIG, {"model_type": "smalti-transformer", **asdict(model), **asdict(sizes)})
    (out / VOCAB).mkdir(exist_ok=True)
    for name in (MODEL_NAME, NAME):
        shutil.copyfile(vocab / name, out / VOCAB / name)
    card = Card(
        model, sizes, sum(torch.Size(shape).numel() for shape in shapes.values()), source.step, weights, config.dtype,
        source.about["settings"], source.about["made_from"], _data(Path(asked.get("tokens", "")), source), measured,
    )  # fmt: skip
    write_bytes(out / CARD, card_text(card, out).encode())
    there = [*names, CONFIG, CARD, f"{VOCAB}/{MODEL_NAME}", f"{VOCAB}/{NAME}"]
    write_manifest(out, "transformer", source.about["settings"], made | measured, there, source.about["made_from"])
    print(f"{out}: step {source.step:,} of {run}, {weights} weights in {config.dtype}: {', '.join(names)}")


def sizes_of(files: EngineFiles) -> Sizes:
    """What the data decided of the model's shape, from the shapes of its embeddings."""
    names = ("text_token.weight", "image_token.weight", "row.weight")
    missing = [name for name in names if name not in files.names]
    if missing:
        raise FolderError(f"{files.folder} has no {missing[0]}: it is no checkpoint of `smalti train`")
    text_vocab, codebook, grid = (files.shape(name)[0] for name in names)
    return Sizes(text_vocab, codebook, grid)


def _shapes(config: TransformerConfig, sizes: Sizes, files: EngineFiles) -> Shapes:
    """The model's parameters in its order; FolderError if the checkpoint has others."""
    with torch.device("meta"):
        model = Transformer(config, sizes)
    wanted = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    files.refuse_others(wanted)
    return wanted


def _is_there(out: Path, made: dict[str, Any], source: Checkpoint) -> bool:
    """True if `out` is this release, finished; FolderError if it is something else that is finished."""
    if (out / "checkpoints").exists():
        raise FolderError(f"{out} is the folder of a run; a release goes into another `out`")
    if not (out / NAME).is_file():
        return False
    there = read_manifest(out, "transformer")
    same = all(there.counts.get(key) == value for key, value in made.items())
    if same and there.settings == source.about["settings"] and there.made_from == source.about["made_from"]:
        return True
    raise FolderError(f"{out} holds another run or release; name another `out`, or remove it")


def _asked_of(run: Path) -> dict[str, Any]:
    """What the run's command said, paths included."""
    path = run / "settings.toml"
    return tomllib.loads(path.read_text()) if path.is_file() else {}


def _vocabulary(folder: Path, source: Checkpoint) -> Path:
    """The folder, if it is the vocabulary of the run; FolderError otherwise."""
    if open_vocabulary(folder)[1] != source.about["made_from"]["vocab"]:
        raise FolderError(f"{folder} is not the vocabulary that the run was trained with; name that one with vocab=")
    return folder


def _data(folder: Path, source: Checkpoint) -> dict[str, int]:
    """Counts of the token shards; nothing if they are no longer where the run read them, or are others now."""
    try:
        tokens = read_manifest(folder, "tokens")
    except FolderError:
        return {}
    counts = {name: value for name, value in tokens.counts.items() if name in ("train", "heldout")}
    return counts if tokens.fingerprint == source.about["made_from"]["tokens"] else {}


def _measured(run: Path, step: int) -> dict[str, float]:
    """The last value, up to a step, of each loss that was measured."""
    values: dict[str, float] = {}
    for record in read_metrics(run):
        if record["step"] < step:
            values |= {tag: value for tag, value in record.items() if tag == "train/loss" or tag.startswith("val/")}
    return {tag: values[tag] for tag in sorted(values)}


COMMAND = Command(
    "checkpoint export", ExportConfig, Path(__file__).parent / "configs" / "export", export, __doc__, plain=("run",)
)

if __name__ == "__main__":
    sys.exit(run_command(COMMAND, sys.argv[1:]))
