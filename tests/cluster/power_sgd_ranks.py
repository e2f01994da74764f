"""What four processes with a process group check about PowerSGD; run by test_power_sgd."""

import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook

from cluster.power_sgd import Arithmetic, Block, PowerSGD, PowerSGDConfig, gaussian
from cluster.topology import Seat, Topology, take_seat
from tests.cluster.power_sgd_cases import (
    ARITHMETIC,
    CPU,
    LIMIT,
    PLAIN,
    RANK,
    SHAPES,
    block_of,
    copies,
    gradient,
    one_update,
    power_sgd,
)
from tests.cluster.power_sgd_simulation import SimulatedMatrix

WORLD = 4
COMPRESSED = ("wide", "tall", "square")
SECONDS = 150  # the job takes about 15 on two cores; no process outlives this


def run_on_four_ranks(folder: Path) -> None:
    """Raises what a rank raised."""
    job = mp.spawn(_be_one_of_four, (folder,), nprocs=WORLD, join=False)
    until = time.monotonic() + SECONDS
    try:
        while not job.join(timeout=1.0):
            assert time.monotonic() < until, "the four ranks hang"
    finally:
        for process in job.processes:
            process.kill()


def _be_one_of_four(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), WORLD)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD, timeout=timedelta(seconds=60))
    try:
        seats = {size: take_seat(Topology(WORLD, size), rank) for size in (1, 2, 4)}
        check_groups(seats)
        for size, start in ((1, "fixed"), (2, "fixed"), (2, "warm")):
            check_definition(seats[size], start)
        for errors, wire in (("fp32", "fp32"), ("bf16", "bf16"), ("1-6-9", "1-6-9")):
            check_nothing_is_lost(seats[1], errors, wire)
        check_infinities(seats[2])
        check_overflow_of_one_replica(seats[2])
        check_restored_sum(seats)
        check_restart(seats[2])
        check_bytes(rank, seats[1])
        check_against_torch(seats[2])
    finally:
        dist.destroy_process_group()


def gathered(value: Tensor, group: dist.ProcessGroup | None = None) -> list[Tensor]:
    """Every rank's value, in order of the ranks."""
    found = [torch.empty_like(value) for _ in range(dist.get_world_size(group))]
    dist.all_gather(found, value.contiguous(), group=group)
    return found


def assert_same_on_replicas(seat: Seat, tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        others = gathered(tensor, seat.replica_group)
        assert all(torch.equal(other, tensor) for other in others), f"{name} differs between replicas"


def check_groups(seats: dict[int, Seat]) -> None:
    for seat in seats.values():
        topology = seat.topology
        for group, ranks in (
            (seat.shard_group, topology.shard_ranks(seat.rank)),
            (seat.replica_group, topology.replica_ranks(seat.rank)),
        ):
            assert (dist.get_process_group_ranks(group) if group else [seat.rank]) == ranks


def check_definition(seat: Seat, start: Any) -> None:
    """On every replica, 10 updates."""
    power, topology = power_sgd(seat, start=start), seat.topology
    defined = {
        name: SimulatedMatrix(
            gaussian(max(SHAPES[name]), RANK, 0, seat.shard_index, name).double().numpy(),
            SHAPES[name],
            topology.n_replicas,
        )
        for name in COMPRESSED
    }
    for step in range(10):
        block = block_of(step, seat.rank)
        decision = one_update(power, block)
        assert_same_on_replicas(seat, {**block.matrices, **block.plain})
        all_given = [copies(block_of(step, peer)) for peer in topology.replica_ranks(seat.rank)]
        squared_norm = 0.0
        for name, ours in copies(block).items():
            given = [one[name].double().numpy() for one in all_given]
            if name in defined:
                mean, share = defined[name].update(given, warm=start == "warm")
            else:
                mean = sum(given) / len(given)
                share = float(np.sum(mean * mean))
            squared_norm += share
            np.testing.assert_allclose(ours, mean, atol=LIMIT[start] * np.linalg.norm(mean), err_msg=name)
        assert abs(decision.squared_norm - squared_norm) < LIMIT[start] * squared_norm


def check_nothing_is_lost(seat: Seat, errors: Any, wire: Any) -> None:
    """Sum over replicas of the buffers + N times what was applied = sum of all gradients, to the buffers' rounding."""
    power, n = power_sgd(seat, errors=errors, wire=wire), seat.topology.n_replicas
    applied = {name: torch.zeros(SHAPES[name], dtype=torch.float64) for name in COMPRESSED}
    given = {name: torch.zeros(SHAPES[name], dtype=torch.float64) for name in COMPRESSED}
    for step in range(10):
        block = block_of(step, seat.rank)
        for name in COMPRESSED:
            given[name] += block.matrices[name]
        one_update(power, block)
        assert_same_on_replicas(seat, {**block.matrices, **block.plain})
        for name in COMPRESSED:
            applied[name] += n * block.matrices[name]
    kept = power.state_dict()["errors"]
    rounding = {"fp32": 2.0**-24, "bf16": 2.0**-8, "1-6-9": 2.0**-10}[errors]
    for name in COMPRESSED:
        dist.all_reduce(given[name])
        if seat.rank == 0:
            lost = (given[name] - applied[name] - kept[name]).abs().max()
            assert lost < 20 * rounding * applied[name].abs().max(), f"{name}: {lost}"
            assert kept[name].abs().max() > 1e-3, "nothing was kept back, so nothing was tested"


def check_infinities(seat: Seat) -> None:
    """An infinite gradient on rank 3 stops all ranks; each buffer still loses what the factors hold."""
    power, n = power_sgd(seat), seat.topology.n_replicas
    one_update(power, block_of(0, seat.rank))
    before = power.state_dict()["errors"]
    block = block_of(1, seat.rank)
    added = {name: block.matrices[name].double() for name in COMPRESSED}
    if seat.rank == 3:
        block.matrices["wide"][0, 0] = float("inf")
        added = {name: torch.zeros(SHAPES[name], dtype=torch.float64) for name in COMPRESSED}
    power.compress(Block(block.matrices, block.plain, is_finite=seat.rank != 3))
    decision = power.decide()
    assert (decision.squared_norm, decision.gradients_finite, decision.factors_finite) == (float("inf"), False, True)
    dropped = {factor.name: n * (factor.p @ factor.q.mT).double() for factor in power.factors()}
    power.skip()
    after = power.state_dict()["errors"]
    for name in COMPRESSED:
        dist.all_reduce(added[name], group=seat.replica_group)
        if seat.replica_index == 0:
            expected = before[name] + added[name] - dropped[name]
            assert torch.allclose(after[name].double(), expected, atol=1e-7)


def check_overflow_of_one_replica(seat: Seat) -> None:
    """A P beyond 1-6-9 on rank 2 alone: all ranks know, all buffers stay; a NaN in a buffer zeroes that one alone."""
    power = power_sgd(seat, wire="1-6-9")
    block = block_of(0, seat.rank)
    if seat.rank == 2:
        block.matrices["tall"].mul_(1e4)
        block.matrices["wide"][0, 0] = float("nan")
    given = copies(block)
    power.compress(block)
    decision = power.decide()
    assert decision.squared_norm == float("inf") and not decision.factors_finite
    power.skip()
    if seat.rank == 2:
        given["wide"].zero_()
    for name in COMPRESSED:
        dist.all_reduce(given[name], group=seat.replica_group)
    kept = power.state_dict()["errors"]
    assert not kept or all(torch.equal(kept[name], given[name]) for name in COMPRESSED)
    assert bool(kept) == (seat.replica_index == 0)
    assert one_update(power_sgd(seat, wire="1-6-9"), block_of(0, seat.rank)).is_finite


def check_restored_sum(seats: dict[int, Seat]) -> None:
    """A sum of buffers saved by 4 replicas is the same sum on 4, 2 and 1."""
    power = power_sgd(seats[1], errors="1-6-9")
    for step in range(2):
        one_update(power, block_of(step, seats[1].rank))
    box: list[Any] = [power.state_dict()]
    dist.broadcast_object_list(box, src=0)
    saved = box[0]
    assert set(saved["errors"]) == set(COMPRESSED) and saved["step"] == 2
    for seat in seats.values():
        for errors, rounding in (("fp32", 0.0), ("1-6-9", 2.0**-10)):
            restored = power_sgd(seat, errors=errors)
            restored.load_state_dict(saved)
            state = restored.state_dict()
            for name, total in state["errors"].items():
                assert (total - saved["errors"][name]).abs().max() <= rounding * saved["errors"][name].abs().max()
            assert restored.step == 2


def check_restart(seat: Seat) -> None:
    """Saving evens the buffers out, so a run that was stopped goes on to the same bits as one that was not."""
    straight = power_sgd(seat, errors="1-6-9", wire="1-6-9", start="warm")
    for step in range(2):
        one_update(straight, block_of(step, seat.rank))
    box: list[Any] = [straight.state_dict()]
    dist.broadcast_object_list(box, src=seat.topology.replica_ranks(seat.rank)[0], group=seat.replica_group)
    restored = power_sgd(seat, errors="1-6-9", wire="1-6-9", start="warm")
    restored.load_state_dict(box[0])
    for step in range(2, 4):
        blocks = block_of(step, seat.rank), block_of(step, seat.rank)
        norms = [
            one_update(power, block).squared_norm for power, block in zip((straight, restored), blocks, strict=True)
        ]
        assert norms[0] == norms[1]
        assert all(torch.equal(blocks[0].matrices[name], blocks[1].matrices[name]) for name in SHAPES)


def check_bytes(rank: int, seat: Seat) -> None:
    """Tables 1 and 2 of the paper: factors are r (m + 2) / (2 d m) of the gradients' numbers, within 1 %.

    The four ranks stand for replicas of a job of nodes of 8. Only sizes matter, so nothing is orthogonalised.
    """
    m = 8
    nodes = Seat(Topology(m * WORLD, m), m * rank, None, seat.replica_group)
    for d, total_rank, wire, size in (
        (1920, 512, "fp32", 4), (1920, 512, "bf16", 2), (2688, 640, "1-6-9", 2), (3968, 896, "1-6-9", 2),
    ):  # fmt: skip
        attention = {f"attention {i}": (d, d // m) for i in range(4)}
        shapes = {**attention, "enter": (d, 4 * d // m), "leave": (4 * d // m, d)}
        config: Any = {"rank": total_rank, "start_step": 0, "wire": wire}
        power = PowerSGD(PowerSGDConfig(**config), nodes, Arithmetic(list, ARITHMETIC.codecs), CPU)
        power.compress(Block({name: torch.ones(1).expand(shape) for name, shape in shapes.items()}, {}))
        share = power.bytes_sent / size / sum(n * k for n, k in shapes.values())
        assert abs(share / (total_rank * (m + 2) / (2 * d * m)) - 1) < 0.01
    plain = power_sgd(seat)
    plain.compress(Block({}, {name: torch.ones(shape) for name, shape in PLAIN.items()}))
    assert plain.bytes_sent == 4 * (16 + 45)


class _Bucket:
    """What torch's hook wants to see of gradients."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.flat = torch.cat([tensor.reshape(-1) for tensor in tensors.values()])
        parts = self.flat.split([tensor.numel() for tensor in tensors.values()])
        self.views = [part.view(tensor.shape) for part, tensor in zip(parts, tensors.values(), strict=True)]

    def index(self) -> int:
        return 0

    def is_last(self) -> bool:
        return True

    def buffer(self) -> Tensor:
        return self.flat

    def gradients(self) -> list[Tensor]:
        return self.views

    def parameters(self) -> list[Tensor]:
        return self.views


def check_against_torch(seat: Seat) -> None:
    """Ours, started from the hook's buffers and factors, follows torch's warm-started hook for 3 updates.

    The hook has no epsilon here, ours is 1e-6 of P's largest number, and a weak column is a hundredth of that: 1e-4.
    """
    shapes = {"wide": (12, 40), "square": (16, 16), "long": (20, 64)}
    state = powerSGD_hook.PowerSGDState(
        seat.replica_group, RANK, start_powerSGD_iter=2, min_compression_rate=1, orthogonalization_epsilon=0
    )
    ours = power_sgd(seat, start="warm")
    for step in range(8):
        gradients = {name: gradient(shape, name, step, seat.rank) for name, shape in shapes.items()}
        bucket = _Bucket(gradients)
        out: Any = powerSGD_hook.powerSGD_hook(state, bucket).wait()
        theirs = out[0] if isinstance(out, list | tuple) else out
        if step < 4:
            continue
        if step > 4:
            one_update(ours, Block(gradients, {}))
            for name, part in zip(gradients, theirs.split([g.numel() for g in gradients.values()]), strict=True):
                mean = gradients[name]
                assert (part.view(mean.shape) - mean).norm() < 1e-4 * mean.norm(), f"{name} at step {step}"
        else:
            total = state.error_dict[0].clone()
            dist.all_reduce(total, group=seat.replica_group)
            sizes = [n * k for n, k in shapes.values()]
            lengths = [k * RANK for _, k in shapes.values()]
            errors = {n: part.view(s) for (n, s), part in zip(shapes.items(), total.split(sizes), strict=True)}
            starts = {
                n: part.view(-1, RANK).clone()
                for n, part in zip(shapes, state.q_memory_dict[0].split(lengths), strict=True)
            }
            ours.load_state_dict({"step": step, "overflows": 0, "errors": errors, "starts": starts})
