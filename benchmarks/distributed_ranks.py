"""One rank of a job that benchmarks/distributed.py starts: counts bytes on the wire, times steps; rank 0 prints JSON.

torchrun --standalone --nproc-per-node 4 -m benchmarks.distributed_ranks bytes
"""

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from cluster.power_sgd import PowerSGDConfig
from cluster.process import Place, joined_place
from cluster.topology import Seat, Topology
from data_pipeline.loader import LoaderConfig, TokenBatch, words_in
from pretrain.config import OptimConfig, TrainConfig, TransformerConfig
from pretrain.engine import Engine
from pretrain.engine_replicas import block_of, power_sgd
from pretrain.engine_shards import Piece
from pretrain.model import Sizes, Transformer, text_image_loss
from pretrain.optim import decay_groups

OPTIM = OptimConfig(clip=1.0)


@dataclass(frozen=True)
class Shape:
    """A model, and a batch of random tokens for it."""

    model: TransformerConfig
    sizes: Sizes
    batch: int

    def config(self, **settings: Any) -> TrainConfig:
        return TrainConfig(
            n_steps=1000, precision="fp32", optim=OPTIM, model=self.model, data=LoaderConfig(batch=self.batch),
            **settings,
        )  # fmt: skip

    def tokens(self, place: Place) -> TokenBatch:
        """This rank's part: other tokens on every rank."""
        local, random = self.batch // place.world_size, torch.Generator().manual_seed(place.rank)
        text = torch.randint(self.sizes.text_vocab, (local, self.model.n_text - 1), generator=random)
        image = torch.randint(self.sizes.codebook, (local, self.sizes.grid**2), generator=random)
        return TokenBatch(text, image, [str(number) for number in range(local)])


SMALL_VOCABULARY = Sizes(text_vocab=24, codebook=16, grid=4)  # so that little but matrices is sent
BYTES = Shape(TransformerConfig(n_text=8, n_layers=2, n_heads=2, d_head=32, conv_kernel=3), SMALL_VOCABULARY, 4)
BYTES_RANK = 16
SHAPES = {
    # pretrain/configs/emoji.toml, with its data's vocabulary
    "tiny": Shape(TransformerConfig(n_text=16, n_layers=4, n_heads=4, d_head=64), Sizes(1536, 1024, 8), 32),
    "small": Shape(TransformerConfig(n_text=32, n_layers=8, n_heads=8, d_head=64), Sizes(4096, 4096, 16), 8),
    "network": Shape(TransformerConfig(n_text=8, n_layers=4, n_heads=16, conv_kernel=3), SMALL_VOCABULARY, 4),
}  # fmt: skip


@contextmanager
def tapped(group: dist.ProcessGroup) -> Iterator[list[float]]:
    """Bytes that this rank sends in each collective of a group, as a ring would send them, counted at torch's door."""
    sent: list[float] = []
    others = dist.get_world_size(group) - 1
    shares = {  # of the bytes handed in
        "all_reduce": 2 * others / (others + 1),
        "all_to_all_single": others / (others + 1),
        "all_gather_single": others,
    }  # fmt: skip
    doors = {name: getattr(dist, name) for name in shares}

    def tap(name: str, share: float) -> Callable[..., Any]:
        def door(*tensors: Tensor, **options: Any) -> Any:
            if options.get("group") is group:
                sent.append(share * tensors[-1].nbytes)  # the input is the last or the only one
            return doors[name](*tensors, **options)

        return door

    try:
        for name, share in shares.items():
            setattr(dist, name, tap(name, share))
        yield sent
    finally:
        for name, door in doors.items():
            setattr(dist, name, door)


def engine_bytes(place: Place) -> dict[str, float]:
    """A step with and one without compression, 2 replicas of 2 shards; their difference is what is saved."""
    sent = {}
    for rank in (0, BYTES_RANK):
        power = PowerSGDConfig(rank=rank, start_step=0, wire="fp32")
        engine = Engine(BYTES.config(zero_stage=3, zero_shards=2, power_sgd=power), BYTES.sizes, place)
        assert engine._seat.replica_group is not None
        with tapped(engine._seat.replica_group) as bytes_sent:
            engine.step(0, BYTES.tokens(place))
        sent[rank] = sum(bytes_sent)
    d, n_layers, m = BYTES.model.d_model, BYTES.model.n_layers, 2
    matrices = 4 * 12 * d**2 * n_layers / m
    formula = BYTES_RANK * (m + 2) / (2 * d * m)
    return {"share": 1 - (sent[0] - sent[BYTES_RANK]) / matrices, "formula": formula, "whole": sent[0]}


def shard_bytes(place: Place) -> dict[str, float]:
    """What shard 0 of 8 sends to its one other replica for a layer; the 2 processes are ranks 0 and 8 of 16."""
    d, m, rank = 256, 8, 64
    group = dist.new_group([0, 1])
    seat = Seat(Topology(16, m), place.rank * m, replica_group=group)
    power = power_sgd(PowerSGDConfig(rank=rank, start_step=0, wire="fp32"), seat, place.device, seed=0)
    weights = {
        "attention.inner.qkv.weight": 3 * d, "attention.inner.out.weight": d,
        "mlp.inner.enter.weight": 4 * d, "mlp.inner.out.weight": 4 * d,
    }  # fmt: skip
    random = torch.Generator().manual_seed(place.rank)
    pieces = [
        Piece(f"layers.0.{name}", (rows, d), torch.randn(rows * d // m, generator=random))
        for name, rows in weights.items()
    ]
    with tapped(group) as bytes_sent:
        power.compress(block_of("layers.0", pieces))
    assert power.bytes_sent == sum(bytes_sent)
    whole = sum(piece.gradient.nbytes for piece in pieces)
    return {"share": sum(bytes_sent) / whole, "formula": rank * (m + 2) / (2 * d * m), "whole": whole}


def timed(work: Callable[[], object], steps: int) -> float:
    """Seconds a step, when all ranks are through."""
    dist.barrier()
    start = time.perf_counter()
    for _ in range(steps):
        work()
    dist.barrier()
    return (time.perf_counter() - start) / steps


def in_turns(works: dict[str, Callable[[], object]], rounds: int, steps: int) -> dict[str, list[float]]:
    """Seconds a step of each, round by round; each other round in the other order. The first steps are not timed."""
    for work in works.values():
        timed(work, 2)
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for number in range(rounds):
        for name in list(works)[:: 1 if number % 2 else -1]:
            seconds[name].append(timed(works[name], steps))
    return seconds


def steps_of(engine: Engine, batch: TokenBatch) -> Callable[[], object]:
    numbers = iter(range(10**6))
    return lambda: engine.step(next(numbers), batch)


def plain_steps(shape: Shape, batch: TokenBatch) -> Callable[[], object]:
    """The same update of the same model without DeepSpeed: torch's data parallelism, clipping, and fused AdamW."""
    torch.manual_seed(0)
    model = Transformer(shape.model, shape.sizes)
    groups = decay_groups(model, OPTIM.weight_decay)
    optimizer = torch.optim.AdamW(groups, OPTIM.lr, (OPTIM.beta1, OPTIM.beta2), OPTIM.eps, fused=True)
    parallel, n_words = DistributedDataParallel(model), float(words_in(batch))

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        text, image = parallel(batch.text, batch.image)
        text_image_loss(text, image, batch.text, batch.image, 0.125, n_words).total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIM.clip)
        optimizer.step()

    return step


def ddp(place: Place, name: str, rounds: str, steps: str) -> dict[str, Any]:
    shape = SHAPES[name]
    batch = shape.tokens(place)
    works = {"engine": steps_of(Engine(shape.config(zero_stage=1), shape.sizes, place), batch)}
    works["plain"] = plain_steps(shape, batch)
    seconds = in_turns(works, int(rounds), int(steps))
    ratios = [ours / theirs for ours, theirs in zip(seconds["engine"], seconds["plain"], strict=True)]
    return {"ratios": ratios} | {key: statistics.median(values) for key, values in seconds.items()}


def network(place: Place, shards: str, rank: str, rounds: str, link: str) -> dict[str, Any]:
    """Steps of 2 replicas with and without compression, seconds round by round; the bytes that crossed the link each
    way, and this rank's CPU seconds of a compressed step. In bfloat16, so that weights are gathered in few bytes."""
    shape, works = SHAPES["network"], {}
    batch = shape.tokens(place)
    for name, r in (("whole", 0), ("compressed", int(rank))):
        power = PowerSGDConfig(rank=r, start_step=0)
        config = replace(shape.config(zero_stage=3, zero_shards=int(shards), power_sgd=power), precision="bf16")
        works[name] = steps_of(Engine(config, shape.sizes, place), batch)
    seconds = in_turns(works, int(rounds), 1)
    counter = Path("/sys/class/net") / link / "statistics/tx_bytes"
    crossed, cpu = {}, 0.0
    for name, work in works.items():
        before, cpu_before = int(counter.read_text()), time.process_time()
        timed(work, 1)
        crossed[name], cpu = int(counter.read_text()) - before, time.process_time() - cpu_before
    return {"bytes": crossed, "cpu": cpu} | seconds


WORK: dict[str, Callable[..., dict[str, Any]]] = {
    "bytes": engine_bytes, "shard-bytes": shard_bytes, "ddp": ddp, "network": network,
}  # fmt: skip


def main() -> None:
    torch.set_num_threads(1)
    with joined_place(timeout_minutes=5.0) as place:
        answer = WORK[sys.argv[1]](place, *sys.argv[2:])
        if place.is_main:
            print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
