"""How the processes of a job are arranged: shards of one copy of the state inside a node, copies across nodes.

Rank r of R holds shard r mod m of replica r div m, with m = shard_size, usually the GPUs of a node: what is
sent inside a shard group goes over the node's own links, what is sent inside a replica group over the network.
Ramesh et al. 2021, section 2.5 and appendix E; the same arrangement as MiCS, Zhang et al. 2022.
"""

from dataclasses import dataclass

import torch.distributed as dist

from cluster.settings import SettingError


@dataclass(frozen=True)
class Topology:
    """R = world_size processes as n_replicas groups of shard_size; SettingError where that does not come out even."""

    world_size: int
    shard_size: int

    def __post_init__(self) -> None:
        if self.world_size < 1 or self.shard_size < 1:
            raise SettingError(f"world_size={self.world_size} and shard_size={self.shard_size} must both be at least 1")
        if self.world_size % self.shard_size:
            nodes = self.world_size // self.shard_size + 1
            raise SettingError(
                f"{self.world_size} processes are not {nodes} nodes of {self.shard_size}: {nodes} x {self.shard_size} "
                f"= {nodes * self.shard_size}; shard_size must divide {self.world_size}: "
                + ", ".join(str(size) for size in range(1, self.world_size + 1) if self.world_size % size == 0)
            )

    @property
    def n_replicas(self) -> int:
        """Copies of the state, N."""
        return self.world_size // self.shard_size

    def shard_index(self, rank: int) -> int:
        """Which part of the state this rank holds, 0 to shard_size - 1."""
        return rank % self.shard_size

    def replica_index(self, rank: int) -> int:
        """Which copy of the state this rank's part belongs to, 0 to n_replicas - 1."""
        return rank // self.shard_size

    def shard_ranks(self, rank: int) -> list[int]:
        """Ranks of this rank's node, which hold one copy together, in order of the shards."""
        first = rank - self.shard_index(rank)
        return list(range(first, first + self.shard_size))

    def replica_ranks(self, rank: int) -> list[int]:
        """Ranks that hold the same part as this one, in order of the replicas."""
        return list(range(self.shard_index(rank), self.world_size, self.shard_size))


@dataclass(frozen=True)
class Seat:
    """One rank's place in a topology, with its two process groups; None instead of a group of one."""

    topology: Topology
    rank: int
    shard_group: dist.ProcessGroup | None = None
    replica_group: dist.ProcessGroup | None = None

    @property
    def shard_index(self) -> int:
        return self.topology.shard_index(self.rank)

    @property
    def replica_index(self) -> int:
        return self.topology.replica_index(self.rank)


def take_seat(topology: Topology, rank: int) -> Seat:
    """Make the groups. Collective: every rank makes every group, its own or not, in one order, as torch demands."""
    firsts = range(0, topology.world_size, topology.shard_size)
    shard_group = _own_group([topology.shard_ranks(first) for first in firsts], rank)
    replica_group = _own_group([topology.replica_ranks(first) for first in range(topology.shard_size)], rank)
    return Seat(topology, rank, shard_group, replica_group)


def _own_group(members: list[list[int]], rank: int) -> dist.ProcessGroup | None:
    if len(members[0]) == 1:
        return None
    groups = [dist.new_group(ranks) for ranks in members]
    return next(group for group, ranks in zip(groups, members, strict=True) if rank in ranks)
