"""The benchmark of distributed training: its processes end, its counters count, and its arithmetic is what it says."""

import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from benchmarks import distributed, distributed_arithmetic, distributed_why
from benchmarks.distributed_arithmetic import conditioned, distance, gram_schmidt
from benchmarks.distributed_jobs import Failed, Row, answers, last_json
from benchmarks.distributed_link import inside, two_nodes
from benchmarks.distributed_ranks import in_turns, tapped
from benchmarks.distributed_scales import ROOMS, watched
from pretrain.config import TransformerConfig
from pretrain.model import Sizes, Transformer, text_image_loss


def stays(pid: Path) -> list[str]:
    """A command that has a child and never ends; its process id is in the file, whole or not at all."""
    return ["sh", "-c", f"sleep 60 & echo $$ > {pid}.part; mv {pid}.part {pid}; wait"]


def members(session: int) -> list[str]:
    """Living processes of a session."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(path.parent.name)
    return found


def all_end(session: int) -> bool:
    """Whether they soon have: a kill is not waited for, but for the first of them."""
    deadline = time.monotonic() + 20
    while members(session) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not members(session)


@pytest.mark.parametrize(
    ("value", "at_least", "ok"), [(1.0, True, True), (0.9, True, False), (1.1, False, False), (None, False, False)]
)
def test_a_row_keeps_its_bar_or_not_and_not_without_a_value(value: float | None, at_least: bool, ok: bool) -> None:
    assert Row("what", value, 1.0, at_least, "").ok is ok


def test_a_failed_process_is_told_by_its_error_and_the_others_end_with_it(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    fails = f"while [ ! -e {pid} ]; do sleep 0.05; done; echo 'KeyError: gone' >&2; echo end >&2; exit 1"
    start = time.monotonic()
    with pytest.raises(Failed, match="KeyError: gone"):
        answers([stays(pid), ["sh", "-c", fails]], 50)
    assert time.monotonic() - start < 40
    assert all_end(int(pid.read_text()))


def test_processes_that_take_too_long_end_with_their_children(tmp_path: Path) -> None:
    with pytest.raises(Failed, match=r"took longer than 2 s"):
        answers([stays(tmp_path / "pid")], 2)
    assert all_end(int((tmp_path / "pid").read_text()))


def test_a_program_that_is_not_there_is_a_failure_and_no_crash() -> None:
    with pytest.raises(Failed, match="No such file"):
        answers([["/no/such/program"]], 5)


def test_the_answer_is_the_last_line_of_json() -> None:
    assert last_json('chatter\n{"a": 1}\n{"a": 2}\nmore\n') == {"a": 2}
    with pytest.raises(Failed, match="answered nothing"):
        last_json("chatter\n")


def test_rows_are_chosen_by_name_or_by_its_first_part() -> None:
    assert distributed.chosen(["compress"]) == ["compress/loss", "compress/bytes"]
    assert distributed.chosen(["householder"]) == ["householder"]
    assert distributed.chosen([]) == list(distributed.ROWS)
    with pytest.raises(SystemExit, match="no row compres;"):
        distributed.chosen(["compres"])


def test_a_row_that_needs_token_shards_says_so_and_the_next_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(distributed.ROWS, "householder", lambda data, folder: Row("householder", 1.0, 2.0, False, ""))
    monkeypatch.setattr("sys.argv", ["distributed", "--json", "compress/loss", "householder", f"data={tmp_path}"])
    assert distributed.main() == 1
    device, *rows = map(json.loads, capsys.readouterr().out.splitlines())
    assert device["what"] == "device" and device["torch"] == torch.__version__
    assert [(row["what"], row["value"], row["ok"]) for row in rows] == [
        ("compress/loss", None, False), ("householder", 1.0, True),
    ]  # fmt: skip
    assert "smalti demo" in rows[0]["note"]


def test_bytes_of_a_group_are_counted_and_those_of_others_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    group: Any = object()
    calls = []
    for name in ("all_reduce", "all_to_all_single", "all_gather_single"):
        monkeypatch.setattr(dist, name, lambda *tensors, **options: calls.append(options.get("group")))
    monkeypatch.setattr(dist, "get_world_size", lambda group: 4)
    whole, part = torch.zeros(8), torch.zeros(2)
    with tapped(group) as sent:
        dist.all_reduce(whole, group=group)
        dist.all_to_all_single(torch.empty(8), whole, group=group)
        dist.all_gather_single(torch.empty(8), part, group=group)
        dist.all_reduce(whole)
    dist.all_reduce(whole, group=group)
    assert sent == [2 * 32 * 3 / 4, 32 * 3 / 4, 8 * 3]  # a ring of 4: reduce-scatter + gather; the halves of it apart
    assert calls == [group, group, group, None, group]


def test_what_is_compared_takes_turns_in_both_orders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "barrier", lambda: None)
    done: list[str] = []
    seconds = in_turns({"a": lambda: done.append("a"), "b": lambda: done.append("b")}, rounds=2, steps=1)
    assert done == ["a", "a", "b", "b", "b", "a", "a", "b"]
    assert [len(rounds) for rounds in seconds.values()] == [2, 2]


def test_gram_schmidt_is_exact_enough_where_it_should_be_and_loses_orthogonality_where_it_must() -> None:
    easy, hard = conditioned(96, 24, 10.0, seed=0), conditioned(96, 24, 1e6, seed=0)
    assert math.isclose(torch.linalg.cond(hard.double()).item(), 1e6, rel_tol=0.2)  # float32 moves the least by 1e-7
    for modified in (False, True):
        # rounding times the condition number, squared for the classical kind (Giraud et al. 2005)
        assert distance(gram_schmidt(easy, modified)) < 100 * 6e-8 * (10 if modified else 100)
    # classical loses about the square of the condition number, modified about itself
    harder = conditioned(96, 24, 1e4, seed=0)
    modified, classical = (distance(gram_schmidt(harder, modified=modified)) for modified in (True, False))
    assert modified < 10 * 6e-8 * 1e4 < classical
    span = gram_schmidt(easy, modified=True)
    assert torch.dist(span @ (span.mT @ easy), easy) < 1e-5 * easy.norm()
    assert distance(gram_schmidt(hard, modified=False)) > distance(gram_schmidt(hard, modified=True)) > 1e-3


def test_compression_counts_two_products_a_decompression_and_a_factorisation(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WIDTH": 16, "SHARDS": 2, "RANK": 4}.items():
        monkeypatch.setattr(distributed_arithmetic, name, value)
    # 4 shards of 8 x 16 and 2 of 32 x 16, lying down; 4 s r^2 - 4/3 r^3 is LAPACK's count for an orthonormal basis
    products = 3 * 2 * 4 * (4 * 8 * 16 + 2 * 32 * 16)
    bases = 4 * (4 * 8 * 16 - 4 / 3 * 64) + 2 * (4 * 16 * 16 - 4 / 3 * 64)
    assert math.isclose(distributed_arithmetic.compression_cost().flops, products + bases)


def test_the_watch_on_resblocks_sees_what_enters_and_leaves_each_branch() -> None:
    torch.manual_seed(0)
    model = Transformer(TransformerConfig(n_text=4, n_layers=2, n_heads=1, d_head=8, conv_kernel=3), Sizes(6, 6, 2))
    torch.nn.init.normal_(model.image_head.weight)
    text, image = torch.randint(6, (2, 3)), torch.randint(6, (2, 4))
    with watched(model) as (activations, matrices):
        text_logits, image_logits = model(text, image)
        text_image_loss(text_logits, image_logits, text, image, 0.5, 6.0).total.backward()
    for name, block in model.resblocks().items():
        entered, left = activations[name]
        gradients = {key: p.grad for key, p in block.inner.named_parameters() if p.grad is not None}
        assert entered.shape == left.shape == (2, 8, 8)
        assert torch.allclose(entered.sum((0, 1)), gradients["out.bias"])  # the sum over all slots
        norms = sorted(gradient.norm().item() for gradient in gradients.values() if gradient.dim() == 2)
        assert sorted(gradient.norm().item() for gradient in matrices[name]) == norms


def test_room_is_where_errors_cross_ten_percent() -> None:
    errors = {room: 0.001 if room < 24 else 0.01 if room == 24 else 1.0 for room in ROOMS}
    curve = {str(room): {"errors": [0.0001, error]} for room, error in errors.items()}
    assert distributed_why.room_of(curve) == pytest.approx(25.0)  # halfway, in bits, from 1 % at 24 to 100 % at 26


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="namespaces need root on Linux")
def test_two_nodes_are_joined_by_a_slow_link_and_leave_nothing() -> None:
    try:
        with two_nodes("100mbit") as nodes:
            address = answers([inside(nodes[1], ["ip", "-o", "-4", "addr", "show", "link0"])], 20)[0]
            limit = answers([inside(nodes[0], ["tc", "qdisc", "show", "dev", "link0"])], 20)[0]
            assert "10.77.0.2/24" in address and "rate 100Mbit" in limit
    except Failed as error:
        pytest.skip(f"namespaces are not permitted here: {error}")
    assert not set(nodes) & set(answers([["ip", "netns", "list"]], 20)[0].split())
