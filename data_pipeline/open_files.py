"""A few shards kept open while samples are read here and there: opening costs a round trip on a cluster's disk."""

import os
import threading
from collections import OrderedDict
from pathlib import Path
from typing import BinaryIO

from data_pipeline.shards import Shard, ShardError

MOST_OPEN = 32  # two windows of 16 shards, with room in any limit on open files


class Held:
    """An open file, closed when the last reader drops it."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file

    def __del__(self) -> None:
        self.file.close()


class OpenFiles:
    """Reads samples of any shard; many threads may. The shard used longest ago is closed to open another."""

    def __init__(self, limit: int = MOST_OPEN) -> None:
        self.limit = limit
        self._held: OrderedDict[Path, Held] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._held)

    def read(self, shard: Shard, number: int) -> dict[str, bytes]:
        """The files of a sample. ShardError if the tar ends before it; OSError as the system or network says."""
        places = shard.places[number]
        first, last = min(at for at, _ in places.values()), max(at + n for at, n in places.values())
        data = self._read_span(shard, last - first, first)  # a sample's members lie next to each other
        for ending, (at, n) in places.items():
            if len(data) < at + n - first:
                raise ShardError(f"{ending} is cut: the tar ends before it")
        return {ending: data[at - first : at - first + n] for ending, (at, n) in places.items()}

    def _read_span(self, shard: Shard, n_bytes: int, at: int) -> bytes:
        """Bytes of the tar; opened anew and tried once more after an error, as network disks need now and then."""
        held = self._get(shard)
        try:
            return os.pread(held.file.fileno(), n_bytes, at)
        except OSError:
            with self._lock:
                self._held.pop(shard.path, None)
        return os.pread(self._get(shard).file.fileno(), n_bytes, at)

    def _get(self, shard: Shard) -> Held:
        with self._lock:
            if held := self._held.get(shard.path):
                self._held.move_to_end(shard.path)
                return held
        held = Held(shard.open())  # outside the lock: it may take long
        with self._lock:
            self._held[shard.path] = held
            while len(self._held) > self.limit:
                self._held.popitem(last=False)
        return held
