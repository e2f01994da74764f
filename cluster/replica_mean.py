"""Means over the replicas of a shard, in float32 or in 16-bit numbers that no communication library can add."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from cluster.topology import Seat


@dataclass(frozen=True)
class Codec:
    """How float32 numbers are kept in fewer bits. `encode` makes what is beyond `largest` infinite."""

    dtype: torch.dtype
    largest: float
    encode: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor], Tensor]


def _float32(numbers: Tensor) -> Tensor:
    return numbers.float()


TORCH_CODECS = {
    "fp32": Codec(torch.float32, torch.finfo(torch.float32).max, _float32, _float32),
    "bf16": Codec(torch.bfloat16, torch.finfo(torch.bfloat16).max, Tensor.bfloat16, _float32),
}


class ReplicaMean:
    """Averages flat float32 tensors over a seat's replica group. The result has the same bits on all replicas.

    bytes_sent counts the bytes handed to all-reduces; one of S bytes by a ring sends 2 S (N - 1) / N.
    """

    def __init__(self, seat: Seat) -> None:
        self.group, self.n = seat.replica_group, seat.topology.n_replicas
        self.bytes_sent = 0

    def take(self, flat: Tensor) -> None:
        """In place, in float32."""
        if self.group is None:
            return
        flat.div_(self.n)  # first, or a sum of numbers near the largest would overflow
        dist.all_reduce(flat, group=self.group)
        self.bytes_sent += flat.numel() * flat.element_size()

    def take_encoded(self, flat: Tensor, codec: Codec) -> Tensor:
        """Through a codec, rounded to it also where there is but one replica.

        Replica j is sent the j-th part by all, adds it up in float32 in the order of the replicas, and sends the
        mean to all: as many bytes as a ring all-reduce of the codes, each sum made in one place.
        """
        if codec.dtype == torch.float32:
            self.take(flat)
            return flat
        if self.group is None:
            return codec.decode(codec.encode(flat))
        codes = codec.encode(torch.nn.functional.pad(flat, (0, -flat.numel() % self.n)))
        parts, means = torch.empty_like(codes), torch.empty_like(codes)
        dist.all_to_all_single(_bytes(parts), _bytes(codes), group=self.group)
        mean = codec.encode((codec.decode(parts.view(self.n, -1)) / self.n).sum(0))
        dist.all_gather_single(_bytes(means), _bytes(mean), group=self.group)
        self.bytes_sent += codes.numel() * codes.element_size()
        return codec.decode(means)[: flat.numel()]


def _bytes(codes: Tensor) -> Tensor:
    """Codes as bytes: NCCL and gloo know no 16-bit integers."""
    return codes.view(torch.uint8)
