"""What a run would be, without running it: `smalti train PRESET --dry-run`.

Needs no data, no GPU and no process group: the model is made on torch's meta device, and its sizes are the paper's
where no tokens are. The number of ranks is the launcher's; without one, a single group of zero_shards.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

from cluster.process import Place
from pretrain.config import TrainConfig
from pretrain.engine_start import deepspeed_settings
from pretrain.plan_memory import Memory
from pretrain.plan_report import Found, compression, memory_lines, parameter_lines, power_lines
from pretrain.plan_shape import Blueprint, blueprint, kinds, sizes_of


def dry_run(config: TrainConfig, place: Place, as_json: bool = False) -> None:
    """Print it. config.precision must be resolved. SettingError where settings, ranks and batch do not fit together;
    FolderError for folders of data that are damaged."""
    sizes, from_data = sizes_of(config)
    world_size = place.world_size if place.world_size > 1 else max(config.zero_shards, 1)
    found = about(blueprint(config, sizes, world_size)) | {"sizes": asdict(sizes) | {"from_data": from_data}}
    print(json.dumps(found, indent=1) if as_json else "\n".join(_lines(found)), flush=True)


def about(run: Blueprint) -> Found:
    """All figures, JSON-ready. PowerSGD is told as if there were replicas, though one group alone has none."""
    shards, ranks = run.topology.n_replicas, run.topology.shard_size
    replicated = run if shards > 1 or not run.config.zero_shards else _with_two_groups(run)
    memory = Memory(run)
    moment, held = memory.peak
    return {
        "parameters": {"total": run.numel, "kinds": kinds(run.weights)},
        "resblocks": resblocks(run),
        "shards": {"groups": shards, "ranks": ranks, "numel": run.shard_numel},
        "power_sgd": compression(Memory(replicated)),
        "memory": {"moment": moment, "kinds": held, "total": memory.total, "host": memory.host},
        "deepspeed": deepspeed_settings(run.config, run.world_size),
    }


def resblocks(run: Blueprint) -> list[dict[str, Any]]:
    """Those that are alike together: how many, numbers in one, and in a rank's shard of it."""
    names = list(run.model.resblocks())
    members: dict[str, list[Any]] = {name: [] for name in names}
    for weight in run.weights:
        if weight.resblock in members:
            members[weight.resblock].append(weight)
    rows: dict[tuple[str, int, int], list[str]] = {}
    for name, weights in members.items():
        kind = name.rpartition(".")[2]
        sizes = sum(weight.numel for weight in weights), sum(run.shard(weight) for weight in weights)
        rows.setdefault((kind, *sizes), []).append(name)
    return [
        {"kind": kind, "count": len(found), "numel": numel, "shard": shard, "first": found[0], "last": found[-1]}
        for (kind, numel, shard), found in rows.items()
    ]


def _with_two_groups(run: Blueprint) -> Blueprint:
    """The same with another copy of the state, and a batch twice as large."""
    data = replace(run.config.data, batch=2 * run.config.data.batch)
    return run.on(2 * run.world_size, replace(run.config, data=data))


def _lines(found: Found) -> Iterator[str]:
    sizes, shards = found["sizes"], found["shards"]
    source = "of the data" if sizes["from_data"] else "the paper's, for there is no data yet"
    vocabulary = f"vocabulary {sizes['text_vocab']}, codebook {sizes['codebook']}, grid {sizes['grid']}"
    yield f"Sizes         {vocabulary}: {source}"
    yield from parameter_lines(found)
    yield "Resblocks"
    for row in found["resblocks"]:
        yield (
            f"  {row['count']} x {row['kind']:<12}{row['numel']:>14,} numbers, {row['shard']:>13,} a rank   "
            f"{row['first']} to {row['last']}"
        )
    yield f"Shards        {shards['groups']} groups of {shards['ranks']} ranks, {shards['numel']:,} numbers a rank"
    yield from power_lines(found["power_sgd"])
    yield from memory_lines(found["memory"])
    yield "DeepSpeed"
    yield json.dumps(found["deepspeed"], indent=1)
