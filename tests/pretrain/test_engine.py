"""Every way of training on several ranks against one process of plain torch, and what befalls gradients on the way."""

import math
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from data_pipeline.loader import words_in
from pretrain.model import Transformer, text_image_loss
from pretrain.optim import decay_groups
from pretrain.precision import BACK_OFF, GROWTH, START
from pretrain.schedule import Schedule
from tests.pretrain.engine_cases import (
    CASES,
    INJECTED_AT,
    INJECTED_INTO,
    MODEL,
    OPTIM,
    SIZES,
    STEPS,
    batch_of,
    config_of,
)

RANKS = 4
IN_FP32 = [
    "stage1", "stage2", "stage3", "stage3_parts", "stage1_offload", "stage3_offload", "2x2", "2x2_whole_rank",
]  # fmt: skip
IN_FP16 = ["fp16_stage1", "fp16_stage2_parts", "fp16_stage3_checkpointed", "fp16_global"]
WITH_INF = ["inf_stage1", "inf_stage3", "inf_fp32", "2x2_inf"]

Result = dict[str, Any]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Result]]:
    """Of each case the results of all ranks, out of one job."""
    folder = tmp_path_factory.mktemp("cases")
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={RANKS}", "--standalone"]
    command = [sys.executable, *launcher, "-m", "tests.pretrain.engine_cases", str(folder), *CASES]
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=400, cwd=root)
    assert done.returncode == 0, done.stderr[-3000:]
    return {
        name: [torch.load(folder / f"{name}.rank{rank}.pt", weights_only=True) for rank in range(RANKS)]
        for name in CASES
    }


@cache
def plain() -> tuple[list[float], dict[str, Tensor]]:
    """The definition: one process, float32, torch's own AdamW; its losses and weights."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = Transformer(MODEL, SIZES)
    optimizer = torch.optim.AdamW(
        decay_groups(model, OPTIM.weight_decay), betas=(OPTIM.beta1, OPTIM.beta2), eps=OPTIM.eps
    )
    schedule = Schedule(OPTIM, STEPS)
    losses: list[float] = []
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate(step)
        batch = batch_of(step)
        logits = model(batch.text, batch.image)
        loss = text_image_loss(*logits, batch.text, batch.image, 0.125, words_in(batch)).total
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), OPTIM.clip)
        optimizer.step()
        losses.append(loss.item())
    return losses, {name: p.detach() for name, p in model.named_parameters()}


def losses(result: Result) -> list[float]:
    return [values["train/loss"] for values in result["values"]]


def distance(result: Result) -> float:
    """Of all weights from those of the definition, relative to how far training has moved these."""
    torch.manual_seed(0)
    start = {name: p.detach() for name, p in Transformer(MODEL, SIZES).named_parameters()}
    want = plain()[1]
    away = sum((result["weights"][name] - want[name]).double().square().sum() for name in want)
    return math.sqrt(float(away) / float(sum((want[n] - start[n]).double().square().sum() for n in want)))


@pytest.mark.parametrize("name", IN_FP32)
def test_every_way_in_float32_is_one_process_of_plain_torch(name: str, results: dict[str, list[Result]]) -> None:
    result = results[name][0]
    assert losses(result) == pytest.approx(plain()[0], rel=1e-5)
    assert distance(result) < 1e-3  # Adam divides by the gradient's size, so rounding counts most where it is small
    assert all(result["applied"]) and any(norm_is_clipped(values) for values in result["values"])


def norm_is_clipped(values: dict[str, float]) -> bool:
    return values["train/grad_norm"] > OPTIM.clip


@pytest.mark.parametrize("name", IN_FP16)
def test_float16_branches_follow_float32(name: str, results: dict[str, list[Result]]) -> None:
    result = results[name][0]
    assert losses(result) == pytest.approx(plain()[0], rel=1e-4)
    assert 1e-6 < distance(result) < 0.1  # it is float16, and near
    assert all(result["applied"])


@pytest.mark.parametrize("name", list(CASES))
def test_all_ranks_log_the_same(name: str, results: dict[str, list[Result]]) -> None:
    first, *others = results[name]
    for other in others:
        assert repr(other["values"]) == repr(first["values"]) and other["applied"] == first["applied"]


@pytest.mark.parametrize("name", WITH_INF)
def test_an_inf_on_one_rank_stops_that_update_on_all(name: str, results: dict[str, list[Result]]) -> None:
    for result in results[name]:
        assert [step for step, applied in enumerate(result["applied"]) if not applied] == [INJECTED_AT]
        assert [step for step, stood in enumerate(result["stood_still"]) if stood] == [INJECTED_AT]
        assert all(math.isfinite(loss) for loss in losses(result))


@pytest.mark.parametrize("name", ["inf_stage1", "inf_stage3", "inf_block", "2x2_inf"])
def test_the_scale_of_the_resblock_with_an_inf_falls_and_no_other(name: str, results: dict[str, list[Result]]) -> None:
    result = results[name][0]
    assert result["left_out"][INJECTED_AT] == (INJECTED_INTO,)
    logged = result["values"][INJECTED_AT]
    grown = START + (INJECTED_AT + 1) * GROWTH
    for tag, value in logged.items():
        if tag.startswith("scale/"):
            assert value == pytest.approx(grown - (BACK_OFF + GROWTH) * (tag == f"scale/{INJECTED_INTO}"))
        if tag.startswith("skips/"):
            assert value == (tag == f"skips/{INJECTED_INTO}")


def test_only_the_resblock_with_an_inf_stands_still_if_that_is_asked_for(results: dict[str, list[Result]]) -> None:
    for result in results["inf_block"]:
        assert all(result["applied"]) and not any(result["stood_still"])
        assert result["moved"][INJECTED_AT] == [name for name in result["moved"][0] if name != INJECTED_INTO]


def test_an_overflow_between_replicas_stops_updates_until_the_error_buffers_are_given_up(
    results: dict[str, list[Result]],
) -> None:
    for result in results["2x2_factor_overflow"]:
        left_out = [step for step, applied in enumerate(result["applied"]) if not applied]
        assert left_out == list(range(INJECTED_AT, INJECTED_AT + 3))
        assert result["values"][-1].keys() >= {"train/grad_norm"} and math.isfinite(losses(result)[-1])


def test_compression_sends_less_and_trains_as_well(results: dict[str, list[Result]]) -> None:
    whole, low, everything = (results[name][0] for name in ("2x2", "2x2_low_rank", "2x2_everything"))
    assert low["bytes"] < 0.4 * whole["bytes"]
    for result in (low, everything):
        assert all(result["applied"]) and losses(result)[-1] == pytest.approx(losses(whole)[-1], rel=0.01)


def test_a_rank_holds_its_share_of_the_weights_only(results: dict[str, list[Result]]) -> None:
    total = sum(tensor.numel() for tensor in plain()[1].values())
    assert results["stage3"][0]["n_weights"] == pytest.approx(total / 4, rel=0.02)
    assert results["2x2"][0]["n_weights"] == pytest.approx(total / 2, rel=0.02)


def test_the_definition_is_that_of_the_settings() -> None:
    assert config_of(CASES["stage1"]).text_weight == 0.125 and config_of(CASES["stage1"]).seed == 0
