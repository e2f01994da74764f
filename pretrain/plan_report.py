"""What `smalti plan` tells: every figure of a plan as plain values, and these as text."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from cluster.settings import SettingError
from pretrain.config import TrainConfig
from pretrain.engine_start import deepspeed_settings
from pretrain.plan_memory import Memory
from pretrain.plan_shape import Blueprint, Weight, kinds
from pretrain.plan_time import Cluster, Step

WORLDS = (8, 16, 32, 64, 128, 256, 512, 1024)
TAR_BLOCK, NPY_HEADER, CAPTION_BLOCKS = 512, 128, 1  # bytes, bytes, blocks: few captions are longer than 512 bytes
Found = dict[str, Any]


def outlook(memory: Memory, cluster: Cluster, samples: int) -> Found:
    """All figures of a plan, JSON-ready."""
    run, step = memory.plan, Step(memory, cluster)
    config = run.config
    moment, held = memory.peak
    kept = checkpoints_kept(config)
    return {
        "run": {"nodes": cluster.nodes, "gpus": run.world_size, "batch": config.data.batch, "steps": config.n_steps,
                "precision": config.precision, "samples_at_once": run.samples},
        "parameters": {"total": run.numel, "kinds": kinds(run.weights)},
        "shards": {"groups": run.topology.n_replicas, "ranks": run.topology.shard_size, "numel": run.shard_numel},
        "power_sgd": compression(memory),
        "memory": {"moment": moment, "kinds": held, "total": memory.total, "host": memory.host,
                   "theirs": theirs(run) if config.precision.startswith("fp16") else None},
        "stages": stages(run),
        "traffic": {"intra": step.shard_traffic.intra + step.replica_traffic().intra,
                    "inter": step.shard_traffic.inter + step.replica_traffic().inter,
                    "inter_without_power_sgd": step.shard_traffic.inter + step.replica_traffic(False).inter},
        "time": {"assumed_mfu": cluster.reached, "seconds": step.seconds, "step": step.total, "mfu": step.mfu,
                 "days": step.total * config.n_steps / 86_400,
                 "model_flops": step.flops.model * config.data.batch},
        "disk": {"checkpoint": memory.checkpoint, "kept": kept, "sample": sample_bytes(run.sizes.grid),
                 "tokens": samples * sample_bytes(run.sizes.grid), "samples": samples},
        "deepspeed": deepspeed_settings(config, run.world_size),
    }  # fmt: skip


def checkpoints_kept(config: TrainConfig) -> int:
    """At the end of a run; there is one more while a new one is written."""
    return config.keep_last + (config.n_steps // config.keep_every if config.keep_every else 0)


def compression(memory: Memory) -> Found:
    """What PowerSGD does to this rank's gradients of matrices."""
    ranks = sorted({rank for _, _, rank, _ in memory.factors if rank})
    saved = 1 - memory.factor_numbers / memory.compressed if memory.compressed else 0.0
    return {"shard_ranks": ranks, "saved": saved, "numbers": memory.compressed, "factors": memory.factor_numbers}


def theirs(run: Blueprint) -> int:
    """Bytes a GPU that the authors' own implementation kept, without activations and buffers.

    16-bit weights, 16-bit moments, and 16-bit error buffers into which gradients are added; gains, biases and
    embeddings in 32 bits with their gradients and moments (Ramesh et al. 2021, appendices D and E.2).
    """

    def each(weight: Weight) -> int:
        return 8 if weight.name.startswith("layers.") and len(weight.shape) > 1 else 16

    return sum(each(weight) * run.shard(weight) for weight in run.weights)


def stages(run: Blueprint) -> dict[str, Found]:
    """Memory at each ZeRO stage, without and with recomputation of resblocks."""
    config, found = run.config, {}
    cases = {"1": (1, 0), "2": (2, 0), "3": (3, 0)}
    if config.zero_shards:
        cases[f"3 in {config.zero_shards}"] = (3, config.zero_shards)
    for name, (stage, shards) in cases.items():
        totals: dict[str, Memory] = {}
        for recompute in ("none", "resblock"):
            other = replace(
                config, zero_stage=stage, zero_shards=shards, activation_checkpointing=recompute,
                offload_activations=config.offload_activations and recompute != "none",
            )  # fmt: skip
            totals[recompute] = Memory(run.on(run.world_size, other))
        shown = totals["none" if config.activation_checkpointing == "none" else "resblock"].peak
        found[name] = {"kinds": shown[1], "none": totals["none"].total, "resblock": totals["resblock"].total}
    return found


def scaling(run: Blueprint, cluster: Cluster) -> list[Found]:
    """The run on other numbers of GPUs, with as many samples at once on each: of few the batch is accumulated."""
    rows = []
    for world in WORLDS:
        row: Found = {"gpus": world}
        try:
            config = accumulated(run.config, world, run.samples)
            nodes = -(-world // cluster.gpus_per_node)
            there = replace(cluster, nodes=nodes, gpus_per_node=min(world, cluster.gpus_per_node))
            memory = Memory(run.on(world, config))
            step = Step(memory, there)
            row |= {"replicas": run.on(world, config).topology.n_replicas, "accumulate": config.accumulate,
                    "memory": memory.total, "fits": memory.total <= cluster.gpu.usable,
                    "inter": step.shard_traffic.inter + step.replica_traffic().inter, "step": step.total,
                    "mfu": step.mfu, "days": step.total * config.n_steps / 86_400}  # fmt: skip
        except SettingError as error:
            row["refused"] = str(error)
        rows.append(row)
    return rows


def accumulated(config: TrainConfig, world: int, samples: int) -> TrainConfig:
    """With parts of a batch such that a rank passes at most `samples` at once, where the batch can be cut so."""
    per_rank = max(1, config.data.batch // world)
    parts = next(count for count in range(max(1, per_rank // samples), per_rank + 1) if per_rank % count == 0)
    return replace(config, accumulate=parts)


def sample_bytes(grid: int) -> int:
    """Of a sample in a shard of tokens: two members of a tar, uint16 codes and a caption, in blocks of 512 bytes."""
    codes = -(-(NPY_HEADER + 2 * grid**2) // TAR_BLOCK)
    return TAR_BLOCK * (1 + codes + 1 + CAPTION_BLOCKS)


def as_text(found: Found) -> str:
    """The same for people."""
    return "\n".join(_lines(found))


def _lines(found: Found) -> Iterator[str]:
    run, gpu, shards = found["run"], found["gpu"], found["shards"]
    nodes = "1 node" if run["nodes"] == 1 else f"{run['nodes']} nodes"
    yield (
        f"{run['gpus']} {gpu['name']} in {nodes}, batch {run['batch']}, {run['steps']} updates, "
        f"{run['precision']}, {run['samples_at_once']} samples at once on each"
    )
    yield from parameter_lines(found)
    yield f"Shards        {shards['groups']} groups of {shards['ranks']} ranks, {shards['numel']:,} numbers a rank"
    yield from power_lines(found["power_sgd"])
    yield ""
    yield f"Memory a GPU at each ZeRO stage, GB ({gigabytes(gpu['usable_bytes'])} usable)"
    yield from _stage_lines(found["stages"])
    yield from memory_lines(found["memory"])
    if found["memory"]["theirs"]:
        yield (
            f"              the authors kept {gigabytes(found['memory']['theirs'])} GB a GPU beside activations: "
            "16-bit weights, and gradients\n              added into error buffers; here weights are float32, twice, "
            "and gradients are apart from error buffers"
        )
    yield ""
    yield from _traffic_lines(found["traffic"])
    yield from _time_lines(found["time"])
    yield from _disk_lines(found["disk"])
    if "table" in found:
        yield ""
        yield from _table_lines(found["table"])


def parameter_lines(found: Found) -> Iterator[str]:
    yield f"Parameters    {found['parameters']['total']:,}"
    for kind, numel in found["parameters"]["kinds"].items():
        yield f"  {kind:<28}{numel:>18,}"


def power_lines(power: Found) -> Iterator[str]:
    if power["numbers"]:
        ranks = " and ".join(map(str, power["shard_ranks"]))
        yield (
            f"PowerSGD      rank {ranks} a shard, {power['saved']:.1%} saved: {power['factors']:,} of "
            f"{power['numbers']:,} numbers"
        )


def memory_lines(memory: Found) -> Iterator[str]:
    yield f"Memory        {gigabytes(memory['total'])} GB a GPU at most, in {memory['moment']}:"
    for kind, n_bytes in memory["kinds"].items():
        yield f"  {kind:<28}{gigabytes(n_bytes):>10}"
    for kind, n_bytes in memory["host"].items():
        yield f"  on the host: {kind:<28}{gigabytes(n_bytes):>10}"


def _stage_lines(stages: dict[str, Found]) -> Iterator[str]:
    names = list(dict.fromkeys(kind for stage in stages.values() for kind in stage["kinds"]))
    yield f"  {'':<28}" + "".join(f"{name:>10}" for name in stages)
    for name in names:
        yield f"  {name:<28}" + "".join(f"{gigabytes(stage['kinds'].get(name, 0)):>10}" for stage in stages.values())
    for key, text in (("none", "all, activations kept"), ("resblock", "all, resblocks recomputed")):
        yield f"  {text:<28}" + "".join(f"{gigabytes(stage[key]):>10}" for stage in stages.values())


def _traffic_lines(traffic: Found) -> Iterator[str]:
    yield f"Traffic       {gigabytes(traffic['intra'])} GB an update from each GPU in its node"
    yield (
        f"              {gigabytes(traffic['inter'])} GB from each node to others; without PowerSGD "
        f"{gigabytes(traffic['inter_without_power_sgd'])}"
    )


def _time_lines(time: Found) -> Iterator[str]:
    days = f"{time['days']:.1f} days for all, MFU {time['mfu']:.0%}"
    yield f"Time          {time['step']:.2f} s an update expected, {days}"
    yield f"              assumed: computation reaches {time['assumed_mfu']:.0%} of the dense rate while nothing waits"
    for kind, seconds in time["seconds"].items():
        yield f"  {kind:<28}{seconds:>10.3f}"


def _disk_lines(disk: Found) -> Iterator[str]:
    whole = disk["checkpoint"] * disk["kept"]
    yield (
        f"Disk          {gigabytes(whole)} GB for {disk['kept']} checkpoints of {gigabytes(disk['checkpoint'])} "
        "(one more while a new one is written)"
    )
    pairs = f"{disk['samples']:,} pairs, {disk['sample']} bytes each"
    yield f"              {gigabytes(disk['tokens'])} GB for tokens of {pairs}"


def _table_lines(rows: list[Found]) -> Iterator[str]:
    yield f"{'GPUs':>6}{'groups':>8}{'parts':>7}{'GB a GPU':>10}{'GB sent':>9}{'s a step':>10}{'MFU':>6}{'days':>9}"
    for row in rows:
        if "refused" in row:
            yield f"{row['gpus']:>6}  {row['refused']}"
            continue
        fits = "" if row["fits"] else "  does not fit"
        yield (
            f"{row['gpus']:>6}{row['replicas']:>8}{row['accumulate']:>7}{gigabytes(row['memory']):>10}"
            f"{gigabytes(row['inter']):>9}{row['step']:>10.2f}{row['mfu']:>6.0%}{row['days']:>9.1f}{fits}"
        )


def gigabytes(n_bytes: float) -> str:
    """10^9 bytes, with two digits behind the point where they matter."""
    return f"{n_bytes / 1e9:,.2f}" if n_bytes < 1e10 else f"{n_bytes / 1e9:,.1f}"
