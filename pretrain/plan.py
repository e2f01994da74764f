"""Say before a run what it needs: memory, traffic, time and disk; exit code 1 if it does not fit, with what would.

    smalti plan dalle-12b --nodes 128 --gpus-per-node 8 --gpu v100-16g
    smalti plan small-256 nodes=1 gpu=h100-80g accumulate=2 json=true

The first plain word is a preset or TOML file of `smalti train`; its settings are changed by the same words as there
(`zero_shards=16` or `train.zero_shards=16`). Needs neither GPUs nor data: sizes are the paper's where no tokens lie at
`tokens`. Memory is counted and, on small runs, within 10 % of what was measured (pretrain/plan_memory.py); times
follow from data sheets and assumed shares of them (pretrain/plan_machines.py), and are expectations.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from cluster.command import Command, run_command
from cluster.settings import SettingError, UserError, load_settings, require_at_least_one, section, setting, split_words
from pretrain.config import TrainConfig
from pretrain.plan_machines import GPUS
from pretrain.plan_memory import Memory
from pretrain.plan_report import as_text, outlook, scaling
from pretrain.plan_shape import Blueprint, blueprint, sizes_of
from pretrain.plan_time import Cluster
from pretrain.train import COMMAND as TRAIN

Changes = dict[str, Any]  # of settings of the run, by name

MOST_NODES = 1024  # that are proposed
OWN = "train."  # what a setting of the run is called among those of the plan


@dataclass(frozen=True)
class PlanConfig:
    """A run, and the machines that it is planned for."""

    nodes: int = setting(1, "machines")
    gpus_per_node: int = setting(8, "GPUs of each")
    gpu: Literal["v100-16g", "v100-32g", "a100-40g", "a100-80g", "h100-80g", "h200-141g", "b200"] = setting(
        "h100-80g", "their kind"
    )
    mfu: float = setting(0.0, "share of a GPU's dense rate that computation reaches; 0: what is assumed of its kind")
    intra_gb_s: float = setting(0.0, "GB/s from a GPU to the others of its node; 0: its kind's NVLink")
    inter_gb_s: float = setting(0.0, "GB/s from a node to the others, all its links together; 0: the maker's node")
    samples: int = setting(250_000_000, "pairs to be trained on, for the size of token shards (the paper: 250 million)")
    table: bool = setting(False, "the same run on 8 to 1024 GPUs as well")
    json: bool = setting(False, "everything as JSON")
    train: TrainConfig = section(TrainConfig)

    def __post_init__(self) -> None:
        require_at_least_one(self, ("nodes", "gpus_per_node", "samples"))
        for name in ("mfu", "intra_gb_s", "inter_gb_s"):
            if getattr(self, name) < 0:
                raise SettingError(f"{name}={getattr(self, name)} must be at least 0")
        if self.mfu > 1:
            raise SettingError(f"mfu={self.mfu} must be at most 1")


class CommandAboutARun(Command):
    """Takes the words of `smalti train` beside its own; its settings have those of the run in a section `train`."""

    def settings(self, words: list[str]) -> Any:
        """The settings; SettingError as `load_settings` raises it."""
        files, changes = split_words(words)
        keys = [field.name for field in fields(self.config)]
        theirs = {field.name for field in fields(TrainConfig)}
        own = [f"{key}={value}" for key, value in changes if key in keys]
        others = [(key.removeprefix(OWN), value) for key, value in changes if key not in keys]
        for key, _ in others:
            if key.split(".")[0] not in theirs:
                told = f"`smalti {self.verb}` has: {', '.join(keys)}; and all that `smalti train` has"
                raise SettingError(f"setting {key!r} does not exist; {told}")
        train = TRAIN.settings(files + [f"{key}={value}" for key, value in others])
        return replace(load_settings(self.config, own, self.presets), train=train)


def plan(config: PlanConfig) -> None:
    """Print the plan. UserError if the run does not fit."""
    cluster = cluster_of(config)
    sizes, _ = sizes_of(config.train)
    run = blueprint(resolved(config), sizes, cluster.world_size)
    memory = Memory(run)
    found: dict[str, Any] = outlook(memory, cluster, config.samples)
    usable = cluster.gpu.usable
    found |= {"gpu": {"name": config.gpu, "usable_bytes": usable}, "fits": memory.total <= usable}
    if config.table:
        found["table"] = scaling(run, cluster)
    print(json.dumps(found, indent=1) if config.json else as_text(found), flush=True)
    if memory.total > usable:
        raise UserError(refusal(run, cluster, config.gpu))


def cluster_of(config: PlanConfig) -> Cluster:
    gpu = GPUS[config.gpu]
    return Cluster(
        config.nodes, config.gpus_per_node, gpu, config.mfu or gpu.reached, config.intra_gb_s or gpu.link_gb_s,
        config.inter_gb_s or gpu.node_gb_s,
    )  # fmt: skip


def resolved(config: PlanConfig) -> TrainConfig:
    """The run's settings with the precision that the GPU would get. SettingError if the GPU does not have it."""
    train, has_bf16 = config.train, GPUS[config.gpu].has_bf16
    if train.precision == "bf16" and not has_bf16:
        raise SettingError(f"precision=bf16: a {config.gpu} does not compute in it; use precision=fp16-resblock")
    return replace(train, precision="bf16" if has_bf16 else "fp32") if train.precision == "auto" else train


def refusal(run: Blueprint, cluster: Cluster, gpu: str) -> str:
    """Why the run cannot be, and the fewest changes that were found to make it fit."""
    memory = Memory(run)
    usable = cluster.gpu.usable
    need = f"{memory.total / 1e9:.1f} GB a GPU do not fit in the {usable / 1e9:.1f} GB of a {gpu} that are left"
    found = changes_that_fit(run, cluster)
    if found:
        return f"{need}: use {', '.join(found)}"
    larger = [f"it fits {name}" for name, other in GPUS.items() if memory.total <= other.usable][:1]
    options = [*larger, *more_nodes(run, cluster)] or ["use more nodes or a smaller model"]
    return f"{need}, whatever is sharded, computed again or kept on the CPU: {'; or '.join(options)}"


def more_nodes(run: Blueprint, cluster: Cluster) -> list[str]:
    """The fewest nodes, as twice as many are tried again and again, on which the run fits with changes."""
    nodes = 2 * cluster.nodes
    while nodes <= MOST_NODES:
        try:
            there = run.on(nodes * cluster.gpus_per_node)
            found = changes_that_fit(there, replace(cluster, nodes=nodes))
        except SettingError:  # the batch is too small for so many
            return []
        if found or _fits(there, cluster, {}):
            return [f"use {', '.join([f'nodes={nodes}', *found])}"]
        nodes *= 2
    return []


def changes_that_fit(run: Blueprint, cluster: Cluster) -> list[str]:
    """Words for `smalti train`: changes are made one after the other until the run fits, then taken back if not needed.

    None, if nothing makes it fit.
    """
    taken: Changes = {}
    for key, value in _cures(run, cluster):
        taken |= {key: value}
        if _fits(run, cluster, taken):
            return [f"{key}={str(value).lower()}" for key, value in _needed(run, cluster, taken).items()]
    return []


def _cures(run: Blueprint, cluster: Cluster) -> Iterator[tuple[str, Any]]:
    """Cheapest first."""
    world, config = cluster.world_size, run.config
    yield "activation_checkpointing", "resblock"
    yield from (("accumulate", parts) for parts in _finer(run))
    yield "optim.moments", "16-bit"
    yield "zero_stage", 3
    shards = cluster.gpus_per_node
    while shards < world and world % shards == 0:
        if shards >= config.zero_shards:
            yield "zero_shards", shards
        shards *= 2
    yield "zero_shards", 0
    yield "offload_optimizer", True
    yield "offload_activations", True


def _finer(run: Blueprint) -> Iterator[int]:
    """Parts that the batch can be cut into: twice as many as it is, four times, ..."""
    parts = run.config.accumulate
    while run.config.data.batch % (2 * parts * run.world_size) == 0:
        parts *= 2
        yield parts


def _needed(run: Blueprint, cluster: Cluster, taken: Changes) -> Changes:
    """Of changes that fit together those that must be, and no more parts of a batch than must be."""
    for key in list(taken):
        rest = {other: value for other, value in taken.items() if other != key}
        taken = rest if _fits(run, cluster, rest) else taken
    if "accumulate" in taken:
        fewer = (taken | {"accumulate": parts} for parts in _finer(run))
        taken = next(changes for changes in fewer if _fits(run, cluster, changes))
    return taken


def _fits(run: Blueprint, cluster: Cluster, changes: Changes) -> bool:
    try:
        return Memory(run.on(run.world_size, _changed(run.config, changes))).total <= cluster.gpu.usable
    except SettingError:
        return False


def _changed(config: TrainConfig, changes: Changes) -> TrainConfig:
    """SettingError if they do not go together."""
    of_optim = {key.removeprefix("optim."): value for key, value in changes.items() if key.startswith("optim.")}
    others = {key: value for key, value in changes.items() if not key.startswith("optim.")}
    return replace(config, optim=replace(config.optim, **of_optim), **others)


COMMAND = CommandAboutARun("plan", PlanConfig, Path(__file__).parent / "configs" / "plan", plan, __doc__)

if __name__ == "__main__":
    sys.exit(run_command(COMMAND, sys.argv[1:]))
