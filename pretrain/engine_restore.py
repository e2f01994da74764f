"""Saves DeepSpeed's state through smalti's own writer, and brings it back on any ZeRO stage and number of ranks.

The private parts of DeepSpeed 0.19.8 that this takes are here and in engine_shards.py, and nowhere else.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from cluster.manifest import FolderError
from cluster.snapshot import SnapshotWriter
from pretrain.engine_files import AVERAGE, WEIGHT, EngineFiles

COUNTERS = ("global_steps", "global_samples", "skipped_steps")
Fragment = tuple[str, int, int, int]  # parameter, where in the flat tensor, its first element there, and the last + 1


def save_through(engine: Any, writer: SnapshotWriter) -> None:
    """Let `engine.save_checkpoint` give its states to the writer and touch no disk itself.

    A disk that is full on one rank would end that rank alone, and leave the others waiting in a barrier.
    """
    writer.reader = engine.checkpoint_engine
    engine.checkpoint_engine = writer
    engine._copy_recovery_script = _nothing  # zero_to_fp32.py; `python -m deepspeed.utils.zero_to_fp32` is the same


def restore(engine: Any, names: Mapping[int, str], files: EngineFiles) -> None:
    """Fill a DeepSpeed engine of ZeRO stage 1, 2 or 3 from a checkpoint of any such stage; every rank calls it.

    Weights, the optimizer's states in their stored dtype, step counts, buffers and DeepSpeed's counters become
    those of the file; learning rates and other settings of the optimizer's groups stay the engine's. A rank reads
    only what it holds. names: id(parameter) -> its name. FolderError if the parameters are not those of the files.
    """
    optimizer = engine.optimizer
    is_stage_3 = hasattr(optimizer, "fp16_groups")
    if is_stage_3:
        optimizer.checkpoint_event_prologue()
    groups = _groups(optimizer)
    files.refuse_others({names[id(p)]: tuple(getattr(p, "ds_shape", p.shape)) for group, _ in groups for p in group})
    is_fused = bool(optimizer.optimizer.defaults.get("fused"))
    with torch.no_grad():
        for group, master in groups:
            held = _held(optimizer, group, names)
            _copy(files, WEIGHT, held, master)
            in_group = [names[id(parameter)] for parameter in group]
            optimizer.optimizer.state[master] = _state(files, in_group, held, master, is_fused)
        for name, buffer in engine.module.named_buffers():
            if name in files.buffers:
                buffer.copy_(files.buffers[name])
        _publish(optimizer, is_stage_3)
    for name in COUNTERS:
        setattr(engine, name, files.model[name])


def restore_average(engine: Any, names: Mapping[int, str], files: EngineFiles) -> list[Tensor]:
    """The average of the weights, in tensors on the CPU like this rank's flat float32 ones."""
    flats = []
    for group, master in _groups(engine.optimizer):
        flats.append(torch.zeros(master.shape))
        _copy(files, AVERAGE, _held(engine.optimizer, group, names), flats[-1])
    return flats


def _groups(optimizer: Any) -> list[tuple[list[Any], Tensor]]:
    """Each group's parameters, and the flat float32 weights of it that this rank updates."""
    if hasattr(optimizer, "fp16_groups"):
        return list(zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True))
    return list(zip(optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups, strict=True))


def _held(optimizer: Any, group: list[Any], names: Mapping[int, str]) -> list[Fragment]:
    held = _held_3 if hasattr(optimizer, "fp16_groups") else _held_12
    return [fragment for parameter in group for fragment in held(optimizer, parameter, names[id(parameter)])]


def _held_3(optimizer: Any, parameter: Any, name: str) -> Iterator[Fragment]:
    _, at, n_elements = optimizer.grad_position[optimizer.get_param_id(parameter)]
    start = optimizer._get_param_partition_rank(parameter) * int(n_elements)
    yield name, int(at), start, max(start, min(start + int(n_elements), parameter.ds_numel))  # zeros fill the last part


def _held_12(optimizer: Any, parameter: Any, name: str) -> Iterator[Fragment]:
    mapping = parameter._hp_mapping
    if mapping is not None:
        held, start = mapping.lp_fragment_address, mapping.hp_fragment_address.start
        yield name, start, held.start, held.start + held.numel


def _copy(files: EngineFiles, key: str, held: list[Fragment], flat: Tensor) -> None:
    for name, at, start, stop in held:
        flat.data[at : at + stop - start].copy_(files.read(name, key, start, stop))


def _state(files: EngineFiles, names: list[str], held: list[Fragment], master: Tensor, fused: bool) -> dict[str, Any]:
    """The optimizer's state of a flat tensor; zeros where it is padded. Empty before the group's first update."""
    one, *others = {files.spans[name].group: name for name in names}.values()
    if any(files.scalars(name) != files.scalars(one) or files.keys(name) != files.keys(one) for name in others):
        raise FolderError(f"{files.folder} has parameters at different step counts that are one group here: {names}")
    state: dict[str, Any] = {}
    for key, value in files.scalars(one).items():  # a fused optimizer wants the step count beside the weights
        is_tensor = isinstance(value, Tensor)
        state[key] = value.clone().to(master.device if fused else "cpu") if is_tensor else value
    for key in files.keys(one):
        state[key] = torch.zeros(master.shape, dtype=files.dtype(one, key), device=master.device)
        _copy(files, key, held, state[key])
    return state


def _publish(optimizer: Any, is_stage_3: bool) -> None:
    """Make the fp32 weights those that the model computes with."""
    if is_stage_3:
        for number in range(len(optimizer.fp32_partitioned_groups_flat)):
            optimizer._reassign_or_swap_out_partitioned_parameters(number)
        optimizer.checkpoint_event_epilogue()
    else:
        optimizer.update_lp_params()
        optimizer._hp_optimizer_states_linked = False  # to the states that were there before


def _nothing(folder: str) -> None:
    """Stands where DeepSpeed would copy a script."""
