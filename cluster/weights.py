"""Model weights in files: the release (`model.safetensors`) and a one-process training state.

Nothing is unpickled from a file that smalti did not write: releases are safetensors, states load
with weights_only.
"""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cluster.manifest import FolderError

WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"  # of a release in several files, as on the Hugging Face Hub
STATE = "state.pt"


def save_weights(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Write the release of a run folder."""
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS)


def load_weights(folder: Path, model: nn.Module) -> None:
    """Fill `model` from a run folder's release; FolderError if the file is damaged or of another shape."""
    path = folder / (INDEX if (folder / INDEX).is_file() else WEIGHTS)
    try:
        names = set(json.loads(path.read_text())["weight_map"].values()) if path.name == INDEX else {WEIGHTS}
        found = {name: tensor for file in sorted(names) for name, tensor in load_file(folder / file).items()}
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise FolderError(f"{path} cannot be read: {error}") from None
    wanted = model.state_dict()
    every = sorted(found.keys() | wanted.keys())
    wrong = [name for name in every if _shape(found.get(name)) != _shape(wanted.get(name))]
    if wrong:
        first = f"{wrong[0]} is {_shape(found.get(wrong[0]))} there and {_shape(wanted.get(wrong[0]))} here"
        raise FolderError(
            f"{path} does not fit its settings in {len(wrong)} of {len(every)} weights ({first}): "
            "it was changed, or another version of smalti wrote it; train again, or use that version"
        )
    model.load_state_dict(found)


def _shape(tensor: Tensor | None) -> str:
    return "missing" if tensor is None else str(tuple(tensor.shape))


def save_state(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Write what a one-process run needs to go on into a checkpoint folder."""
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, folder / STATE)


def load_state(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """The inverse of `save_state`."""
    state = torch.load(folder / STATE, map_location=device, weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
