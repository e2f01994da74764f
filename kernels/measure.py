"""What benchmarks share: clocks, a device's ceilings, and rows of results for a CSV file and a table."""

import csv
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

COLD_BYTES = 2**28  # read between two runs: several times any second-level cache
CYCLES_PER_SECOND = 2e9  # a little above the clock of an H100; only decides how long the device is made to wait
MOST_WAIT = 0.05  # seconds


class Clock:
    """Median seconds of work on one device, which finds its cache cold.

    On a GPU these are seconds of the device alone: it is made to wait until the host has launched all of the
    work, so that what the launches cost the host is not counted. On a CPU they are wall time.
    """

    def __init__(self, device: torch.device, runs: int, warmups: int) -> None:
        self.device, self.runs, self.warmups = device, runs, warmups
        self.cold = torch.zeros(COLD_BYTES // 4, device=device) if device.type == "cuda" else None

    def seconds(self, work: Callable[[Any], object], prepare: Callable[[], Any] = lambda: None) -> float:
        """work(prepare()), of which only the work is timed."""
        for _ in range(self.warmups):
            work(prepare())
        if self.cold is None:
            return statistics.median(self._on_host(work, prepare) for _ in range(self.runs))
        wait = self._launch_seconds(work, prepare)
        pairs = [self._on_device(work, prepare, wait, self.cold) for _ in range(self.runs)]
        torch.cuda.synchronize(self.device)
        return statistics.median(start.elapsed_time(end) / 1e3 for start, end in pairs)

    def _on_host(self, work: Callable[[Any], object], prepare: Callable[[], Any]) -> float:
        ready = prepare()
        start = time.perf_counter()
        work(ready)
        return time.perf_counter() - start

    def _on_device(
        self, work: Callable[[Any], object], prepare: Callable[[], Any], wait: float, cold: torch.Tensor
    ) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        ready = prepare()
        cold.amax()  # a read: written lines would go back to memory while the work is timed
        torch.cuda._sleep(int(wait * CYCLES_PER_SECOND))
        start.record()
        work(ready)
        end.record()
        return start, end

    def _launch_seconds(self, work: Callable[[Any], object], prepare: Callable[[], Any]) -> float:
        """Twice what the host needs to launch the work."""
        ready = prepare()
        torch.cuda.synchronize(self.device)
        launch = self._on_host(work, lambda: ready)
        torch.cuda.synchronize(self.device)
        return min(2 * launch, MOST_WAIT)


def cpu_seconds(work: Callable[[], object]) -> float:
    """CPU time of this process that `work` takes."""
    start = time.process_time()
    work()
    return time.process_time() - start


def best_of(rounds: int, *works: Callable[[], object]) -> list[float]:
    """The least CPU seconds of each over some rounds in which they take turns, after one that does not count."""
    times = [[cpu_seconds(work) for work in works] for _ in range(rounds + 1)]
    return [min(column) for column in zip(*times[1:], strict=True)]


def wall_seconds(device: torch.device, work: Callable[[], object]) -> float:
    """Wall time until the device has done all of the work, launches included."""
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True)
class Ceilings:
    """What a device reaches, measured: bytes a second, read plus written; FLOP a second of bf16 products."""

    bandwidth: float
    matmul: float

    def floor(self, n_bytes: float, flops: float) -> float:
        """Seconds: nothing that must move so many bytes and do so many FLOPs is much faster."""
        return max(n_bytes / self.bandwidth, flops / self.matmul)


def ceilings(clock: Clock, n_copied: int = 2**30, side: int = 8192) -> Ceilings:
    """By a copy of n_copied bytes and a product of random matrices: zeros would multiply faster."""
    source = torch.rand(n_copied // 4, device=clock.device)
    target = torch.empty_like(source)
    copy = clock.seconds(lambda _: target.copy_(source))
    a, b = (torch.randn(side, side, device=clock.device, dtype=torch.bfloat16) for _ in range(2))
    product = clock.seconds(lambda _: a @ b)
    return Ceilings(2 * source.nbytes / copy, 2 * side**3 / product)


def about(device: torch.device, reached: Ceilings) -> dict[str, str]:
    """What a row must tell to be read later: the device, its ceilings in this run, and versions."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "copy_tb_s": f"{reached.bandwidth / 1e12:.3f}",
        "matmul_tflop_s": f"{reached.matmul / 1e12:.1f}",
        "driver": driver_version() if device.type == "cuda" else "",
        "torch": torch.__version__,
        "triton": version("triton"),
    }


def version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def driver_version() -> str:
    words = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(words, capture_output=True, text=True, check=True, timeout=30)
        return answer.stdout.strip().splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown"


def first_line(error: BaseException) -> str:
    """The kind of an error and the first line of what it says."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def append(rows: Sequence[Mapping[str, object]], path: Path) -> None:
    """Add the rows to a CSV file, which gets its header when it is new. ValueError if the header is another."""
    if not rows:
        return
    fields = list(rows[0])
    is_new = not path.exists()
    if not is_new:
        with path.open(newline="") as file:
            header = next(csv.reader(file), [])
        if header != fields:
            raise ValueError(f"{path} has other columns; give another file, or move this one away")
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, fields, lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerows({name: cell(value) for name, value in row.items()} for row in rows)


def cell(value: object) -> str:
    """A value as files and tables show it."""
    if value is None:
        return ""
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def table(rows: Sequence[Mapping[str, object]], fields: Sequence[str]) -> str:
    """Some fields of the rows, a column each, as wide as what stands in it."""
    lines = [list(fields), *([cell(row[field]) for field in fields] for row in rows)]
    widths = [max(len(line[at]) for line in lines) for at in range(len(fields))]
    padded = ("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) for line in lines)
    return "\n".join(line.rstrip() for line in padded)
