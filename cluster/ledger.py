"""The ledger of a run: which samples each step consumed, in so few bytes that it can be proved later.

`ledger.jsonl` in the run folder. A line a step holds the positions of the endless order that it took, a
digest of the samples found there, what was bad and replaced, and whether the update was applied. The
digest is a sum over samples, so the ranks' parts add up to the same number however many ranks there
are; a resumed run's ledger is, byte for byte, that of a run which was never stopped.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from struct import Struct
from typing import Any

from cluster.manifest import FolderError

NAME = "ledger.jsonl"
MODULUS = 2**64
MOST_IN_STEP = 2**24
GRACE = 10  # so many bad samples never stop a run, unless none is allowed
PLACE = Struct("<QIQ")  # position, shard, number


@dataclass(frozen=True)
class Bad:
    """A sample that could not be used: number `number` of the shard `file`, drawn for `position`."""

    position: int
    shard: int
    number: int
    file: str
    key: str
    reason: str

    def __str__(self) -> str:
        return f"{self.file}, sample {self.key}: {self.reason}"


@dataclass(frozen=True)
class Seen:
    """What one rank consumed in one step: the digest of its samples, and the bad ones met on the way."""

    digest: int = 0
    bad: tuple[Bad, ...] = ()

    @property
    def sums(self) -> dict[str, float]:
        """Numbers to be summed over ranks with a step's other values, exact in float64: the digest's
        halves, and how many positions hold a replacement."""
        replaced = len({bad.position for bad in self.bad})
        return {"ledger/low": self.digest % 2**32, "ledger/high": self.digest >> 32, "ledger/replaced": replaced}


def digest_of(positions: Iterable[int], places: Iterable[tuple[int, int]], keys: Iterable[str]) -> int:
    """Sum over samples, modulo 2^64, of a hash of (position, shard, number in it, key)."""
    total = 0
    for position, (shard, number), key in zip(positions, places, keys, strict=True):
        text = PLACE.pack(position, shard, number) + key.encode()
        total += int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")
    return total % MODULUS


def whole_digest(sums: dict[str, float]) -> int:
    """The digest of a whole step from `Seen.sums` summed over the ranks."""
    return (int(sums["ledger/low"]) + (int(sums["ledger/high"]) << 32)) % MODULUS


def refuse_too_many(n_replaced: int, n_consumed: int, max_share: float, last: str) -> None:
    """FolderError if too large a share of the samples so far was bad. Counts are those of all ranks, so
    that all decide alike; `last` names the last bad one."""
    if n_replaced <= (GRACE if max_share else 0) or n_replaced <= max_share * n_consumed:
        return
    share = n_replaced / n_consumed
    raise FolderError(
        f"{n_replaced} of {n_consumed} samples so far were bad ({share:.2%}), more than "
        f"data.max_bad_share={max_share:g}; the last: {last}. Put back a good copy of the shard and run the same "
        f"command again, or go on with data.max_bad_share={min(1.0, 2 * share):.2g}"
    )


class Ledger:
    """Appends to `folder/ledger.jsonl`; rank 0 alone has one.

    Opened at step `step`, it drops the lines of that step and later ones, which the run does again,
    and a last line that a kill has cut. `order` is what decides the order of samples; it is written
    at the start, and again where a resumed run changes it.
    """

    def __init__(self, folder: Path, step: int, order: dict[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / NAME
        self.consumed = 0  # positions in all steps so far
        self.replaced = 0  # of them, those that hold a replacement
        in_force, size = self._read_up_to(step)
        self._file = open(self.path, "ab")  # noqa: SIM115 - close() closes it
        self._file.truncate(size)
        if in_force != order:
            self._write({"step": step, "order": order})

    def record(self, step: int, positions: range, digest: int, bad: Sequence[Bad] = (), skipped: str = "") -> None:
        """One step: its positions, the whole digest, every rank's bad samples, and why its update was not applied."""
        line: dict[str, Any] = {"step": step, "first": positions.start, "count": len(positions)}
        line["digest"] = f"{digest:016x}"
        if bad:
            in_order = sorted(bad, key=lambda b: b.position)  # and of one position as they were met
            line["bad"] = [[b.position, b.shard, b.number, b.key, b.reason] for b in in_order]
        if skipped:
            line["skipped"] = skipped
        self._write(line)
        self._count(line)

    def sync(self) -> None:
        """Bring the lines to the disk: called before a checkpoint is sealed, so that none is ahead of its ledger."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def _write(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line, separators=(",", ":")).encode() + b"\n")
        self._file.flush()

    def _read_up_to(self, step: int) -> tuple[dict[str, Any] | None, int]:
        """The order in force before a step, and the bytes of the lines before it."""
        in_force, size = None, 0
        for line, n_bytes in _lines(self.path):
            if line is not None:
                if line["step"] >= step:
                    break
                in_force = line.get("order", in_force)
                self._count(line)
            size += n_bytes
        return in_force, size

    def _count(self, line: dict[str, Any]) -> None:
        self.consumed += line.get("count", 0)
        self.replaced += len({bad[0] for bad in line.get("bad", ())})


def read_ledger(folder: Path) -> list[dict[str, Any] | None]:
    """The lines of a run's ledger, oldest first; None for one that cannot be read. A cut last line is left out."""
    return [line for line, _ in _lines(folder / NAME)]


def _lines(path: Path) -> Iterable[tuple[dict[str, Any] | None, int]]:
    """Each whole line of a ledger, or None if it is garbled, and its length in bytes."""
    if not path.is_file():
        return
    with open(path, "rb") as file:
        for text in file:
            if not text.endswith(b"\n"):
                return
            try:
                line = json.loads(text)
            except ValueError:
                line = None
            yield (line if _is_sound(line) else None), len(text)


def _is_sound(line: Any) -> bool:
    """True if a line has the form of what `Ledger` writes."""
    if not isinstance(line, dict) or type(line.get("step")) is not int:
        return False
    if "order" in line:
        return line.keys() == {"step", "order"} and isinstance(line["order"], dict)
    bad = line.get("bad", [])
    return (
        line.keys() - {"bad", "skipped"} == {"step", "first", "count", "digest"}
        and all(type(line[name]) is int for name in ("first", "count"))
        and 0 <= line["first"] < MODULUS
        and 0 < line["count"] <= MOST_IN_STEP
        and isinstance(line["digest"], str)
        and isinstance(line.get("skipped", ""), str)
        and isinstance(bad, list)
        and all(isinstance(b, list) and [type(part) for part in b] == [int, int, int, str, str] for b in bad)
    )
