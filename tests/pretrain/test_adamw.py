"""AdamW with moments in 16 bits: equal to torch's where it should be, near it elsewhere, kept whole by checkpoints."""

import copy
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kernels import low_bit
from pretrain.adamw import DTYPES, LEAST_DECAY, AdamW, Factors

OPTIONS: dict[str, Any] = {"lr": 3e-3, "betas": (0.9, 0.96), "weight_decay": 0.045}
EVERY_KIND = pytest.mark.parametrize("moments", DTYPES)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def small_mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 4))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, start: int, stop: int) -> list[float]:
    """Regression on what a fixed random net says; the losses."""
    teacher, losses = torch.randn(8, 4, generator=generator(1)), []
    for step in range(start, stop):
        x = torch.randn(64, 8, generator=generator(100 + step))
        loss = (model(x) - (x @ teacher).tanh()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def groups(model: nn.Module, **matrices: Any) -> list[dict[str, Any]]:
    """Matrices with the given options; biases with fp32 moments and no decay."""
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.ndim == 2], **matrices},
        {"params": [p for p in parameters if p.ndim == 1], "moments": "fp32", "weight_decay": 0.0},
    ]


def test_with_fp32_moments_it_is_torchs_fused_adamw_to_the_last_bit() -> None:
    model, other = small_mlp(), small_mlp()
    ours = AdamW(groups(model), **OPTIONS)
    torchs = torch.optim.AdamW(
        [{k: v for k, v in g.items() if k != "moments"} for g in groups(other)], fused=True, **OPTIONS
    )
    assert train(model, ours, 0, 20) == train(other, torchs, 0, 20)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
        assert torch.equal(ours.state[p]["step"], torchs.state[q]["step"])
        for name in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(ours.state[p][name], torchs.state[q][name])


@pytest.mark.parametrize(("moments", "apart"), [("bf16", 5e-3), ("16-bit", 1.5e-3)])
def test_a_small_net_trains_as_with_fp32_moments(moments: str, apart: float) -> None:
    """Measured after 300 steps: losses 4e-5 and 2e-5 apart, weights 1.7e-3 and 4e-4 of their norm. Thrice will do."""
    ends = []
    for kind in ("fp32", moments):
        model = small_mlp()
        losses = train(model, AdamW(groups(model, moments=kind), **OPTIONS), 0, 300)
        weights = torch.cat([p.detach().flatten() for p in model.parameters()])
        ends.append((sum(losses[-50:]) / 50, weights))
    (loss, weights), (other_loss, other_weights) = ends
    assert loss < 0.15  # from 0.77
    assert other_loss == pytest.approx(loss, rel=1.2e-4) and other_loss != loss
    assert (other_weights - weights).norm() < apart * weights.norm()


@EVERY_KIND
def test_a_quadratic_of_many_curvatures_is_solved(moments: str) -> None:
    """From 1e-3 to 1e3, with a falling step size: measured 1.1e-5 off at most, with moments of any kind."""
    w = torch.ones(1000, requires_grad=True)
    curvature, target = torch.logspace(-3, 3, 1000), torch.linspace(-1, 1, 1000)
    optimizer = AdamW([{"params": [w], "moments": moments}], betas=(0.9, 0.96), weight_decay=0.0)
    for step in range(500):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / 500)
        optimizer.zero_grad()
        ((w - target).square() * curvature).sum().backward()
        optimizer.step()
    assert (w - target).abs().max() < 2e-5


@EVERY_KIND
def test_a_saved_state_goes_on_bit_for_bit(moments: str) -> None:
    def start() -> tuple[nn.Module, AdamW]:
        model = small_mlp()
        return model, AdamW(groups(model, moments=moments, variance_clip=5.0), **OPTIONS)

    model, optimizer = start()
    train(model, optimizer, 0, 7)
    file = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), file)
    expected = train(model, optimizer, 7, 12)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    again, resumed = start()
    again.load_state_dict(weights)
    resumed.load_state_dict(state)
    first = resumed.state[next(again.parameters())]
    assert first["exp_avg"].dtype == first["exp_avg_sq"].dtype == DTYPES[moments] and first["exp_avg"].any()
    assert train(again, resumed, 7, 12) == expected
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(), strict=True))


def test_a_state_saved_by_torchs_adamw_is_taken_over() -> None:
    model = small_mlp()
    before = torch.optim.AdamW(model.parameters(), fused=True, **OPTIONS)
    train(model, before, 0, 5)
    other = copy.deepcopy(model)
    after = AdamW(other.parameters(), **OPTIONS)
    after.load_state_dict(copy.deepcopy(before.state_dict()))
    assert train(model, before, 5, 10) == train(other, after, 5, 10)


def test_a_state_of_another_precision_is_refused() -> None:
    """DeepSpeed's elastic checkpoints would make floats of codes."""
    model = small_mlp()
    optimizer = AdamW(model.parameters(), moments="16-bit", **OPTIONS)
    train(model, optimizer, 0, 1)
    state = optimizer.state[next(model.parameters())]
    state["exp_avg"] = state["exp_avg"].float()
    with pytest.raises(ValueError, match="exp_avg is stored as torch.float32; 16-bit moments are torch.int16"):
        optimizer.step()


@EVERY_KIND
def test_a_clipped_variance_makes_a_large_gradient_step_far(moments: str) -> None:
    """mean / sqrt(variance), corrected for their bias, is 100 / sqrt(5 / 0.04) of the first gradient of 100, else 1."""
    for variance_clip, steps in ((0.0, 1.0), (5.0, 100 / 125**0.5)):
        w = torch.zeros(3, requires_grad=True)
        optimizer = AdamW([w], lr=1e-3, betas=(0.9, 0.96), moments=moments, variance_clip=variance_clip)
        w.grad = torch.full((3,), 100.0)
        optimizer.step()
        assert w.tolist() == pytest.approx([-1e-3 * steps] * 3)
        if variance_clip:
            kept = optimizer.state[w]["exp_avg_sq"]
            assert (low_bit.decode(kept, "0-6-10") if moments == "16-bit" else kept).tolist() == [5.0] * 3


def test_each_group_keeps_moments_of_its_own() -> None:
    """A mix is what its groups would be alone."""
    wanted = {"fp32": torch.float32, "bf16": torch.bfloat16, "16-bit": torch.int16}

    def parameters() -> list[Tensor]:
        return [torch.randn(50, generator=generator(i)).requires_grad_() for i in range(3)]

    def run(optimizer: AdamW) -> None:
        for step in range(5):
            for i, group in enumerate(optimizer.param_groups):
                group["params"][0].grad = torch.randn(50, generator=generator(100 * step + wanted_order[i]))
            optimizer.step()

    mixed, alone = parameters(), parameters()
    wanted_order = [0, 1, 2]
    optimizer = AdamW([{"params": [p], "moments": kind} for p, kind in zip(mixed, wanted, strict=True)], **OPTIONS)
    run(optimizer)
    for i, (p, q, kind) in enumerate(zip(mixed, alone, wanted, strict=True)):
        wanted_order = [i]
        run(AdamW([q], moments=kind, **OPTIONS))
        assert torch.equal(p, q)
        assert optimizer.state[p]["exp_avg"].dtype == optimizer.state[p]["exp_avg_sq"].dtype == wanted[kind]
        assert optimizer.state[p]["step"].shape == () and optimizer.state[p]["step"] == 5


@EVERY_KIND
def test_slices_of_a_flat_parameter_make_up_the_whole(moments: str) -> None:
    whole, sliced = (torch.randn(1000, generator=generator(0)).requires_grad_() for _ in range(2))
    optimizer = AdamW([{"params": [p], "moments": moments} for p in (whole, sliced)], **OPTIONS)
    for step in range(3):
        gradient = torch.randn(1000, generator=generator(step))
        for p, group in zip((whole, sliced), optimizer.param_groups, strict=True):
            optimizer.advance(p, group)
            cuts = (0, 1000) if p is whole else (0, 333, 340, 1000)
            for start, stop in zip(cuts, cuts[1:], strict=False):
                optimizer.step_parameter(p, group, gradient[start:stop], 0.5, start)
    assert (whole - sliced).abs().max() < 1e-6  # the ends of a run of memory are added up in another order
    assert optimizer.state[sliced]["step"] == 3


@EVERY_KIND
def test_factors_are_the_gradient_that_they_multiply_to(moments: str) -> None:
    """In the middle of a flat parameter; what lies beside it stays. The error loses a quarter of the gradient."""
    p, q = torch.randn(12, 3, generator=generator(1)), torch.randn(20, 3, generator=generator(2))
    error = low_bit.encode(torch.randn(12, 20, generator=generator(3)), "1-6-9")
    fresh = low_bit.decode(error, "1-6-9")
    dense, factored = (torch.randn(300, generator=generator(0)).requires_grad_() for _ in range(2))
    optimizer = AdamW([{"params": [w], "moments": moments} for w in (dense, factored)], **OPTIONS)
    for w, gradient in ((dense, p @ q.T), (factored, Factors(p, q, error, 4))):
        optimizer.advance(w, group := optimizer.param_groups[0 if w is dense else 1])
        optimizer.step_parameter(w, group, gradient, grad_factor=0.5, start=40)
    assert (dense - factored).abs().max() < 1e-6
    untouched = torch.randn(300, generator=generator(0))
    assert torch.equal(factored[:40], untouched[:40]) and torch.equal(factored[280:], untouched[280:])
    assert not torch.equal(factored[40:280], untouched[40:280])
    left = low_bit.decode(error, "1-6-9")
    assert (left - (fresh - p @ q.T / 4)).abs().max() < 2.0**-7  # half a unit of numbers up to 8


def test_a_slice_outside_or_without_a_count_is_refused() -> None:
    w = torch.zeros(10, requires_grad=True)
    optimizer = AdamW([w], **OPTIONS)
    optimizer.advance(w, optimizer.param_groups[0])
    with pytest.raises(ValueError, match="numbers 8 to 11 of a parameter that has 10"):
        optimizer.step_parameter(w, optimizer.param_groups[0], torch.zeros(3), start=8)


def test_unknown_moments_and_betas_that_they_cannot_follow_are_refused() -> None:
    w = torch.zeros(1)
    with pytest.raises(ValueError, match="moments '8-bit' is not one of fp32, bf16, 16-bit"):
        AdamW([w], moments="8-bit")
    with pytest.raises(ValueError, match="beta2 0.999: bf16 moments never decay"):
        AdamW([{"params": [w], "moments": "bf16"}], betas=(0.9, 0.999))
    with pytest.raises(ValueError, match="beta1 0.9995: 16-bit moments never decay"):
        AdamW([w], moments="16-bit", betas=(0.9995, 0.96))
    AdamW([w], moments="16-bit", betas=(0.9, 0.999))


@pytest.mark.parametrize("moments", ["bf16", "16-bit"])
def test_a_moment_decays_everywhere_just_below_the_limit_of_its_beta_and_not_at_it(moments: str) -> None:
    """Without a gradient, from every positive normal number there is."""
    if moments == "16-bit":
        mean, variance = torch.arange(0x200, 0x7E00), torch.arange(0x400, 0xFC00)
    else:
        mean = variance = torch.arange(0x80, 0x7F80)
    for moment, name, least in zip((mean, variance), ("exp_avg", "exp_avg_sq"), LEAST_DECAY[moments], strict=True):
        for beta, decays in ((1 - least * 1.05, True), (1 - least, False)):
            w = torch.zeros(len(moment))
            optimizer = AdamW([w], betas=(0.5, 0.5), moments=moments)
            group = optimizer.param_groups[0]
            optimizer.advance(w, group)
            state = optimizer.state[w][name]
            state.view(torch.int16).copy_(moment.to(torch.int32).to(torch.int16))
            group["betas"] = (beta, beta)
            optimizer.step_parameter(w, group, torch.zeros_like(w))
            after = state.view(torch.int16).int() & 0xFFFF
            assert (after < moment).all() == decays


UNDER_DEEPSPEED = """
import json, sys, tempfile
import torch, torch.distributed as dist
from torch import nn
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
import deepspeed, deepspeed.ops
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # which only inference would compile and call
deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
from pretrain.adamw import AdamW

def start(stage):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 9), nn.GELU(), nn.Linear(9, 3))
    parameters = list(model.parameters())
    optimizer = AdamW(
        [{"params": parameters[::2], "moments": "16-bit", "variance_clip": 5.0}, {"params": parameters[1::2]}],
        lr=1e-2, betas=(0.9, 0.96),
    )
    settings = {
        "train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": stage}, "steps_per_print": 2**31,
        "zero_allow_untested_optimizer": True,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    return engine, optimizer

def train(engine, first, last):
    losses = []
    for step in range(first, last):
        random = torch.Generator().manual_seed(step)
        x, y = torch.randn(4, 7, generator=random), torch.randn(4, 3, generator=random)
        loss = (engine(x) - y).square().mean()
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses

answers = []
for stage in (0, 1, 2, 3):
    with tempfile.TemporaryDirectory() as folder:
        engine, optimizer = start(stage)
        train(engine, 0, 4)
        engine.save_checkpoint(folder, tag="t")
        went_on = train(engine, 4, 8)
        engine, optimizer = start(stage)
        engine.load_checkpoint(folder, tag="t")
        resumed = train(engine, 4, 8)
        kinds = sorted({str(state["exp_avg_sq"].dtype) for state in optimizer.state.values()})
        answers.append({"went_on": went_on, "resumed": resumed, "kinds": kinds})
with open(sys.argv[1], "w") as file:
    json.dump(answers, file)
"""


def test_codes_survive_deepspeeds_checkpoints_at_every_zero_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"DS_ACCELERATOR": "cpu", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    words = [sys.executable, "-c", UNDER_DEEPSPEED, str(tmp_path / "answers.json")]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    answers = json.loads((tmp_path / "answers.json").read_text())
    for answer in answers:
        assert answer["resumed"] == answer["went_on"] == pytest.approx(answers[0]["went_on"], rel=1e-5)
        assert answer["kinds"] == ["torch.float32", "torch.int16"]
