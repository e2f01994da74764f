"""Reads what DeepSpeed's ZeRO optimizers write into a checkpoint folder: whole parameters and moments, by name.

Any stage from 1 to 3, any number of ranks, on a CPU, without DeepSpeed. Files are mapped, not loaded: at
most one parameter is in memory at a time. Nothing is unpickled but tensors and plain values.
"""

import math
import pickle
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cluster.manifest import FolderError

WEIGHT = "weight"  # the fp32 master
AVERAGE = "average"  # of the weights, if the run keeps one
MAPPED_BYTES = 2**28  # read through mappings before they are closed, for what was read stays in memory with them

OPTIMIZER_FILE = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_00_optim_states\.pt")
MODEL_FILES = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt")
# What DeepSpeed itself puts beside the tensors of the model's file; the rest is the caller's.
ENGINE_KEYS = frozenset((
    "module", "buffer_names", "optimizer", "param_shapes", "frozen_param_shapes", "shared_params",
    "frozen_param_fragments", "lr_scheduler", "data_sampler", "random_ltd", "skipped_steps", "global_steps",
    "global_samples", "dp_world_size", "mp_world_size", "ds_config", "ds_version", "num_experts", "ds_autoep_layers",
    "universal_checkpoint_info",
))  # fmt: skip


class Plain:
    """Stands for an object of DeepSpeed's in its files; its attributes are what was stored."""


STAND_INS = [
    (Plain, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (Plain, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
    (Plain, "deepspeed.utils.tensor_fragment.fragment_address"),
    (int, "deepspeed.runtime.zero.config.ZeroStageEnum"),
]


@dataclass(frozen=True)
class Span:
    """Where a parameter's elements lie in the flat tensors of its group.

    Element i is at (base + i) % width of rank (base + i) // width in stages 1 and 2, where the group as a whole
    is cut into equal parts; and at base + i % width of rank i // width in stage 3, where the parameter is.
    """

    shape: tuple[int, ...]
    group: int
    base: int
    width: int
    whole_group: bool

    def pieces(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """(rank, offset in its flat tensor, count) of the elements [start, stop), in order."""
        shift = self.base if self.whole_group else 0
        while start < stop:
            rank, at = divmod(start + shift, self.width)
            count = min(stop - start, self.width - at)
            yield rank, at + (0 if self.whole_group else self.base), count
            start += count


class EngineFiles:
    """A `global_stepN` folder."""

    def __init__(self, folder: Path) -> None:
        """FolderError if DeepSpeed wrote no ZeRO checkpoint there, or not all of it is there."""
        self.folder = folder
        matches = [(OPTIMIZER_FILE.fullmatch(path.name), path) for path in folder.glob("*_optim_states.pt")]
        self._paths = {int(match[1]): path for match, path in matches if match}
        self._open: dict[Path, tuple[Any, int]] = {}  # file -> what is in it, bytes read of it
        self.model = self._model_states(folder)
        shapes = self.model.get("param_shapes")
        if not self._paths or shapes is None:
            raise FolderError(f"{folder} is no checkpoint of DeepSpeed's ZeRO stage 1, 2 or 3, so it cannot be read")
        first = self._optimizer(min(self._paths))
        self.stage = int(first["zero_stage"])
        count = first["partition_count"]
        self.n_ranks: int = max(count) if isinstance(count, list) else count
        if self._paths.keys() != set(range(self.n_ranks)):
            raise FolderError(f"{folder} has the optimizer files of {len(self._paths)} ranks, not of {self.n_ranks}")
        self.spans = dict(self._spans_3(shapes) if self.stage == 3 else self._spans_12(shapes, first))
        self.groups: list[dict[str, Any]] = self._base(first)["param_groups"]  # settings of the optimizer's groups

    @property
    def names(self) -> list[str]:
        """Every trained parameter, in DeepSpeed's order."""
        return list(self.spans)

    @property
    def caller(self) -> dict[str, Any]:
        """What the caller gave DeepSpeed to keep as `client_state` (of rank 0)."""
        return {key: value for key, value in self.model.items() if key not in ENGINE_KEYS}

    def refuse_others(self, wanted: dict[str, tuple[int, ...]]) -> None:
        """FolderError unless the parameters have these names and shapes."""
        found = {name: span.shape for name, span in self.spans.items()}
        wrong = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
        if wrong:
            first = f"{wrong[0]} is {found.get(wrong[0], 'missing')} there and {wanted.get(wrong[0], 'missing')} here"
            raise FolderError(
                f"{self.folder} does not fit the model in {len(wrong)} parameters ({first}): "
                "it is of another model, or another version of smalti wrote it"
            )

    def shape(self, name: str) -> tuple[int, ...]:
        return self.spans[name].shape

    def dtype(self, name: str, key: str = WEIGHT) -> torch.dtype:
        return self._flat(key, 0, self.spans[name].group).dtype

    def keys(self, name: str) -> list[str]:
        """What `read` has of a parameter besides WEIGHT: the optimizer's states that have a value for each element.

        Empty before the first update of its group.
        """
        length = len(self._flat(WEIGHT, 0, self.spans[name].group))
        return [key for key, value in self._state(0, name).items() if _is_flat(value, length)]

    def scalars(self, name: str) -> dict[str, Any]:
        """What the optimizer keeps once for a parameter's group: `step`, as a tensor or a number."""
        flat = self.keys(name)
        return {key: value for key, value in self._state(0, name).items() if key not in flat}

    @property
    def buffers(self) -> dict[str, Tensor]:
        """What the model keeps beside its parameters."""
        return {name: self.model["module"][name] for name in self.model["buffer_names"]}

    def has_average(self) -> bool:
        return average_path(self.folder, 0).is_file()

    def read(self, name: str, key: str = WEIGHT, start: int = 0, stop: int | None = None) -> Tensor:
        """(stop - start,) elements of a parameter's weight or state, in its dtype, in memory of their own.

        By default all. KeyError if there is no such name or key.
        """
        span = self.spans[name]
        stop = math.prod(span.shape) if stop is None else stop
        dtype = self._flat(key, 0, span.group).dtype
        values, at = torch.empty(stop - start, dtype=dtype), 0
        for rank, offset, count in span.pieces(start, stop):
            values[at : at + count] = self._flat(key, rank, span.group)[offset : offset + count]
            at += count
            self._count(rank, key, count * values.element_size())
        return values

    def tensor(self, name: str, key: str = WEIGHT) -> Tensor:
        """`read`, whole, in the parameter's shape."""
        return self.read(name, key).view(self.shape(name))

    def _model_states(self, folder: Path) -> dict[str, Any]:
        for name in MODEL_FILES:
            if (folder / name).is_file():
                return self._load(folder / name)
        raise FolderError(f"{folder} has no {MODEL_FILES[0]}: it is no checkpoint of DeepSpeed's")

    def _spans_12(self, shapes: list[dict[str, Any]], first: dict[str, Any]) -> Iterator[tuple[str, Span]]:
        paddings = first.get("param_alignment_paddings") or [[0] * len(group) for group in shapes]
        for number, group in enumerate(shapes):
            width = len(first["single_partition_of_fp32_groups"][number])  # cut short only if nothing lies behind it
            base = 0
            for (name, shape), padding in zip(group.items(), paddings[number], strict=True):
                yield name, Span(tuple(shape), number, base, width, True)
                base += math.prod(shape) + padding

    def _spans_3(self, shapes: list[dict[str, Any]]) -> Iterator[tuple[str, Span]]:
        for number, group in enumerate(shapes):
            base = 0
            for name, shape in group.items():
                width = -(-math.prod(shape) // self.n_ranks)
                yield name, Span(tuple(shape), number, base, width, False)
                base += width

    def _optimizer(self, rank: int) -> dict[str, Any]:
        return self._load(self._paths[rank])["optimizer_state_dict"]

    def _base(self, state: dict[str, Any]) -> dict[str, Any]:
        """The state_dict of torch's optimizer."""
        base = state["optimizer_state_dict" if self.stage == 3 else "base_optimizer_state"]
        if not isinstance(base, dict):
            raise FolderError(f"{self.folder} was saved with zero_optimization.elastic_checkpoint, which is not read")
        return base

    def _state(self, rank: int, name: str) -> dict[str, Any]:
        """Of the group of a parameter. Each has one flat tensor in torch's optimizer, and these are counted through."""
        return self._base(self._optimizer(rank))["state"].get(self.spans[name].group, {})

    def _flat(self, key: str, rank: int, group: int) -> Tensor:
        """(n,) what a rank holds of a group."""
        if key == AVERAGE:
            return self._load(average_path(self.folder, rank))["groups"][group]
        state = self._optimizer(rank)
        if key == WEIGHT:
            return state["fp32_flat_groups" if self.stage == 3 else "single_partition_of_fp32_groups"][group]
        return self._base(state)["state"][group][key]

    def _load(self, path: Path) -> Any:
        if path not in self._open:
            try:
                with torch.serialization.safe_globals(STAND_INS):  # type: ignore[arg-type]
                    self._open[path] = torch.load(path, map_location="cpu", mmap=True, weights_only=True), 0
            except (OSError, RuntimeError, pickle.UnpicklingError) as error:
                raise FolderError(f"{path} cannot be read: {str(error).splitlines()[0]}") from None
        return self._open[path][0]

    def _count(self, rank: int, key: str, n_bytes: int) -> None:
        """Close a mapping of which enough was read; the next read opens it anew."""
        path = average_path(self.folder, rank) if key == AVERAGE else self._paths[rank]
        content, before = self._open[path]
        self._open[path] = content, before + n_bytes
        if before + n_bytes > MAPPED_BYTES / self.n_ranks:
            del self._open[path]


def average_path(folder: Path, rank: int) -> Path:
    """The file in which a rank keeps {"groups": the average of its flat tensors}."""
    return folder / f"zero_pp_rank_{rank}_mp_rank_00_average_states.pt"


def _is_flat(value: Any, least: int) -> bool:
    return isinstance(value, Tensor) and value.dim() == 1 and len(value) >= max(least, 1)
