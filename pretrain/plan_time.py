"""How long an update takes: what is computed, what crosses links and networks, and what of that waits for what.

Ring formulas: of S bytes an all-reduce among N sends 2 S (N - 1) / N from each rank, an all-gather or a reduce-scatter
half of that. A ring over nodes leaves each node once; ranks of a node that are in different rings leave it each.
Rates are assumptions (plan_machines.py), so the seconds are expectations, not measurements.
"""

from dataclasses import dataclass
from functools import cached_property

from pretrain.model import Linear
from pretrain.plan_machines import Gpu
from pretrain.plan_memory import ERROR_BYTES, Memory

FP32_REACHED = 0.5  # of the float32 rate, by the thin products of PowerSGD: assumed
MEMORY_REACHED = 0.8  # of the memory's rate, by the update: assumed
LINK_REACHED = 0.75  # of a link's or a network's rate, by NCCL's rings: assumed


@dataclass(frozen=True)
class Cluster:
    """Nodes of equal GPUs; one-way GB/s of a GPU inside its node, and of a node to the others."""

    nodes: int
    gpus_per_node: int
    gpu: Gpu
    reached: float
    intra_gb_s: float
    inter_gb_s: float

    @property
    def world_size(self) -> int:
        return self.nodes * self.gpus_per_node


@dataclass(frozen=True)
class Traffic:
    """Bytes of an update: what a GPU sends in its node's links, and what a node sends to the others."""

    intra: float = 0.0
    inter: float = 0.0

    def seconds(self, cluster: Cluster) -> float:
        """With both at work at once."""
        inside = self.intra / (cluster.intra_gb_s * 1e9)
        between = self.inter / (cluster.inter_gb_s * 1e9)
        return max(inside, between) / LINK_REACHED


@dataclass(frozen=True)
class Flops:
    """Of one sample: forward in the resblocks, split, and in the heads. Backward is twice as much."""

    attention: float
    mlp: float
    heads: float

    @property
    def model(self) -> float:
        """Forward and backward: what MFU counts."""
        return 3 * (self.attention + self.mlp + self.heads)

    def recomputed(self, what: str) -> float:
        """For want of activations."""
        return {"none": 0.0, "attention": self.attention, "resblock": self.attention + self.mlp}[what]


class Step:
    """An update of a run on a cluster."""

    def __init__(self, memory: Memory, cluster: Cluster) -> None:
        self.memory, self.plan, self.cluster = memory, memory.plan, cluster

    @cached_property
    def flops(self) -> Flops:
        """2 x weights x slots, and 4 H D x the pairs that a layer's mask allows."""
        model = self.plan.model
        layout, sparsities = model.layout, model.sparsities(model.layout)
        pairs = {sparsity: int(sparsity.mask().sum()) for sparsity in set(sparsities)}
        found = {
            "attention": 4.0 * model.config.d_model * sum(pairs[one] for one in sparsities),
            "mlp": 0.0,
            "heads": 0.0,
        }
        slots = {"text_head": model.config.n_text - 1, "image_head": layout.n_image}
        for name, module in model.named_modules():
            if isinstance(module, Linear):
                kind = "heads" if name in slots else "mlp" if ".mlp." in name else "attention"
                found[kind] += 2.0 * module.in_features * module.out_features * slots.get(name, layout.n_slots)
        return Flops(**found)

    @cached_property
    def shard_traffic(self) -> Traffic:
        """Among the ranks that share a copy of the state."""
        plan, config, n = self.plan, self.plan.config, self.memory.n_shards
        part = (n - 1) / n
        whole = plan.weight_bytes * plan.numel * part
        if config.zero_stage == 3:
            sent = config.accumulate * 3 * whole  # gathered forward and backward, gradients reduced and scattered
        else:
            reductions = config.accumulate if config.zero_stage == 2 else 1
            sent = reductions * 2 * whole + whole  # all of the gradients, then the new weights
        return Traffic(sent, sent if n > self.cluster.gpus_per_node else 0.0)

    def replica_traffic(self, compressed: bool = True) -> Traffic:
        """Between the copies, of factors and of what is not compressed; or of all gradients as they are."""
        topology, gpus = self.plan.topology, self.cluster.gpus_per_node
        n = topology.n_replicas
        if n == 1:
            return Traffic()
        handed = self.bytes_handed if compressed else 4 * self.plan.shard_numel
        sent = 2 * handed * (n - 1) / n
        rings = min(topology.shard_size, gpus)
        leaves = self.cluster.nodes > 1
        return Traffic(sent if topology.shard_size < gpus else 0.0, rings * sent if leaves else 0.0)

    @property
    def bytes_handed(self) -> int:
        """To all-reduces between replicas, by a rank in an update; after power_sgd.start_step."""
        memory = self.memory
        whole = self.plan.shard_numel - memory.compressed
        return 4 * whole + ERROR_BYTES[self.plan.config.power_sgd.wire] * memory.factor_numbers

    @cached_property
    def seconds(self) -> dict[str, float]:
        """By what is waited for; their sum is the update's time.

        Stage 3 gathers and reduces while it computes; stages 1 and 2 reduce when they are done, and so do replicas.
        """
        compute, shards = self.compute, self.shard_traffic.seconds(self.cluster)
        hidden = compute if self.plan.config.zero_stage == 3 else 0.0
        return {
            "computation": compute,
            "exposed traffic of shards": max(0.0, shards - hidden),
            "traffic between replicas": self.replica_traffic().seconds(self.cluster),
            "PowerSGD's products": self.compression,
            "update": self.update,
        }

    @property
    def compute(self) -> float:
        """Seconds of forward, recomputation and backward, if nothing waits."""
        config, gpu = self.plan.config, self.cluster.gpu
        flops = self.flops.model + self.flops.recomputed(config.activation_checkpointing)
        rate = gpu.tflops_fp32 if config.precision == "fp32" else gpu.tflops
        return flops * self.plan.samples * config.accumulate / (rate * 1e12 * self.cluster.reached)

    @property
    def compression(self) -> float:
        """Seconds of E start, E' P and P Q': 6 n k r each matrix. The orthogonalisation is not counted."""
        flops = sum(6 * n * k * rank * count for n, k, rank, count in self.memory.factors)
        return flops / (self.cluster.gpu.tflops_fp32 * 1e12 * FP32_REACHED)

    @property
    def update(self) -> float:
        """Seconds to read and write the shard's masters, gradients and moments, and write the weights."""
        if self.plan.config.offload_optimizer:
            return 0.0  # it waits for the CPU, whose rate is not known here
        kept = self.memory.moments["update"]
        n_bytes = (
            2 * (kept["float32 masters"] + kept["moments"]) + (12 + self.plan.weight_bytes) * self.plan.shard_numel
        )
        return n_bytes / (self.cluster.gpu.memory_gb_s * 1e9 * MEMORY_REACHED)

    @property
    def total(self) -> float:
        """Seconds of an update."""
        return sum(self.seconds.values())

    @property
    def mfu(self) -> float:
        """Model FLOPs over what all GPUs could do in that time: recomputation and waiting make it less."""
        config, gpu = self.plan.config, self.cluster.gpu
        return self.flops.model * config.data.batch / (gpu.tflops * 1e12 * self.plan.world_size * self.total)
