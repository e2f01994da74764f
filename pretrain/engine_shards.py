"""This rank's shards inside a ZeRO optimizer of DeepSpeed: its private parts that smalti touches, and no others.

DeepSpeed has no way to look at gradients between backward and step, to leave a part of an update out,
or to reach the float32 weights that it updates. All that is here, so that another DeepSpeed breaks in one place.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cluster.settings import UserError
from pretrain.adamw import AdamW, Factors

GRADIENTS = "_DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition"  # ds_id -> this rank's gradient
BOTH = ("averaged_gradients", "_optimizer_step")
STAGE_3 = (
    "fp16_groups", "fp32_partitioned_groups_flat", "offload_optimizer", "_get_norm_groups",
    "_reassign_or_swap_out_partitioned_parameters", "grad_position", "get_param_id", "checkpoint_event_prologue",
    "checkpoint_event_epilogue",
    "sub_group_to_group_id", "partition_grads", "is_gradient_accumulation_boundary", GRADIENTS,
)  # fmt: skip
STAGE_1_AND_2 = (
    "bit16_groups", "params_in_partition", "single_partition_of_fp32_groups", "cpu_offload", "scaled_global_norm",
    "update_lp_params", "check_grad_overflow",
)  # fmt: skip


@dataclass(frozen=True)
class Piece:
    """A parameter's gradient as far as this rank has it: a view of what the coming step reads."""

    name: str
    shape: tuple[int, ...]  # of the whole parameter
    gradient: Tensor  # (n,): at stage 3 elements [rank n, rank n + n) of the parameter, with zeros behind its end


class Shards:
    """The shards of a DeepSpeed ZeRO optimizer of stage 1, 2 or 3, one optimizer group after the other."""

    def __init__(self, optimizer: Any, names: Mapping[int, str]) -> None:
        """optimizer: what `deepspeed.initialize` returned; names: id(parameter) -> its name. UserError if the
        installed DeepSpeed keeps its shards in another way."""
        self._optimizer, self._names = optimizer, names
        self._is_stage_3 = hasattr(optimizer, "fp16_groups")
        wanted = BOTH + (STAGE_3 if self._is_stage_3 else STAGE_1_AND_2)
        if missing := [name for name in wanted if not hasattr(optimizer, name)]:
            raise UserError(
                f"the installed deepspeed has no {type(optimizer).__name__}.{', '.join(missing)}: smalti needs 0.19.8 "
                "(pip install deepspeed==0.19.8)"
            )
        self._skipped: Collection[int] = ()
        self._factors: Mapping[str, Sequence[Factors]] = {}
        self._factor_clip = 1.0
        self._replace_step_and_norm()

    @property
    def masters(self) -> list[Tensor]:
        """The flat float32 weights of each group that this rank updates."""
        optimizer = self._optimizer
        return optimizer.fp32_partitioned_groups_flat if self._is_stage_3 else optimizer.single_partition_of_fp32_groups

    @property
    def group_names(self) -> list[list[str]]:
        """Names of the parameters of each group, whoever has them."""
        groups = self._optimizer.fp16_groups if self._is_stage_3 else self._optimizer.bit16_groups
        return [[self._names[id(parameter)] for parameter in group] for group in groups]

    def pieces(self) -> list[list[Piece]]:
        """The gradients of each group, between backward and step."""
        if self._is_stage_3:
            groups = self._optimizer.fp16_groups
            return [[self._piece_3(number, *pair) for pair in enumerate(group)] for number, group in enumerate(groups)]
        return [self._pieces_12(number, group) for number, group in enumerate(self._optimizer.params_in_partition)]

    @property
    def is_offloaded(self) -> bool:
        """Are gradients and weights in the CPU's memory while the model is elsewhere?"""
        return bool(self._optimizer.offload_optimizer if self._is_stage_3 else self._optimizer.cpu_offload)

    def tell_when_reduced(self, tell: Callable[[list[Piece]], None]) -> None:
        """At stage 3, not offloaded: call during the last backward pass before a step, whenever pieces are complete,
        in the same order on all ranks. On a GPU the current stream is then that in which they were reduced."""
        optimizer = self._optimizer
        partition: Callable[[list[Any], list[Tensor]], Any] = optimizer.partition_grads

        def partition_and_tell(parameters: list[Any], partitions: list[Tensor]) -> Any:
            answer = partition(parameters, partitions)
            if optimizer.is_gradient_accumulation_boundary():
                gradients = getattr(optimizer, GRADIENTS)
                tell([self._piece(parameter, gradients[parameter.ds_id].view(-1)) for parameter in parameters])
            return answer

        optimizer.partition_grads = partition_and_tell

    def skip(self, groups: Collection[int]) -> None:
        """Leave these groups out of the coming step: neither their weights nor their moments move."""
        self._skipped = groups

    def take_factors(self, factors: Mapping[str, Sequence[Factors]], clip: float) -> None:
        """At stage 3: let the coming step update these parameters, by name, from factors of their gradients, times
        `clip`, one above the other as they fill this rank's rows; what is in their gradients then does not matter."""
        self._factors, self._factor_clip = factors, clip

    def publish(self) -> None:
        """Make what is in `masters` the weights that the model computes with."""
        if self._is_stage_3:
            self._optimizer.checkpoint_event_prologue()  # weights that stay gathered are let go ...
            for number in range(len(self.masters)):
                self._optimizer._reassign_or_swap_out_partitioned_parameters(number)
            self._optimizer.checkpoint_event_epilogue()  # ... and gathered again
        else:
            self._optimizer.update_lp_params()

    def _piece_3(self, group: int, number: int, parameter: Any) -> Piece:
        optimizer = self._optimizer
        if optimizer.offload_optimizer:
            _, at, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
            gradient = self._offloaded(group).narrow(0, int(at), int(size))
        else:
            gradient = optimizer.averaged_gradients[group][number].view(-1)
        return self._piece(parameter, gradient)

    def _piece(self, parameter: Any, gradient: Tensor) -> Piece:
        return Piece(self._names[id(parameter)], tuple(parameter.ds_shape), gradient)

    def _pieces_12(self, group: int, parameters: Sequence[Any]) -> list[Piece]:
        if self._optimizer.cpu_offload:  # one flat gradient, with the padding in it
            gradient = self._offloaded(group)
            return [Piece(self._names[id(parameters[0])], tuple(gradient.shape), gradient)] if parameters else []
        gradients = [g for g in self._optimizer.averaged_gradients[group] if not getattr(g, "_zero_padding", False)]
        return [
            Piece(self._names[id(parameter)], tuple(parameter.shape), gradient.view(-1))
            for parameter, gradient in zip(parameters, gradients, strict=False)  # padding may follow unmarked
        ]

    def _offloaded(self, group: int) -> Tensor:
        gradient = self.masters[group].grad
        assert gradient is not None
        return gradient

    def _step_from_factors(self, group: int) -> None:
        """The decompressed gradient of a matrix is never written: it exists a piece at a time, inside the update."""
        optimizer: AdamW = self._optimizer.optimizer
        options = optimizer.param_groups[self._optimizer.sub_group_to_group_id[group]]
        master = self.masters[group]
        assert master.grad is not None
        optimizer.advance(master, options)
        for parameter in self._optimizer.fp16_groups[group]:
            _, start, size = (int(n) for n in self._optimizer.grad_position[self._optimizer.get_param_id(parameter)])
            factors = self._factors.get(self._names[id(parameter)])
            if factors is None:
                optimizer.step_parameter(master, options, master.grad.narrow(0, start, size), start=start)
                continue
            for one in factors:
                optimizer.step_parameter(master, options, one, self._factor_clip, start)
                start += len(one.p) * len(one.q)

    def _replace_step_and_norm(self) -> None:
        """Hook in: DeepSpeed's norm would be a collective for each group, and of gradients still scaled."""
        optimizer = self._optimizer
        step: Callable[[int], None] = optimizer._optimizer_step
        one = torch.ones((), device=self.masters[0].device)

        def step_unless_skipped(group: int) -> None:
            if group in self._skipped:
                return
            if self._factors and not self._factors.keys().isdisjoint(self.group_names[group]):
                self._step_from_factors(group)
            else:
                step(group)

        optimizer._optimizer_step = step_unless_skipped
        if self._is_stage_3:
            optimizer._get_norm_groups = lambda: [one]
        else:
            optimizer.scaled_global_norm = lambda norm_type=2: one
            optimizer.check_grad_overflow = False  # `skip` decides, for bad numbers too
