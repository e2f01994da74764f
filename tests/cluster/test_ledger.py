"""The ledger's file: the same bytes however a run was cut, and sums that do not know how many ranks there are."""

import json
import time
from pathlib import Path

import pytest

from cluster.ledger import NAME, Bad, Ledger, Seen, digest_of, read_ledger, whole_digest

ORDER = {"seed": 1, "shards": "f"}
BAD = [Bad(9, 1, 2, "b.tar", "k", "cut"), Bad(7, 0, 3, "a.tar", "j", "gone"), Bad(9, 0, 1, "a.tar", "i", "gone")]


def write(folder: Path, first: int, last: int, order: dict = ORDER) -> bytes:
    """Steps of 4 positions; some hold bad samples, some were not applied."""
    ledger = Ledger(folder, first, order)
    for step in range(first, last):
        bad = [Bad(4 * step, 0, step, "a.tar", "k", "cut")] if step % 3 == 0 else []
        ledger.record(step, range(4 * step, 4 * step + 4), step * 7919, bad, "loss is nan" if step % 4 == 1 else "")
    ledger.sync()
    ledger.close()
    return (folder / NAME).read_bytes()


def test_a_line_holds_step_positions_digest_bad_samples_and_why_it_was_not_applied(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, 0, ORDER)
    ledger.record(0, range(4), 2**64 - 1)
    ledger.record(1, range(4, 8), 255, BAD, "loss is nan")
    assert (ledger.consumed, ledger.replaced) == (8, 2)
    ledger.close()
    assert read_ledger(tmp_path) == [
        {"step": 0, "order": ORDER},
        {"step": 0, "first": 0, "count": 4, "digest": "ffffffffffffffff"},
        {
            "step": 1, "first": 4, "count": 4, "digest": "00000000000000ff",
            "bad": [[7, 0, 3, "j", "gone"], [9, 1, 2, "k", "cut"], [9, 0, 1, "i", "gone"]], "skipped": "loss is nan",
        },
    ]  # fmt: skip


@pytest.mark.parametrize("resumed_at", [0, 1, 4, 7, 10])
@pytest.mark.parametrize("cut", [0, 1, 30])
def test_a_resumed_ledger_is_that_of_a_run_never_stopped(tmp_path: Path, resumed_at: int, cut: int) -> None:
    """Whatever was written after the checkpoint, and wherever a kill has cut the last line."""
    straight = write(tmp_path / "straight", 0, 12)
    written = write(tmp_path / "resumed", 0, 11)
    (tmp_path / "resumed" / NAME).write_bytes(written[: len(written) - cut])
    assert write(tmp_path / "resumed", resumed_at, 12) == straight


def test_counts_go_on_where_the_kept_lines_end(tmp_path: Path) -> None:
    write(tmp_path, 0, 11)
    ledger = Ledger(tmp_path, 7, ORDER)
    assert (ledger.consumed, ledger.replaced) == (28, 3)
    ledger.close()


def test_a_changed_order_is_noted_where_it_begins_and_not_again(tmp_path: Path) -> None:
    write(tmp_path, 0, 3)
    write(tmp_path, 3, 5, ORDER | {"seed": 2})
    write(tmp_path, 5, 6, ORDER | {"seed": 2})
    assert [line["order"]["seed"] if line and "order" in line else "." for line in read_ledger(tmp_path)] == [
        1, ".", ".", ".", 2, ".", ".", ".",
    ]  # fmt: skip


def test_a_garbled_line_is_kept_and_shown_as_unreadable(tmp_path: Path) -> None:
    lines = write(tmp_path, 0, 6).splitlines(keepends=True)
    lines[2] = b"\0" * 20 + b"\n"
    (tmp_path / NAME).write_bytes(b"".join(lines))
    write(tmp_path, 4, 6)
    assert (tmp_path / NAME).read_bytes() == b"".join(lines)
    assert [line is None for line in read_ledger(tmp_path)] == [False, False, True, False, False, False, False]


GOOD = {"step": 0, "first": 0, "count": 4, "digest": "0"}


@pytest.mark.parametrize(
    "line",
    [
        1, [], {}, {"step": "0", "order": {}}, {"step": 0, "order": 1}, GOOD | {"count": 2**60}, GOOD | {"count": 0},
        GOOD | {"first": -1}, GOOD | {"digest": 1}, GOOD | {"more": 1}, GOOD | {"skipped": True},
        GOOD | {"bad": {}}, GOOD | {"bad": [[1, 2, 3, "k"]]}, GOOD | {"bad": [[1, 2, "3", "k", "r"]]},
    ],
)  # fmt: skip
def test_a_line_of_another_form_is_unreadable(tmp_path: Path, line: object) -> None:
    (tmp_path / NAME).write_text(json.dumps(GOOD) + "\n" + json.dumps(line) + "\n")
    assert read_ledger(tmp_path) == [GOOD, None]


def test_parts_of_ranks_add_up_to_the_whole() -> None:
    """Also through float64, in which sums over ranks are taken, and past 2^64."""
    places = [(n % 3, n) for n in range(24)]
    keys = [f"k{n}" for n in range(24)]
    whole = digest_of(range(100, 124), places, keys)
    for ranks in (1, 2, 3, 8, 24):
        local = 24 // ranks
        parts = [slice(rank * local, (rank + 1) * local) for rank in range(ranks)]
        sums = dict.fromkeys(Seen().sums, 0.0)
        for part in parts:
            seen = Seen(digest_of(range(100, 124)[part], places[part], keys[part]))
            sums = {name: float(sums[name]) + float(value) for name, value in seen.sums.items()}
        assert whole_digest(sums) == whole
    assert sum(digest_of([n], [(n % 3, n - 100)], [f"k{n - 100}"]) for n in range(100, 124)) >= 2**64


def test_a_digest_tells_position_shard_number_and_key() -> None:
    digests = {
        digest_of([position], [(shard, number)], [key])
        for position in (0, 1, 2**40) for shard in (0, 1) for number in (0, 1) for key in ("a", "b", "")
    }  # fmt: skip
    assert len(digests) == 36


def test_positions_with_a_replacement_are_counted_once() -> None:
    assert Seen(0, tuple(BAD)).sums["ledger/replaced"] == 2


def test_a_step_costs_little(tmp_path: Path) -> None:
    """0.2 ms for digest and line of 64 samples; three times that is allowed here, for a busy machine."""
    ledger = Ledger(tmp_path, 0, ORDER)
    places, keys = [(3, n) for n in range(64)], [f"{n:09d}" for n in range(64)]
    best = float("inf")
    for step in range(50):
        start = time.perf_counter()
        positions = range(64 * step, 64 * step + 64)
        ledger.record(step, positions, digest_of(positions, places, keys))
        best = min(best, time.perf_counter() - start)
    ledger.close()
    assert best < 0.6e-3
