"""What a run is made of, without making it: its weights and their groups, its topology, DeepSpeed's limits."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch

from cluster.settings import SettingError
from cluster.topology import Topology
from data_pipeline.bpe import open_vocabulary
from data_pipeline.folders import joined, open_folders
from pretrain.config import TrainConfig
from pretrain.engine_start import deepspeed_settings
from pretrain.model import Sizes, Transformer
from pretrain.optim import resblock_groups

PAPER = Sizes(text_vocab=16_384, codebook=8_192, grid=32)  # Ramesh et al. 2021, section 2.2


@dataclass(frozen=True)
class Weight:
    """A parameter, the resblock that it belongs to (or REST), and the group in which it is updated."""

    name: str
    shape: tuple[int, ...]
    resblock: str
    group: int
    moments: str

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Limits:
    """How much DeepSpeed collects before it acts, in numbers; what our settings leave out has its defaults (0.19)."""

    bucket: int  # gradients reduced at once
    prefetch: int  # of weights gathered ahead
    reuse: int  # weights that are used again within so many are not let go
    persist: int  # the largest parameter that stays whole on every rank


@dataclass(frozen=True)
class Blueprint:
    """A run before it is made. precision is not auto."""

    config: TrainConfig
    sizes: Sizes
    world_size: int
    model: Transformer  # on the meta device
    weights: tuple[Weight, ...]

    def on(self, world_size: int, config: TrainConfig | None = None) -> "Blueprint":
        """The same model on other ranks, or trained in another way."""
        config = config or self.config
        weights = self.weights
        if config.optim.moments != self.config.optim.moments:
            weights = _weights(self.model, config)
        return replace(self, config=config, world_size=world_size, weights=weights)

    @cached_property
    def topology(self) -> Topology:
        """SettingError if the ranks are not whole groups of zero_shards."""
        return Topology(self.world_size, self.config.zero_shards or self.world_size)

    @cached_property
    def limits(self) -> Limits:
        """SettingError if the batch cannot be divided among the ranks."""
        zero = deepspeed_settings(self.config, self.world_size)["zero_optimization"]
        return Limits(
            bucket=int(zero.get("reduce_bucket_size", 5e8)),
            prefetch=int(zero.get("stage3_prefetch_bucket_size", 5e7)),
            reuse=int(zero.get("stage3_max_reuse_distance", 1e9)),
            persist=int(zero.get("stage3_param_persistence_threshold", 1e5)),
        )

    @property
    def numel(self) -> int:
        """Numbers in all weights."""
        return sum(weight.numel for weight in self.weights)

    @property
    def shard_numel(self) -> int:
        """Of them in the optimizer of one rank."""
        return sum(self.shard(weight) for weight in self.weights)

    def shard(self, weight: Weight) -> int:
        """A rank's part of a weight: rounded up at stage 3, where each is cut on its own."""
        return -(-weight.numel // self.topology.shard_size)

    @property
    def samples(self) -> int:
        """That a rank passes through the model at once."""
        return self.config.data.batch // (self.world_size * self.config.accumulate)

    @property
    def slots(self) -> int:
        """Rows of the stream: samples x (T + I)."""
        return self.samples * self.model.layout.n_slots

    @property
    def weight_bytes(self) -> int:
        """Of a number in the weights that the model computes with: float16 runs cast float32 weights on the fly."""
        return 2 if self.config.precision == "bf16" else 4

    @property
    def branch_bytes(self) -> int:
        """Of a number in a resblock's branch."""
        return 4 if self.config.precision == "fp32" else 2


def blueprint(config: TrainConfig, sizes: Sizes, world_size: int) -> Blueprint:
    """Takes no memory: the model is made of shapes alone. SettingError if precision is auto."""
    if config.precision == "auto":
        raise SettingError("precision=auto is decided by the device: name fp32, bf16 or fp16-resblock")
    with torch.device("meta"):
        model = Transformer(config.model, sizes)
    return Blueprint(config, sizes, world_size, model, _weights(model, config))


def sizes_of(config: TrainConfig, whole: bool = True) -> tuple[Sizes, bool]:
    """What the data decides of the model's shape, True; the paper's sizes, False, where there is none yet.

    FolderError if there are folders, but not finished or, with whole=True, not whole.
    """
    if not Path(config.tokens.split("::")[0].strip()).is_dir() or not Path(config.vocab).is_dir():
        return PAPER, False
    counts = joined([one.manifest for one in open_folders(config.tokens, "tokens", config.cache, whole)]).counts
    vocabulary, _ = open_vocabulary(Path(config.vocab))
    return Sizes(vocabulary.size, counts["codebook"], counts["grid"]), True


def kinds(weights: Sequence[Weight]) -> dict[str, int]:
    """Numbers by kind: matrices of the resblocks, their gains and biases, embeddings, heads with the last norm."""
    found = {"resblock matrices": 0, "resblock gains and biases": 0, "embeddings": 0, "last norm and heads": 0}
    for weight in weights:
        if weight.name.startswith("layers."):
            kind = "resblock matrices" if len(weight.shape) > 1 else "resblock gains and biases"
        else:
            is_head = weight.name.startswith(("text_head.", "image_head.", "norm."))
            kind = "last norm and heads" if is_head else "embeddings"
        found[kind] += weight.numel
    return found


def _weights(model: Transformer, config: TrainConfig) -> tuple[Weight, ...]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = resblock_groups(model, config.optim.weight_decay, config.optim.moments)
    return tuple(
        Weight(names[id(parameter)], tuple(parameter.shape), group["resblock"], number, group["moments"])
        for number, group in enumerate(groups)
        for parameter in group["params"]
    )
