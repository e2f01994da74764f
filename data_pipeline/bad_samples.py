"""Bad samples: named, counted, and replaced by others that every layout of ranks and readers draws alike.

What stands in for a bad sample depends on (seed, position, attempt) alone, never on what a rank has
met before; `Order.replacement` draws it.
"""

import errno
from collections.abc import Callable
from typing import TypeVar

from cluster.command import shown
from cluster.ledger import Bad
from cluster.settings import UserError
from data_pipeline.contents import reason_of
from data_pipeline.folders import Shards
from data_pipeline.mixture import Mixture
from data_pipeline.order import Order
from data_pipeline.remote import RemoteError
from data_pipeline.shards import Sample, ShardError

MOST_IN_A_ROW = 64  # with half of all samples bad, chance reaches it once in 2^64 draws
OF_THE_MACHINE = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOSPC, errno.EDQUOT, errno.EROFS}  # not of the data

T = TypeVar("T")


def usable_sample(
    shards: Shards, order: Order | Mixture, position: int, make: Callable[[Sample, int], T], bad: list[Bad]
) -> tuple[tuple[int, int], str, T]:
    """What `make` makes of the sample at a position, or of the first replacement that it raises no UserError for.

    Returns (shard, number), key and what was made; adds the bad ones to `bad`. ShardError if 64 in a row are bad.
    """
    place = order[position]
    for attempt in range(1, MOST_IN_A_ROW + 1):
        shard = shards.shards[place[0]]
        key = shard.keys[place[1]]
        try:
            return place, key, make(shards.read(place), position)
        except RemoteError:  # the network is down, which says nothing of the data
            raise
        except (UserError, OSError) as error:
            if isinstance(error, OSError) and error.errno in OF_THE_MACHINE:
                raise
            reason = reason_of(error).removeprefix(shards.name(place)).removeprefix(f"sample {shown(key)}")
            bad.append(Bad(position, *place, shown(shard.path), shown(key), reason.lstrip(": ")))
        place = order.replacement(position, attempt)
    raise ShardError(f"{MOST_IN_A_ROW} samples in a row were bad; the last: {bad[-1]}")
