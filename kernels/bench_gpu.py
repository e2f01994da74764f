"""Time the GPU kernels against their peers and the floor of the device; what computes wrongly is not timed.

    python -m kernels.bench_gpu                          on a CUDA device, about 4 minutes
    python -m kernels.bench_gpu --tiny --device cpu      the same in small, to try the program itself

bf16, random numbers, cold cache, medians. The floor is the larger of bytes over the device's copy rate and
FLOPs over its matrix product rate, both measured first; kernels/bench_cases.py says what is counted. All
rows are appended to a CSV file as they come. On a CPU's own kernels: kernels/bench.py.
"""

import argparse
import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from functools import partial
from pathlib import Path

import torch

from kernels.attention import How
from kernels.bench_cases import Case, Contestant, Named, Work, attention_case, boundary_case, relaxed_codes_case
from kernels.layout import Layout, Pattern, Sparsity
from kernels.measure import Ceilings, Clock, about, append, ceilings, first_line, table

RESULTS = Path(__file__).parent / "results_gpu.csv"
PATTERNS: tuple[Pattern, ...] = ("row", "column", "conv")
GOALS = {"forward": 1.6, "backward": 1.8}  # times the floor
# Of |value - exact| / |exact|. A stored bf16 number errs by up to 3.9e-3, a third of that on average, and
# attention rounds its weights to bf16 as well; float32 results are sums of some thousand numbers.
LIMIT = {torch.bfloat16: 1.2e-2, torch.float32: 1e-5}
SLACK = 2e-6  # a GPU's exp and log err by 2 units in the last place, which plain torch's need not

Make = Callable[[], Case]


@dataclass(frozen=True)
class Row:
    """Ours against one peer, in one direction; or why there are no numbers."""

    what: str
    direction: str
    peer: str
    ours_us: float | None = None
    theirs_us: float | None = None
    floor_us: float | None = None
    ratio: float | None = None  # ours to the floor
    goal: float | None = None
    n_bytes: int | None = None
    flops: int | None = None
    error: str = ""


def all_results(contestant: Contestant) -> Named:
    outputs = contestant.forward()
    named = contestant.outputs(outputs) | contestant.gradients(contestant.backward(outputs))
    return {name: value.detach() for name, value in named.items()}


def relative_errors(values: Named, exact: Named) -> dict[str, float]:
    """|value - exact| / |exact|, 2-norms, under each name."""
    return {name: float((v.double() - exact[name].double()).norm() / exact[name].norm()) for name, v in values.items()}


def fault(case: Case) -> str:
    """What is wrong with our results, "" if nothing: against the definition in float64, and twice the same bits."""
    # New memory is filled with NaN meanwhile, so an element that a kernel leaves out is seen.
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        ours, again = all_results(case.ours), all_results(case.ours)
    finally:
        torch.use_deterministic_algorithms(False)
    exact, plain = all_results(case.definition.double()), all_results(case.definition)
    usual = relative_errors(plain, exact)
    faults = []
    for name, error in relative_errors(ours, exact).items():
        limit = min(LIMIT[ours[name].dtype], 2 * usual[name] + SLACK)
        if not error <= limit:
            faults.append(f"{name} is off by {error:.1e}, the limit is {limit:.1e}")
        if not torch.equal(ours[name], again[name]):
            faults.append(f"{name} differs between two runs")
    return "wrong: " + "; ".join(faults) if faults else ""


def disagreement(case: Case, peer: Contestant) -> str:
    """Does a peer that should compute the same function? Both sides round, so twice the limit."""
    if not peer.same:
        return ""
    with torch.no_grad():
        ours, theirs = (way.outputs(way.forward()) for way in (case.ours, peer))
    errors, limit = relative_errors(theirs, ours), 2 * LIMIT[torch.bfloat16]
    return "; ".join(f"its {name} is off by {error:.1e}" for name, error in errors.items() if not error <= limit)


def timings(clock: Clock, contestant: Contestant) -> Iterator[tuple[str, float]]:
    """Direction and seconds, one after the other: a peer may have one direction and not the next."""
    yield "forward", clock.seconds(lambda _: contestant.forward())
    yield "backward", clock.seconds(contestant.backward, contestant.forward)
    yield "forward+backward", clock.seconds(lambda _: contestant.backward(contestant.forward()))


def our_rows(case: Case, clock: Clock, reached: Ceilings) -> dict[str, Row]:
    """Our times under their direction, without a peer yet."""
    both = Work(case.forward.n_bytes + case.backward.n_bytes, case.forward.flops + case.backward.flops)
    work = {"forward": case.forward, "backward": case.backward, "forward+backward": both}
    floors = {direction: reached.floor(w.n_bytes, w.flops) for direction, w in work.items()}
    floors["forward+backward"] = floors["forward"] + floors["backward"]
    return {
        direction: Row(
            case.what, direction, "", ours_us=seconds * 1e6, floor_us=floors[direction] * 1e6,
            ratio=seconds / floors[direction], goal=GOALS.get(direction),
            n_bytes=work[direction].n_bytes, flops=work[direction].flops,
        )
        for direction, seconds in timings(clock, case.ours)
    }  # fmt: skip


def peer_rows(case: Case, name: str, ours: dict[str, Row], clock: Clock) -> Iterator[Row]:
    """A row for each direction; the first that fails ends them."""
    left = {direction: replace(row, peer=name) for direction, row in ours.items()}
    try:
        peer = case.peers[name]()
        if told := disagreement(case, peer):
            raise ArithmeticError(f"another result: {told}")
        for direction, seconds in timings(clock, peer):
            yield replace(left.pop(direction), theirs_us=seconds * 1e6)
    except Exception as error:  # whatever a peer raises
        for row in left.values():
            yield replace(row, error=first_line(error))


def rows_of(make: Make, clock: Clock, reached: Ceilings) -> list[Row]:
    """All rows of a case: checked first, and only its fault if there is one."""
    case = None
    try:
        case = make()
        if told := fault(case):
            return [Row(case.what, "check", "", error=told)]
        ours = our_rows(case, clock, reached)
    except Exception as error:  # the rows of the other cases shall come
        return [Row(case.what if case else "a case", "check", "", error=first_line(error))]
    return [row for name in case.peers for row in peer_rows(case, name, ours, clock)]


def cut_fault(pattern: Pattern, device: torch.device, how: How) -> str:
    """The fault, if any, where the segments' ends cut tiles: prime sides, 37 text slots, a head of 24."""
    try:
        return fault(attention_case(Sparsity(pattern, Layout(37, 9, 11), 5), 2, 3, 24, device, how))
    except Exception as error:
        return first_line(error)


def cases(device: torch.device, tiny: bool, how: How) -> Iterator[tuple[str, Make]]:
    """(what a fault anywhere else would spoil, the case)."""
    if tiny:
        attentions, boundaries, codes = [(Layout(16, 8, 8), 1, 2, 16)], [(24, 48)], [(24, 40)]
    else:
        attentions = [(Layout(256, 32, 32), 4, 62, 64), (Layout(64, 16, 16), 8, 8, 64)]
        boundaries, codes = [(4 * 1280, 62 * 64), (8 * 320, 8 * 64)], [(8 * 1024, 8192)]
    for layout, b, h, d in attentions:
        for pattern in PATTERNS:
            sparsity = Sparsity(pattern, layout)
            yield pattern, partial(attention_case, sparsity, b, h, d, device, how)
    for size in boundaries:
        yield "", partial(boundary_case, *size, device)
    for size in codes:
        yield "", partial(relaxed_codes_case, *size, device)


def measure(device: torch.device, tiny: bool, how: How = "auto") -> Iterator[list[dict[str, object]]]:
    """The rows of one case after the other, complete with what they were measured on."""
    clock = Clock(device, runs=1, warmups=0) if tiny else Clock(device, runs=50, warmups=5)
    reached = ceilings(clock, *((2**20, 64) if tiny else ()))
    on: dict[str, object] = {"date": date.today().isoformat(), **about(device, reached)}
    faults: dict[str, str] = {pattern: cut_fault(pattern, device, how) for pattern in PATTERNS}
    for kind, told in faults.items():
        if told:
            yield [asdict(Row(f"attention {kind}, cut tiles", "check", "", error=told)) | on]
    for kind, make in cases(device, tiny, how):
        if not faults.get(kind):
            yield [asdict(row) | on for row in rows_of(make, clock, reached)]
        if device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help="CSV that the rows are appended to")
    parser.add_argument("--tiny", action="store_true", help="small sizes and one repetition: no figures to keep")
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    given = parser.parse_args(words)
    if given.device.type == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device; try --tiny --device cpu")
    if given.device.type == "cpu":
        torch.set_num_threads(1)
    rows: list[dict[str, object]] = []
    for found in measure(given.device, given.tiny):
        append(found, given.out)
        rows += found
        told = found[0]["error"] if found[0]["direction"] == "check" else "right, and timed"
        print(f"{found[0]['what']}: {told}", flush=True)
    shown = ("what", "direction", "ours_us", "floor_us", "ratio", "goal", "peer", "theirs_us", "error")
    print(table(rows, shown))
    print(", ".join(f"{name} {rows[0][name]}" for name in ("device", "copy_tb_s", "matmul_tflop_s", "torch", "triton")))


if __name__ == "__main__":
    main()
