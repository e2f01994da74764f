"""Shard groups and replica groups cut the ranks of a job in two ways; test_power_sgd makes their process groups."""

import pytest

from cluster.settings import SettingError
from cluster.topology import Seat, Topology, take_seat


def test_the_paper_job_has_128_replicas_of_8_shards() -> None:
    paper = Topology(1024, 8)
    assert paper.n_replicas == 128
    assert paper.shard_ranks(1001) == [1000, 1001, 1002, 1003, 1004, 1005, 1006, 1007]
    assert paper.replica_ranks(1001) == list(range(1, 1024, 8))
    assert (paper.replica_index(1001), paper.shard_index(1001)) == (125, 1)


@pytest.mark.parametrize(("world_size", "shard_size"), [(1, 1), (6, 1), (6, 6), (6, 2), (64, 8)])
def test_the_groups_of_each_kind_hold_every_rank_once_and_cross_in_one_rank(world_size: int, shard_size: int) -> None:
    topology = Topology(world_size, shard_size)
    for rank in range(world_size):
        node, peers = topology.shard_ranks(rank), topology.replica_ranks(rank)
        assert len(node) == shard_size and len(peers) == topology.n_replicas
        assert set(node) & set(peers) == {rank}
        assert node[topology.shard_index(rank)] == rank == peers[topology.replica_index(rank)]
        assert all(topology.shard_ranks(other) == node for other in node)
        assert all(topology.replica_ranks(other) == peers for other in peers)


def test_a_job_that_does_not_come_out_even_is_refused_with_the_product_spelt_out() -> None:
    with pytest.raises(SettingError) as error:
        Topology(64, 9)
    assert str(error.value) == (
        "64 processes are not 8 nodes of 9: 8 x 9 = 72; shard_size must divide 64: 1, 2, 4, 8, 16, 32, 64"
    )
    with pytest.raises(SettingError, match="shard_size=0"):
        Topology(4, 0)


def test_a_job_of_one_process_needs_no_process_group() -> None:
    assert take_seat(Topology(1, 1), 0) == Seat(Topology(1, 1), 0, None, None)
