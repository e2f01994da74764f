"""How DeepSpeed is started: its settings, the model sharded as it is made, and who shares shards with whom.

DeepSpeed's settings are derived from ours and handed over as a dict; there is no second file to keep in step.
"""

import importlib
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cluster.process import Place
from cluster.settings import SettingError
from cluster.topology import Seat
from pretrain.adamw import AdamW
from pretrain.config import TrainConfig
from pretrain.model import Sizes, Transformer
from pretrain.optim import resblock_groups


@dataclass(frozen=True)
class Started:
    """A model under DeepSpeed."""

    model: Transformer
    engine: Any  # deepspeed.DeepSpeedEngine
    optimizer: AdamW
    whole: Any  # deepspeed.zero.GatheredParameters


class ShardGroup:
    """What DeepSpeed calls an mpu: the data-parallel world it knows is the shard group; what lies across is ours."""

    def __init__(self, seat: Seat) -> None:
        self._seat = seat
        self._alone = dist.new_group([seat.rank], use_local_synchronization=True)

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self._seat.shard_group or self._alone

    def get_data_parallel_rank(self) -> int:
        return self._seat.shard_index

    def get_data_parallel_world_size(self) -> int:
        return self._seat.topology.shard_size

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self._alone

    def get_model_parallel_rank(self) -> int:
        return 0

    def get_model_parallel_world_size(self) -> int:
        return 1


def deepspeed_settings(config: TrainConfig, world_size: int) -> dict[str, Any]:
    """DeepSpeed's settings for a run of ours, under the names of its documentation.

    float16 runs are float32 to DeepSpeed: branches cast on the fly, and scales, norms and skipped updates are ours
    (engine.py). SettingError if the batch cannot be divided.
    """
    parts = world_size * config.accumulate
    if config.data.batch % parts:
        raise SettingError(
            f"data.batch={config.data.batch} must be a multiple of {parts}: {world_size} processes, "
            f"accumulate={config.accumulate} parts each"
        )
    zero: dict[str, Any] = {"stage": config.zero_stage}
    if config.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return {
        "train_micro_batch_size_per_gpu": config.data.batch // parts,
        "gradient_accumulation_steps": config.accumulate,
        "gradient_clipping": 0.0,
        "zero_optimization": zero,
        "bf16": {"enabled": config.precision == "bf16"},
        # (stage 1 in bf16 with float32 sums would be another class of DeepSpeed's, without shards to reach)
        **({"data_types": {"grad_accum_dtype": "fp32"}} if config.zero_stage > 1 else {}),
        "zero_allow_untested_optimizer": True,  # ours
        "zero_force_ds_cpu_optimizer": False,  # which would be compiled at start
        "steps_per_print": 2**31,
    }


def start(config: TrainConfig, sizes: Sizes, place: Place, seat: Seat) -> Started:
    """A fresh model under DeepSpeed; the initial weights depend on the seed alone.

    At ZeRO stage 3 no rank ever holds more of it than the module that is being made. (In bf16 the float32 weights
    then start as bf16 values.)
    """
    deepspeed = _import_deepspeed(place)
    settings = deepspeed_settings(config, place.world_size)
    mpu = ShardGroup(seat) if seat.topology.n_replicas > 1 else None
    torch.manual_seed(config.seed)
    with _sharded(deepspeed, config, settings, mpu) as whole:
        model = Transformer(
            config.model, sizes, config.attention, config.activation_checkpointing, config.offload_activations, whole
        )
    if config.zero_stage < 3:
        model = model.to(place.device)
    if config.compile:
        model.compile_mlps()
    optim = config.optim
    optimizer = AdamW(
        resblock_groups(model, optim.weight_decay, optim.moments),
        lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps, variance_clip=optim.variance_clip,
    )  # fmt: skip
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings, mpu=mpu)
    return Started(model, engine, optimizer, deepspeed.zero.GatheredParameters)


@contextmanager
def _sharded(deepspeed: Any, config: TrainConfig, settings: dict[str, Any], mpu: ShardGroup | None) -> Iterator[Any]:
    """Gives what makes parameters whole inside; at stage 3 modules made inside are sharded at once."""
    if config.zero_stage < 3:
        yield nullcontext
        return

    def whole(parameters: list[Tensor]) -> AbstractContextManager[Any]:
        return deepspeed.zero.GatheredParameters(parameters, modifier_rank=0)

    group = mpu.get_data_parallel_group() if mpu else None
    with deepspeed.zero.Init(data_parallel_group=group, config_dict_or_path=settings, mpu=mpu):
        yield whole


def _import_deepspeed(place: Place) -> Any:
    """DeepSpeed, imported when it is needed: its import looks for devices and prints.

    On a CPU it would compile a shared-memory all-reduce at start, which only inference calls;
    without it neither a compiler nor 40 seconds are needed.
    """
    os.environ.setdefault("DS_ACCELERATOR", place.device.type)
    deepspeed = importlib.import_module("deepspeed")
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")  # DeepSpeed's calls, not ours
    if place.device.type == "cpu":
        importlib.import_module("deepspeed.ops").__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=None, auto_mpi_discovery=False, verbose=False)
    return deepspeed
