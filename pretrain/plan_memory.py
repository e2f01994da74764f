"""What a rank holds, in bytes by kind, at the moments of an update when it holds most.

Counted after what engine.py has DeepSpeed 0.19.8 allocate, which is more than papers count: at every stage a float32
copy of the shard beside the weights, a bucket of 5e8 gradients, at stage 3 weights that stay gathered because
they are needed again within 1e9 numbers. test_plan.py holds it against the memory of real processes: within 10 %
on 1 and 2 ranks, stages 1 to 3, float32 and bf16, with and without recomputation. Not counted, for they depend on
the machine: the workspaces of libraries (plan_machines.py keeps memory free for these).
"""

from collections.abc import Iterator
from functools import cached_property

import torch

from cluster.power_sgd import shard_rank
from pretrain.adamw import DTYPES
from pretrain.engine_replicas import block_of
from pretrain.engine_shards import Piece
from pretrain.optim import REST
from pretrain.plan_shape import Blueprint, Weight

Bytes = dict[str, int]  # by kind

ERROR_BYTES = {"fp32": 4, "bf16": 2, "1-6-9": 2}  # of a number, in error buffers and on the wire


class Memory:
    """Of a rank of a run."""

    def __init__(self, plan: Blueprint) -> None:
        """SettingError if the ranks or the batch do not come out even."""
        self.plan, self.config = plan, plan.config
        self.n_shards, self.limits = plan.topology.shard_size, plan.limits
        self.stage = self.config.zero_stage

    @cached_property
    def moments(self) -> dict[str, Bytes]:
        """Each with all that is held then."""
        found = {"loss": self._kept | self._forward}
        for share, name in ((1.0, "backward, start"), (self._share_at_flush, "backward, first reduction"),
                            (0.0, "backward, end")):  # fmt: skip
            found[name] = self._kept | self._backward(share, name != "backward, start")
        return found | {"update": self._kept | self._update}

    @property
    def peak(self) -> tuple[str, Bytes]:
        """The moment when most is held, and what."""
        return max(self.moments.items(), key=lambda item: sum(item[1].values()))

    @property
    def total(self) -> int:
        """Bytes at the peak."""
        return sum(self.peak[1].values())

    @cached_property
    def host(self) -> Bytes:
        """What a rank keeps in the memory of its node."""
        shard, found = self.plan.shard_numel, {}
        if self.config.optim.average_every:
            found["average, and where it arrives"] = 2 * 4 * shard
        if self.config.offload_optimizer:
            found["masters, moments, gradients"] = 8 * shard + self._moments
        if self.config.offload_activations:
            found["activations"] = self._streams
        return found | {"snapshot of a checkpoint": self.checkpoint // self.n_shards}

    @property
    def checkpoint(self) -> int:
        """Bytes of a checkpoint on the disk; one replica's shards are saved."""
        masters = 4 * self.plan.shard_numel * self.n_shards
        weights = self.plan.weight_bytes * self.plan.numel if self.stage < 3 else 0
        average = masters if self.config.optim.average_every else 0
        errors = 4 * self.compressed * self.n_shards
        return masters + self._moments * self.n_shards + weights + average + errors

    @cached_property
    def factors(self) -> list[tuple[int, int, int, int]]:
        """(rows, columns, rank, how many) of the matrices that this rank compresses; rank 0: sent whole."""
        if self.plan.topology.n_replicas == 1:
            return []
        found: dict[tuple[int, int, int], int] = {}
        for weight in self.plan.weights:
            for rows, columns in self._matrices(weight):
                shape = rows, columns, shard_rank((rows, columns), self.config.power_sgd, self.n_shards)
                found[shape] = found.get(shape, 0) + 1
        return [(*shape, count) for shape, count in found.items()]

    @property
    def compressed(self) -> int:
        """Numbers of this rank's gradients that are sent as factors."""
        return sum(n * k * count for n, k, rank, count in self.factors if rank)

    @property
    def factor_numbers(self) -> int:
        """Numbers in the factors P and Q of this rank."""
        return sum((n + k) * rank * count for n, k, rank, count in self.factors)

    def _matrices(self, weight: Weight) -> Iterator[tuple[int, int]]:
        piece = Piece(weight.name, weight.shape, torch.empty(self.plan.shard(weight), device="meta"))
        block = block_of(weight.resblock, [piece])
        return ((matrix.shape[0], matrix.shape[1]) for matrix in block.matrices.values())

    @cached_property
    def _kept(self) -> Bytes:
        """From the first update to the last."""
        plan, shard = self.plan, self.plan.shard_numel
        config, found = self.config, {"weights": plan.weight_bytes * (shard if self.stage == 3 else plan.numel)}
        if not config.offload_optimizer:
            found |= {"float32 masters": 4 * shard, "moments": self._moments}
        if self.compressed:
            starts = sum(max(n, k) * rank * count for n, k, rank, count in self.factors)
            found["error buffers"] = ERROR_BYTES[config.power_sgd.errors] * self.compressed
            found["PowerSGD starts"] = 4 * starts
        return found

    @cached_property
    def _moments(self) -> int:
        return sum(2 * DTYPES[weight.moments].itemsize * self.plan.shard(weight) for weight in self.plan.weights)

    @property
    def _forward(self) -> Bytes:
        """Logits as the loss makes them: float32 ones and their log-softmax, then that of both and two gradients."""
        sizes, samples = self.plan.sizes, self.plan.samples
        text = 4 * samples * (self.config.model.n_text - 1) * sizes.text_vocab
        image = 4 * samples * sizes.grid**2 * sizes.codebook
        narrow = image // 2 if self.config.precision == "bf16" else 0
        logits = max(2 * (text + image), text + 3 * image + narrow)
        return {"activations": self._activations, "logits": logits} | self._gathered(0) | self._gradients(None)

    def _backward(self, share: float, reduces: bool) -> Bytes:
        """With a share of the activations still kept. reduces: the bucket is being emptied."""
        plan, nd = self.plan, self.plan.slots * self.config.model.d_model
        largest = max(weight.numel for weight in plan.weights)
        narrow = 2 * largest if self.config.precision.startswith("fp16") else 0  # of a weight, and its gradient
        workspace = nd * (4 + 9 * plan.branch_bytes) + 2 * narrow + plan.weight_bytes * largest * (share > 0)
        found = {"activations": max(int(share * self._activations), self._live), "workspace": workspace}
        found |= self._gathered(1 - share)
        if not reduces:
            return found | self._gradients(0)
        if self.stage == 1:
            return found | self._gradients(1 - share)
        return found | self._gradients(1) | {"being reduced": self._reduced}

    @property
    def _update(self) -> Bytes:
        """The gradients of a group side by side, or those of a bucket that are not reduced yet (stage 1)."""
        plan, found = self.plan, self._gradients(1)
        bucket = self.limits.bucket
        if self.stage == 1 and not self.config.offload_optimizer:
            waiting = plan.weight_bytes * (plan.numel - min(plan.numel, bucket))
            arrived = max(self._partition, self._reduced)
            return found | {"gradients": waiting + arrived}
        groups: dict[int, int] = {}
        for weight in plan.weights:
            groups[weight.group] = groups.get(weight.group, 0) + plan.shard(weight)
        found["gradients of a group"] = 0 if self.config.offload_optimizer else 4 * max(groups.values())
        if self.factor_numbers:
            found["PowerSGD factors"] = 4 * self.factor_numbers
        return found

    def _gradients(self, share: float | None) -> Bytes:
        """With a share of the backward pass done; None is before it, when stages 1 and 2 have no bucket yet."""
        plan, size = self.plan, self.plan.weight_bytes
        bucket = {"bucket": size * self.limits.bucket * (self.stage == 3 or share is not None)}
        if self.stage == 3:
            return bucket | {"gradients": 0 if self.config.offload_optimizer else 4 * plan.shard_numel}
        earlier = (share or 0.0) if self.config.accumulate == 1 else 1.0
        if self.stage == 1:
            return bucket | {"gradients": int(earlier * size * plan.numel)}
        return bucket | {"gradients": 0 if self.config.offload_optimizer else int(earlier * self._partition)}

    @property
    def _share_at_flush(self) -> float:
        """Of the activations, when the bucket is full for the first time."""
        return max(0.0, 1 - self.limits.bucket / self.plan.numel)

    @property
    def _reduced(self) -> int:
        """Copies of a full bucket on its way."""
        plan, full = self.plan, min(self.limits.bucket, self.plan.numel)
        if self.stage < 3:
            is_copied = self.n_shards > 1 or (self.stage == 2 and plan.weight_bytes == 2)
            return plan.weight_bytes * full * is_copied
        return plan.weight_bytes * full + (4 * full // self.n_shards if plan.weight_bytes == 2 else 0)

    @cached_property
    def _partition(self) -> int:
        """Bytes of the reduced gradients that a rank keeps at stages 1 and 2: whole parameters if they are float32 or
        it is stage 1, wherever its part of a group begins and ends; of the rank that has most of a few."""
        plan, n = self.plan, self.n_shards
        if self.stage == 2 and plan.weight_bytes == 2:
            return 4 * plan.shard_numel
        return max(self._touched(rank) for rank in {0, n // 3, n // 2, n - 1}) * plan.weight_bytes

    def _touched(self, rank: int) -> int:
        """Numbers in the parameters of which a rank updates a part."""
        groups: dict[int, list[int]] = {}
        for weight in self.plan.weights:
            groups.setdefault(weight.group, []).append(weight.numel)
        total = 0
        for numels in groups.values():
            width, at = -(-sum(numels) // self.n_shards), 0
            for numel in numels:
                total += numel if at < (rank + 1) * width and at + numel > rank * width else 0
                at += numel
        return total

    @cached_property
    def _activations(self) -> int:
        """What the backward pass reads. The stream is float32; a branch keeps the norm's output, queries, keys, values,
        what attention gives and its log-sum-exp; the norm's output and 1.702 times what enters the activation."""
        model, plan = self.config.model, self.plan
        nd, n_layers = plan.slots * model.d_model, model.n_layers
        attention, mlp = self._branches
        kept = {"none": attention + mlp, "attention": mlp, "resblock": 0}[self.config.activation_checkpointing]
        streams = 0 if self.config.offload_activations else self._streams
        head = (4 + (2 if self.config.precision == "bf16" else 4)) * nd
        return streams + n_layers * kept + head

    @property
    def _streams(self) -> int:
        return 2 * self.config.model.n_layers * 4 * self.plan.slots * self.config.model.d_model

    @property
    def _branches(self) -> tuple[int, int]:
        """Bytes of one attention resblock and of one MLP without the stream."""
        plan, model = self.plan, self.config.model
        nd = plan.slots * model.d_model * plan.branch_bytes
        return 5 * nd + plan.slots * (4 * model.n_heads + 8), 5 * nd + 8 * plan.slots

    @property
    def _live(self) -> int:
        """Of the resblock whose backward pass is running."""
        return max(self._branches) if self.config.activation_checkpointing == "resblock" else 0

    def _gathered(self, share: float) -> Bytes:
        """Weights that are whole at stage 3 with a share of the backward pass done: small ones always, those that are
        used again soon, those in use, and those fetched ahead, twice, for they are copied where they arrive. One rank
        copies none."""
        if self.stage < 3 or self.n_shards == 1:
            return {}
        plan, limits = self.plan, self.limits
        large = [weight for weight in plan.weights if weight.numel > limits.persist]
        small = plan.numel - sum(weight.numel for weight in large)
        passes = 3 if self.config.activation_checkpointing == "resblock" else 2
        kept = after = 0
        for weight in reversed(large):
            is_viewed = passes == 2 and weight.name.endswith("mlp.inner.out.weight")  # by its transpose, till backward
            is_near = passes * after < limits.reuse
            kept += weight.numel if (is_near or is_viewed) and after >= share * plan.numel else 0
            after += weight.numel
        blocks: dict[str, int] = {}  # resblocks are computed again whole, else a weight is used on its own
        for weight in large:
            key = weight.resblock if passes == 3 and weight.resblock != REST else weight.name
            blocks[key] = blocks.get(key, 0) + weight.numel
        ahead = max(limits.prefetch, max(weight.numel for weight in plan.weights))
        whole = min(plan.numel, small + kept + max(blocks.values(), default=0) + ahead)
        return {"gathered weights": plan.weight_bytes * (whole + min(ahead, plan.numel))}
