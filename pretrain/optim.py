"""Which parameters are updated together, and which of them decay."""

from typing import Any

from torch import nn

from pretrain.model import Transformer

REST = "rest"  # what lies outside all resblocks: embeddings, the last norm, heads


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """AdamW groups: weight decay on matrices and kernels, not on gains, biases and embeddings."""
    embeddings = _embeddings(model)
    decayed = [p for p in model.parameters() if _decays(p, embeddings)]
    kept = [p for p in model.parameters() if not _decays(p, embeddings)]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]


def resblock_groups(model: Transformer, weight_decay: float, moments: str) -> list[dict[str, Any]]:
    """The same, one resblock after the other and then the rest: `resblock` names the group's.

    A resblock is what a gradient scale is about, what an update can leave out, and what PowerSGD sends at once.
    Its matrices keep their moments as `moments` says, all else in float32 (Ramesh et al. 2021, appendix D).
    """
    names, embeddings = [*model.resblocks(), REST], _embeddings(model)
    groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        block = resblock_of(name, names)
        groups.setdefault((names.index(block), not _decays(parameter, embeddings)), []).append(parameter)
    return [
        {
            "params": groups[block, is_kept],
            "weight_decay": 0.0 if is_kept else weight_decay,
            "moments": "fp32" if is_kept or names[block] == REST else moments,
            "resblock": names[block],
        }
        for block, is_kept in sorted(groups)
    ]


def resblock_of(parameter: str, resblocks: list[str]) -> str:
    """The resblock that a parameter belongs to, by its name, or REST."""
    return next((block for block in resblocks if parameter.startswith(f"{block}.")), REST)


def _embeddings(model: nn.Module) -> set[int]:
    return {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}


def _decays(parameter: nn.Parameter, embeddings: set[int]) -> bool:
    shape = getattr(parameter, "ds_shape", parameter.shape)  # sharded, it is empty itself
    return len(shape) >= 2 and id(parameter) not in embeddings
