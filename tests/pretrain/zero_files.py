"""Folders as DeepSpeed's ZeRO writes them, without DeepSpeed: test_engine_files.py holds the reader against both."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MOMENTS = {"exp_avg": torch.int16, "exp_avg_sq": torch.bfloat16}
STEP = 7.0

Group = dict[str, Tensor]


def moment(weight: Tensor, key: str) -> Tensor:
    """The state that a parameter is given in these files."""
    return (1000 * weight if key == "exp_avg" else weight.square()).to(MOMENTS[key])


def write_zero(folder: Path, groups: list[Group], stage: int, n_ranks: int, average: bool = False) -> None:
    """groups: the parameters of each of the optimizer's groups, by name; of stage 1, 2 or 3."""
    split = _split_3 if stage == 3 else _split_12
    shapes = [{name: weight.shape for name, weight in group.items()} for group in groups]
    for rank in range(n_ranks):
        flats = [split(list(group.values()), n_ranks)[rank] for group in groups]
        states = {
            number: {"step": torch.tensor(STEP)}
            | {
                key: split([moment(weight, key) for weight in group.values()], n_ranks)[rank]
                for key in (MOMENTS if number else {})  # the first group has not been updated yet
            }
            for number, group in enumerate(groups)
        }
        base = {"state": states, "param_groups": [{"lr": 0.1, "params": [number]} for number in range(len(groups))]}
        torch.save(
            {"optimizer_state_dict": _optimizer(stage, n_ranks, flats, base, groups, rank)},
            folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt",
        )
        if stage == 3 or rank == 0:
            name = f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" if stage == 3 else "mp_rank_00_model_states.pt"
            torch.save({"param_shapes": shapes, "module": {}, "buffer_names": [], "note": "ours"}, folder / name)
        if average:
            path = folder / f"zero_pp_rank_{rank}_mp_rank_00_average_states.pt"
            torch.save({"groups": [-flat for flat in flats]}, path)


def _optimizer(
    stage: int, n_ranks: int, flats: list[Tensor], base: dict[str, Any], groups: list[Group], rank: int
) -> dict[str, Any]:
    if stage == 3:
        weights = {"fp32_flat_groups": flats, "optimizer_state_dict": base, "partition_count": n_ranks}
        return weights | {"zero_stage": stage}
    lengths = [sum(weight.numel() for weight in group.values()) for group in groups]
    paddings = [
        max(0, min(len(flat), (rank + 1) * len(flat) - length)) for flat, length in zip(flats, lengths, strict=True)
    ]
    return {
        "single_partition_of_fp32_groups": [
            flat[: len(flat) - pad].clone() for flat, pad in zip(flats, paddings, strict=True)
        ],
        "base_optimizer_state": base,
        "partition_count": [n_ranks] * len(groups),
        "zero_stage": stage,
    }


def _split_12(tensors: list[Tensor], n_ranks: int) -> list[Tensor]:
    """All elements of a group behind each other, in equal parts of an even length."""
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    padded = torch.cat([flat, flat.new_zeros(-len(flat) % (2 * n_ranks))])
    return [part.clone() for part in padded.chunk(n_ranks)]


def _split_3(tensors: list[Tensor], n_ranks: int) -> list[Tensor]:
    """Each parameter in equal parts; a rank's parts behind each other."""
    parts: list[list[Tensor]] = [[] for _ in range(n_ranks)]
    for tensor in tensors:
        flat = tensor.flatten()
        padded = torch.cat([flat, flat.new_zeros(-len(flat) % n_ranks)])
        for rank, part in enumerate(padded.view(n_ranks, -1)):
            parts[rank].append(part)
    return [torch.cat(rank) for rank in parts]
