"""The published dVAE of Ramesh et al. 2021 (the PyPI package `dall-e`) and ours: names and shapes of the weights.

The two files, encoder.pkl and decoder.pkl, are whole pickled modules of classes in dall_e.encoder,
dall_e.decoder and dall_e.utils (released code, encoder.py and decoder.py). Their dicts of tensors
under the same names (`module.state_dict()` through torch.save) are read as well, and are what is
written: they need no unpickling of classes, so every version of torch loads them.
"""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from cluster.settings import SettingError, UserError
from dvae.config import DvaeConfig
from dvae.model import Dvae
from dvae.pickled import Pickled, Stored, Thing, damage_named, read_pickled

Part = Literal["encoder", "decoder"]
CLASS_OF = {"encoder": "dall_e.encoder.Encoder", "decoder": "dall_e.decoder.Decoder"}
OBJECTS = frozenset((
    *CLASS_OF.values(), "dall_e.encoder.EncoderBlock", "dall_e.decoder.DecoderBlock", "dall_e.utils.Conv2d",
    "torch.nn.modules.container.Sequential", "torch.nn.modules.activation.ReLU",
    "torch.nn.modules.linear.Identity", "torch.nn.modules.pooling.MaxPool2d",
    "torch.nn.modules.upsampling.Upsample",
))  # fmt: skip
N_GROUPS = 4  # fixed in the released code
INPUT = "blocks.input.w"  # 7x7 in the encoder, 1x1 in the decoder
MAX_THINGS = 10_000  # objects in a file; one that holds itself would have no end


def read_published(encoder: Path, decoder: Path, image_side: int) -> tuple[DvaeConfig, dict[str, Tensor]]:
    """Shape and weights (a state dict of `Dvae`, float32) of the two files, for pictures of that side.

    UserError naming the file: if it needs anything but known classes, is cut, is not that part, or
    holds weights of other names or shapes.
    """
    files: dict[Part, Pickled] = {
        "encoder": read_pickled(encoder, OBJECTS),
        "decoder": read_pickled(decoder, OBJECTS),
    }
    weights = {part: _weights(part, file) for part, file in files.items()}
    width, n_init = weights["encoder"][INPUT].shape[0], weights["decoder"][INPUT].shape[0]
    n_blocks = sum(f"blocks.group_1.block_{b + 1}.res_path.conv_1.w" in weights["encoder"] for b in range(100))
    try:
        config = DvaeConfig(
            image_side=image_side, fold=1, width=width, n_groups=N_GROUPS, n_blocks=n_blocks, n_init=n_init,
            codebook=weights["decoder"][INPUT].shape[1],
        )  # fmt: skip
    except SettingError as error:
        raise UserError(f"{encoder} and {decoder} do not fit: {error}") from None
    with damage_named(encoder), torch.device("meta"):  # sizes beyond all tensors are damage too
        model = Dvae(config)
    state: dict[str, Tensor] = {}
    for part, file in files.items():
        parameters = dict(getattr(model, part).named_parameters())
        shapes = {published_name(name): tuple(parameter.shape) for name, parameter in parameters.items()}
        _refuse_other_shapes(file, weights[part], shapes)
        _refuse_other_gain(file, 1 / (config.n_groups * config.n_blocks) ** 2)
        state |= {f"{part}.{name}": file.tensor(weights[part][published_name(name)]) for name in parameters}
    return config, state


def published_bytes(model: Dvae) -> dict[Part, bytes]:
    """Both parts' weights under the published names, as files of torch.save.

    UserError if the model is not of the published form: four groups and no folded pixels.
    """
    config = model.config
    if config.fold != 1 or config.n_groups != N_GROUPS:
        raise UserError(
            f"the dall-e package has model.fold=1 and model.n_groups={N_GROUPS}; "
            f"this dVAE has {config.fold} and {config.n_groups}"
        )
    return {"encoder": _saved(model.encoder), "decoder": _saved(model.decoder)}


def published_name(ours: str) -> str:
    """groups.0.1.convs.2.weight -> blocks.group_1.block_2.res_path.conv_3.w"""
    *path, kind = ours.split(".")
    match path:
        case ["stem"] | ["embed"]:
            place = "input"
        case ["head"]:
            place = "output.conv"
        case ["groups", group, block, "skip"]:
            place = f"group_{int(group) + 1}.block_{int(block) + 1}.id_path"
        case ["groups", group, block, "convs", conv]:
            place = f"group_{int(group) + 1}.block_{int(block) + 1}.res_path.conv_{int(conv) + 1}"
        case _:
            raise ValueError(f"{ours} has no published name")
    return f"blocks.{place}.{kind[0]}"


def _saved(module: torch.nn.Module) -> bytes:
    out = io.BytesIO()
    tensors = {published_name(name): value.detach().cpu().contiguous() for name, value in module.named_parameters()}
    torch.save(tensors, out)
    return out.getvalue()


def _weights(part: Part, file: Pickled) -> dict[str, Stored]:
    """Published name -> tensor, of a file that holds this part."""
    with damage_named(file.path):
        if isinstance(file.root, Thing):
            what = file.root.kind
            found = {
                f"{prefix}{name}": tensor
                for prefix, thing in _things(file.root)
                for name, tensor in thing.state["_parameters"].items()
                if tensor is not None
            }
        else:
            found = {str(name): tensor for name, tensor in file.root.items()}
            if INPUT not in found:
                raise UserError(f"{file.path} has no weights {INPUT}, so it is not the published {part}{_vqgan(found)}")
            what = CLASS_OF["encoder" if found[INPUT].shape[2:] == (7, 7) else "decoder"]
        if what != CLASS_OF[part]:
            other = ": are the two files swapped?" if what in CLASS_OF.values() else ""
            raise UserError(f"{file.path} holds a {what}, not a {CLASS_OF[part]}{other}")
        if INPUT not in found or len(found[INPUT].shape) != 4:
            raise UserError(f"{file.path} has no weights {INPUT} with four axes, so it is not the published {part}")
    return found


def _vqgan(found: dict[str, Any]) -> str:
    inner = found.get("state_dict", found)
    if any("quantize." in str(name) for name in inner):
        return "; a VQGAN is not read (`smalti dvae import --help` says why)"
    return ""


def _things(root: Thing) -> Iterator[tuple[str, Thing]]:
    """(prefix, object) of a pickled module and all modules in it."""
    waiting, seen = [("", root)], 0
    while waiting:
        prefix, thing = waiting.pop()
        yield prefix, thing
        seen += 1
        waiting += [(f"{prefix}{name}.", below) for name, below in thing.state["_modules"].items()]
        if seen + len(waiting) > MAX_THINGS:
            raise ValueError("its modules have no end")


def _refuse_other_shapes(file: Pickled, found: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> None:
    odd = sorted(found.keys() ^ shapes.keys())
    if odd:
        word = "lacks" if odd[0] in shapes else "has, beyond the published ones,"
        raise UserError(f"{file.path} {word} the weights {odd[0]!r}")
    for name, shape in shapes.items():
        if not isinstance(found[name], Stored) or found[name].shape != shape:
            raise UserError(
                f"{file.path}: {name} has the shape {getattr(found[name], 'shape', None)}, where {shape} belongs"
            )


def _refuse_other_gain(file: Pickled, gain: float) -> None:
    """The one number besides the weights that a pickled module decides by: the scale of residual outputs."""
    things = _things(file.root) if isinstance(file.root, Thing) else ()
    other = [thing.state["post_gain"] for _, thing in things if thing.state.get("post_gain", gain) != gain]
    if other:
        raise UserError(f"{file.path} scales residual outputs by {other[0]}, where the published rule gives {gain}")
