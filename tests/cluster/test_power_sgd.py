"""PowerSGD equals its definition, loses nothing, survives infinities, and sends as many bytes as the paper says."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cluster.power_sgd import Arithmetic, Block, PowerSGD, PowerSGDConfig, gaussian, shard_rank
from cluster.settings import SettingError
from cluster.topology import Seat, Topology
from tests.cluster.power_sgd_cases import (
    ARITHMETIC,
    CPU,
    LIMIT,
    PLAIN,
    RANK,
    SHAPES,
    block_of,
    copies,
    one_update,
    power_sgd,
)
from tests.cluster.power_sgd_ranks import run_on_four_ranks
from tests.cluster.power_sgd_simulation import SimulatedMatrix, householder_basis

ALONE = Seat(Topology(1, 1), 0)
COMPRESSED = ("wide", "tall", "square")


def test_the_definition_finds_the_basis_that_numpy_finds() -> None:
    matrix = np.random.default_rng(0).normal(size=(9, 4))
    q, r = np.linalg.qr(matrix)
    assert np.allclose(householder_basis(matrix), q * np.sign(np.diag(r)), atol=1e-14)


@pytest.mark.parametrize("start", ["fixed", "warm"])
def test_one_replica_equals_the_definition_over_ten_updates(start: Any) -> None:
    power = power_sgd(ALONE, start=start)
    defined = {name: SimulatedMatrix(gaussian(max(SHAPES[name]), RANK, 0, 0, name).double().numpy(), SHAPES[name], 1)
               for name in COMPRESSED}  # fmt: skip
    for step in range(10):
        block = block_of(step, 0)
        given = copies(block)
        decision = one_update(power, block)
        squared_norm = sum(float(given[name].double().square().sum()) for name in ("tiny", *PLAIN))
        for name, matrix in defined.items():
            mean, share = matrix.update([given[name].double().numpy()], warm=start == "warm")
            squared_norm += share
            np.testing.assert_allclose(block.matrices[name], mean, atol=LIMIT[start] * np.linalg.norm(mean))
            error = power.state_dict()["errors"][name]
            np.testing.assert_allclose(error, matrix.error(0), atol=LIMIT[start] * np.linalg.norm(mean))
        assert decision.squared_norm == pytest.approx(squared_norm, rel=LIMIT[start])
        for name in ("tiny", *PLAIN):
            assert torch.equal(copies(block)[name], given[name])


def test_the_norm_from_q_is_the_norm_of_what_is_applied() -> None:
    power, block = power_sgd(ALONE), block_of(0, 0)
    decision = one_update(power, block)
    applied = sum(float(gradient.double().square().sum()) for gradient in copies(block).values())
    assert decision.squared_norm == pytest.approx(applied, rel=1e-6)


def test_full_rank_is_no_compression() -> None:
    power = power_sgd(ALONE, rank=99, least_saving=0.0)
    for step in range(3):
        block = block_of(step, 0)
        given = copies(block)
        one_update(power, block)
        for name, gradient in copies(block).items():
            assert float((gradient - given[name]).norm()) < 3e-6 * float(given[name].norm())
    assert all(float(error.norm()) < 1e-5 for error in power.state_dict()["errors"].values())
    assert set(power.state_dict()["errors"]) == {*COMPRESSED, "tiny"}


def test_the_first_updates_send_whole_gradients() -> None:
    power = power_sgd(ALONE, start_step=2)
    for step in range(3):
        block = block_of(step, 0)
        given = copies(block)
        one_update(power, block)
        same = [torch.equal(gradient, given[name]) for name, gradient in block.matrices.items()]
        assert same == ([True] * 4 if step < 2 else [False, False, False, True])


@pytest.mark.parametrize("exponent", [-60, -20, 20])
def test_a_scale_on_the_gradients_scales_the_result_and_nothing_else(exponent: int) -> None:
    """To the last bit, for a power of two: so epsilon means the same at any gradient scale."""
    results = []
    for factor in (1.0, 2.0**exponent):
        power = power_sgd(ALONE, start="warm")
        for step in range(3):
            block = block_of(step, 0)
            for gradient in block.matrices.values():
                gradient.mul_(factor)
            one_update(power, block)
        results.append({name: gradient / factor for name, gradient in block.matrices.items()})
    assert all(torch.equal(results[0][name], results[1][name]) for name in COMPRESSED)


@pytest.mark.parametrize(("errors", "rounding"), [("fp32", 2.0**-24), ("bf16", 2.0**-8), ("1-6-9", 2.0**-10)])
def test_what_is_applied_and_what_is_kept_make_up_all_gradients(errors: Any, rounding: float) -> None:
    """The buffer is rounded twice an update; 10 updates of roundings of its largest number are allowed."""
    power, applied, given = power_sgd(ALONE, errors=errors, wire="bf16"), {}, {}
    for step in range(10):
        block = block_of(step, 0)
        for name in COMPRESSED:
            given[name] = given.get(name, 0) + block.matrices[name].double()
        one_update(power, block)
        for name in COMPRESSED:
            applied[name] = applied.get(name, 0) + block.matrices[name].double()
    kept = power.state_dict()["errors"]
    for name in COMPRESSED:
        lost = (given[name] - applied[name] - kept[name]).abs().max()
        assert lost < 20 * rounding * max(kept[name].abs().max(), applied[name].abs().max())


@pytest.mark.parametrize("errors", ["fp32", "1-6-9"])
def test_a_gradient_that_is_not_finite_stays_out_of_the_buffer(errors: Any) -> None:
    power, twin = power_sgd(ALONE, errors=errors), power_sgd(ALONE, errors=errors)
    one_update(power, block_of(0, 0))
    one_update(twin, block_of(0, 0))
    bad = block_of(1, 0)
    bad.matrices["wide"][3, 3] = float("inf")
    power.compress(Block(bad.matrices, bad.plain, is_finite=False))
    decision = power.decide()
    assert decision.squared_norm == float("inf") and not decision.gradients_finite and decision.factors_finite
    power.skip()
    twin.compress(Block({name: torch.zeros(SHAPES[name]) for name in SHAPES}, {}))  # the buffers alone are factored
    twin.decide()
    twin.skip()
    kept, expected = power.state_dict()["errors"], twin.state_dict()["errors"]
    assert all(torch.equal(kept[name], expected[name]) for name in COMPRESSED)


def test_an_unnoticed_nan_zeroes_its_own_buffer_and_no_other() -> None:
    power = power_sgd(ALONE, start="warm")
    one_update(power, block_of(0, 0))
    before = power.state_dict()
    bad = block_of(1, 0)
    wanted = {name: before["errors"][name] + gradient for name, gradient in bad.matrices.items() if name != "tiny"}
    bad.matrices["wide"][3, 3] = float("nan")
    power.compress(bad)
    decision = power.decide()
    assert decision.squared_norm == float("inf") and not decision.factors_finite
    power.skip()
    after = power.state_dict()
    assert torch.equal(after["errors"]["wide"], torch.zeros(SHAPES["wide"]))
    assert all(torch.equal(after["errors"][name], wanted[name]) for name in ("tall", "square"))
    assert all(torch.equal(after["starts"][name], before["starts"][name]) for name in COMPRESSED)
    assert one_update(power, block_of(2, 0)).is_finite


def test_a_plain_gradient_that_is_not_finite_stops_the_update() -> None:
    power, block = power_sgd(ALONE), block_of(0, 0)
    block.plain["gain"][1] = float("nan")
    power.compress(block)
    decision = power.decide()
    assert (decision.squared_norm, decision.gradients_finite, decision.factors_finite) == (float("inf"), False, True)


@pytest.mark.parametrize("scale", ["p_scale", "q_scale"])
def test_a_factor_beyond_the_wire_is_seen_before_it_is_clamped(scale: str) -> None:
    """1-6-9 ends just below 16; the buffers stay, for they are finite, and a smaller scale lets the update pass."""
    power = power_sgd(ALONE, wire="1-6-9", **{scale: 1e4})
    block = block_of(0, 0)
    given = copies(block)
    power.compress(block)
    decision = power.decide()
    assert decision.squared_norm == float("inf") and decision.gradients_finite and not decision.factors_finite
    power.skip()
    kept = power.state_dict()["errors"]
    assert all(torch.equal(kept[name], given[name]) for name in COMPRESSED)
    assert one_update(power_sgd(ALONE, wire="1-6-9", **{scale: 0.01}), block_of(0, 0)).is_finite


def test_an_overflow_of_a_16_bit_buffer_is_infinite_and_not_clamped() -> None:
    power, block = power_sgd(ALONE, errors="1-6-9"), block_of(0, 0)
    block.matrices["tall"][0, 0] = 17.0
    power.compress(block)
    assert not power.decide().factors_finite
    power.skip()
    kept = power.state_dict()["errors"]
    assert not kept["tall"].any() and kept["wide"].any()


def test_scales_of_the_wire_change_nothing_in_float32() -> None:
    plain, scaled = power_sgd(ALONE), power_sgd(ALONE, p_scale=0.25, q_scale=64.0)
    for step in range(3):
        blocks = block_of(step, 0), block_of(step, 0)
        norms = [one_update(power, block).squared_norm for power, block in zip((plain, scaled), blocks, strict=True)]
        assert norms[0] == norms[1]
        assert all(torch.equal(blocks[0].matrices[name], blocks[1].matrices[name]) for name in SHAPES)


def test_factors_are_what_apply_writes() -> None:
    """Who updates weights from the factors takes p q' off the buffer himself."""
    ours, twin = power_sgd(ALONE, errors="bf16"), power_sgd(ALONE, errors="bf16")
    for step in range(3):
        block = block_of(step, 0)
        one_update(ours, block)
        twin.compress(block_of(step, 0))
        twin.decide()
        found = twin.factors()
        assert [factor.name for factor in found] == list(COMPRESSED)
        for factor in found:
            assert factor.error.dtype == torch.bfloat16
            assert all(part.is_contiguous() for part in (factor.p, factor.q, factor.error))
            assert torch.equal(factor.p @ factor.q.mT, block.matrices[factor.name])
            factor.error.copy_(factor.error.float() - factor.p @ factor.q.mT)
        twin.finish()
    kept, expected = (power.state_dict()["errors"] for power in (twin, ours))
    assert all(torch.equal(kept[name], expected[name]) for name in COMPRESSED)


@pytest.mark.parametrize("start", ["fixed", "warm", "fresh"])
def test_a_restored_state_goes_on_to_the_same_bits(start: Any, tmp_path: Path) -> None:
    straight, stopped = (power_sgd(ALONE, start=start, errors="1-6-9", start_step=1) for _ in range(2))
    for power in (straight, stopped):
        for step in range(3):
            one_update(power, block_of(step, 0))
    torch.save(stopped.state_dict(), tmp_path / "state.pt")
    restored = power_sgd(ALONE, start=start, errors="1-6-9", start_step=1)
    restored.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for step in range(3, 6):
        blocks = block_of(step, 0), block_of(step, 0)
        one_update(straight, blocks[0])
        one_update(restored, blocks[1])
        assert all(torch.equal(blocks[0].matrices[name], blocks[1].matrices[name]) for name in SHAPES)


def test_starts_differ_by_name_and_shard_and_a_fresh_one_by_update() -> None:
    def bases(start: Any, seat: Seat) -> list[Tensor]:
        """Twice the factors of one gradient from empty buffers."""
        found = []
        power = power_sgd(seat, start=start, rank=RANK * seat.topology.shard_size)
        for _ in range(2):
            same = torch.ones(8, 20).tril()
            power.compress(Block({"a": same, "b": same.clone()}, {}))
            found += [factor.p for factor in power.factors()]
            power.load_state_dict({"step": power.step + 1, "overflows": 0, "errors": {}, "starts": {}})
        return found

    fixed, fresh = bases("fixed", ALONE), bases("fresh", ALONE)
    assert torch.equal(fixed[0], fixed[2]) and not torch.equal(fixed[0], fixed[1])
    assert not torch.equal(fresh[0], fresh[2])
    assert torch.equal(bases("fresh", ALONE)[2], fresh[2])
    other_shard = Seat(Topology(2, 2), 1)
    assert not torch.equal(bases("fixed", other_shard)[0], fixed[0])


def test_a_buffer_of_another_shard_is_refused() -> None:
    power = power_sgd(ALONE)
    power.load_state_dict({"step": 5, "overflows": 0, "errors": {"wide": torch.zeros(24, 40)}, "starts": {}})
    with pytest.raises(ValueError, match=r"wide is \(24, 40\), its gradient \(12, 40\): .* another number of shards"):
        power.compress(block_of(0, 0))


def test_a_shard_has_its_part_of_the_rank_unless_nothing_is_saved() -> None:
    paper = PowerSGDConfig(rank=896)
    assert shard_rank((496, 3968), paper, 8) == 112
    assert shard_rank((3968, 1984), paper, 8) == 112
    assert shard_rank((64, 64), paper, 8) == 0  # 64 x 128 numbers for 64 x 64
    assert shard_rank((64, 64), PowerSGDConfig(rank=896, least_saving=0.0), 8) == 64
    assert shard_rank((100, 100), PowerSGDConfig(rank=3), 8) == 1
    assert shard_rank((100, 100), PowerSGDConfig(rank=0), 8) == 0
    assert [shard_rank((100, 100), PowerSGDConfig(rank=r), 1) for r in (49, 50)] == [49, 0]
    assert [shard_rank((100, 100), PowerSGDConfig(rank=r, least_saving=2.0), 1) for r in (24, 25)] == [24, 0]


def test_settings_that_cannot_be_meant_are_refused() -> None:
    for name, value in {"rank": -1, "start_step": -1, "least_saving": -0.5, "p_scale": 0.0, "q_scale": -1.0}.items():
        with pytest.raises(SettingError, match=name):
            PowerSGDConfig(**{name: value})  # type: ignore[arg-type]
    with pytest.raises(SettingError, match=r"power_sgd.wire='1-6-9' is not one of fp32, bf16"):
        PowerSGD(PowerSGDConfig(wire="1-6-9"), ALONE, Arithmetic(ARITHMETIC.orthogonalise), CPU)


def test_nothing_is_sent_where_there_is_one_replica() -> None:
    power = power_sgd(ALONE)
    one_update(power, block_of(0, 0))
    assert power.bytes_sent == 0


def test_four_ranks(tmp_path: Path) -> None:
    """The checks of power_sgd_ranks, in one job: starting four processes takes longer than all of them."""
    run_on_four_ranks(tmp_path)


def test_the_approximation_of_a_low_rank_gradient_is_exact() -> None:
    """A product of RANK columns and rows needs no more columns of P."""
    generator = torch.Generator().manual_seed(3)
    low = torch.randn(30, RANK, generator=generator) @ torch.randn(RANK, 50, generator=generator)
    power = power_sgd(ALONE)
    given = low.clone()
    one_update(power, Block({"low": low}, {}))
    assert float((low - given).norm()) < 1e-4 * float(given.norm())  # epsilon tilts the basis by 1e-6 of its numbers
