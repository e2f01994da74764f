"""The GPU benchmark in small on a CPU: its rows, its counts, and that it times nothing that is wrong."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import bench_cases, bench_gpu, boundary, reference, relaxed_codes
from kernels.attention import attention
from kernels.bench_cases import Case, attention_case, boundary_case, relaxed_codes_case
from kernels.layout import Layout, Pattern, Sparsity
from kernels.measure import Ceilings, Clock

CPU = torch.device("cpu")
SMALL = Layout(2, 2, 2)
REACHED = Ceilings(bandwidth=1e9, matmul=1e12)
DIRECTIONS = ["forward", "backward", "forward+backward"]


def small(pattern: Pattern = "row") -> Case:
    return attention_case(Sparsity(pattern, SMALL, 3), 3, 2, 16, CPU)


def rows_of(make: Callable[[], Case]) -> list[bench_gpu.Row]:
    return bench_gpu.rows_of(make, Clock(CPU, runs=1, warmups=0), REACHED)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_the_command_writes_a_row_for_each_operator_direction_and_peer(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    bench_gpu.main(["--tiny", "--device", "cpu", "--out", str(path)])
    header, *lines = path.read_text().splitlines()
    fields = {"what", "direction", "peer", "ours_us", "theirs_us", "floor_us", "ratio", "goal", "error"}
    assert fields | {"device", "driver", "torch", "triton", "copy_tb_s", "matmul_tflop_s"} <= set(header.split(","))
    assert len(lines) == 3 * 3 * 3 + 2 * 3
    assert all(pattern in path.read_text() for pattern in ("attention row", "attention column", "attention conv"))


def test_a_row_tells_both_times_the_floor_and_the_goal() -> None:
    rows = [row for row in rows_of(small) if row.peer == "SDPA, boolean mask"]
    assert [row.direction for row in rows] == DIRECTIONS
    assert [row.goal for row in rows] == [1.6, 1.8, None]
    for row in rows:
        assert row.ours_us and row.theirs_us and row.floor_us and not row.error
        assert row.ratio == pytest.approx(row.ours_us / row.floor_us)
    assert rows[0].floor_us and rows[1].floor_us
    assert rows[2].floor_us == pytest.approx(rows[0].floor_us + rows[1].floor_us)


# Text sees 1 + 2, image sees 4 x 2 of the text; in a picture of 2 x 2 a row's slot sees itself and two before
# (1 + 2 + 3 + 3), a column's its column (1 + 1 + 2 + 2), the conv's all before (1 + 2 + 3 + 4).
@pytest.mark.parametrize(("pattern", "pairs"), [("row", 20), ("column", 17), ("conv", 21)])
def test_attention_counts_attended_pairs_and_each_tensor_once(pattern: Pattern, pairs: int) -> None:
    case = small(pattern)
    numbers = 3 * 6 * 2 * 16  # of q, of k, of v, of out
    assert case.forward == bench_cases.Work(4 * numbers * 2, 4 * 16 * pairs * 3 * 2)
    assert case.backward == bench_cases.Work(8 * numbers * 2, 10 * 16 * pairs * 3 * 2)


def test_boundary_and_relaxed_codes_count_bytes_alone() -> None:
    edge, codes = boundary_case(3, 8, CPU), relaxed_codes_case(3, 8, CPU)
    assert (edge.forward.n_bytes, edge.backward.n_bytes) == (12 * 24, 16 * 24)
    assert (codes.forward.n_bytes, codes.backward.n_bytes) == (8 * 24, 8 * 24)
    assert not any(work.flops for work in (edge.forward, edge.backward, codes.forward, codes.backward))


def off_by_a_tenth(qkv: Tensor, sparsity: Sparsity, how: Any) -> Tensor:
    return attention(qkv, sparsity) * 1.1


def wrong_gradient(qkv: Tensor, sparsity: Sparsity, how: Any) -> Tensor:
    """The right output; the values' gradient is missing."""
    return attention(torch.cat([qkv[:, :, :2], qkv[:, :, 2:].detach()], 2), sparsity)


def partly_unwritten(qkv: Tensor, sparsity: Sparsity, how: Any) -> Tensor:
    """Its last slot is whatever stood in memory."""
    out = attention(qkv, sparsity)
    return torch.cat([out[:, :-1], torch.empty_like(out[:, -1:]) + 0 * out[:, -1:]], 1)


def of_changing_bits() -> Callable[..., Tensor]:
    calls: list[int] = []

    def function(qkv: Tensor, sparsity: Sparsity, how: Any) -> Tensor:
        calls.append(1)
        return attention(qkv, sparsity) * (1 + 2.0**-7 * (len(calls) % 2))

    return function


@pytest.mark.parametrize(
    ("broken", "told"),
    [
        (off_by_a_tenth, "out is off by 1.0e-01"),
        (wrong_gradient, "dv is off by 1.0e+00"),
        (partly_unwritten, "out is off by nan"),
        (of_changing_bits(), "out differs between two runs"),
    ],
)
def test_a_wrong_attention_is_told_and_not_timed(
    broken: Callable[..., Tensor], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_cases, "attention", broken)
    (row,) = rows_of(small)
    assert row.direction == "check" and row.ours_us is None
    assert told in row.error
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_pattern_that_is_wrong_where_tiles_are_cut_is_timed_at_no_size(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(qkv: Tensor, sparsity: Sparsity, how: Any) -> Tensor:
        cut = sparsity.pattern == "conv" and sparsity.layout.n_slots % 2 == 0 and sparsity.layout.rows == 9
        return attention(qkv, sparsity) * (1.1 if cut else 1)

    monkeypatch.setattr(bench_cases, "attention", broken)
    monkeypatch.setattr(bench_gpu, "rows_of", lambda make, *_: [bench_gpu.Row(make().what, "", "")])
    rows = [row for found in bench_gpu.measure(CPU, tiny=True) for row in found]
    assert [row["error"][:10] for row in rows if "conv" in str(row["what"])] == ["wrong: out"]  # type: ignore[index]
    assert sum("row" in str(row["what"]) and not row["error"] for row in rows) > 0


def test_a_wrong_boundary_and_wrong_relaxed_codes_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def scaled(x: Tensor, branch: Tensor, gain: Tensor, bias: Tensor, leave: Tensor, enter: Tensor) -> Any:
        return reference.boundary(x, branch, gain, bias, leave * 1.1, enter)

    monkeypatch.setattr(bench_cases, "boundary", scaled)
    monkeypatch.setattr(bench_cases, "relaxed_codes", lambda x, u, t: relaxed_codes.relaxed_codes(x, u, 1.1 * t))
    (edge,) = rows_of(lambda: boundary_case(8, 48, CPU))
    (codes,) = rows_of(lambda: relaxed_codes_case(8, 40, CPU))
    assert edge.error.startswith("wrong: d_branch is off by 1.0e-01") and "d_x" not in edge.error
    assert "weights is off" in codes.error and "kl" not in codes.error


def test_a_case_that_raises_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def raises(*_: Any) -> Tensor:
        raise RuntimeError("no such\nkernel")

    monkeypatch.setattr(bench_cases, "attention", raises)
    (row,) = rows_of(small)
    assert row.error == "RuntimeError: no such"


def test_a_peer_that_fails_is_a_row_and_the_others_are_timed() -> None:
    """FlexAttention has no backward on a CPU; another peer cannot even be made; a third computes something else."""
    case = small()

    def missing() -> Any:
        raise ImportError("not installed")

    other = replace(case.definition, function=lambda x: 2 * case.definition.function(x))
    peers = {"missing": missing, "other": lambda: other, "same": lambda: case.definition}
    rows = rows_of(lambda: replace(case, peers=peers))
    errors = {(row.peer, row.direction): row.error for row in rows}
    assert all(errors["missing", direction] == "ImportError: not installed" for direction in DIRECTIONS)
    assert all("another result: its out is off by" in errors["other", direction] for direction in DIRECTIONS)
    assert not any(errors["same", direction] for direction in DIRECTIONS)
    assert all(row.ours_us for row in rows)


def test_a_peer_without_a_backward_is_timed_forward_and_has_one_row_a_direction() -> None:
    case = small()
    forward_only = replace(case.definition, function=lambda x: case.definition.function(x).detach())
    rows = rows_of(lambda: replace(case, peers={"forward only": lambda: forward_only}))
    assert [row.direction for row in rows] == DIRECTIONS
    assert [row.theirs_us is None for row in rows] == [False, True, True]
    assert [row.error.startswith("RuntimeError") for row in rows] == [False, True, True]


@pytest.mark.parametrize("pattern", ["row", "column", "conv"])
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_the_block_mask_of_the_peer_is_our_rule(pattern: Pattern) -> None:
    sparsity = Sparsity(pattern, Layout(7, 6, 5), 3)
    q, k, v = torch.randn(3, 1, 1, 37, 16, generator=torch.Generator().manual_seed(0)).unbind()
    theirs = bench_cases.flex(sparsity, CPU)(q, k, v)
    # 1e-6: both sum a few numbers of size 1 in float32, in another order.
    torch.testing.assert_close(theirs, reference.masked_attention(q, k, v, sparsity.mask()), atol=1e-6, rtol=0)


@pytest.mark.interpreter
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of what is computed but never kept
def test_the_triton_kernels_pass_the_check_and_a_broken_one_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = pytest.importorskip("kernels.attention_triton", reason="Triton is not installed here")
    for door in (boundary, relaxed_codes):
        monkeypatch.setattr(door, "_is_fused", lambda x: True)
    sparsity = Sparsity("conv", Layout(16, 8, 8))
    cases = [boundary_case(4, 48, CPU), relaxed_codes_case(4, 40, CPU)]
    cases.append(attention_case(sparsity, 1, 2, 16, CPU, "triton"))
    assert [bench_gpu.fault(case) for case in cases] == ["", "", ""]
    right = kernels.constants
    monkeypatch.setattr(kernels, "constants", lambda *words: right(*words) | {"HALF": 2})
    assert bench_gpu.fault(cases[-1]).startswith("wrong: out is off by")
