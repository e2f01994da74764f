"""Set smalti beside the peers that install from PyPI: `python -m benchmarks.peers`; about 15 minutes on one core.

Each program is measured in processes of its own, one at a time: smalti by `pretrain/bench.py` in this interpreter, a
peer by its script here in an environment that holds it. What cannot be installed or run has its error in the table.
"""

import argparse
import csv
import datetime
import json
import os
import platform
import resource
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
TORCH = next(word for word in PROJECT["dependencies"] if word.startswith("torch=="))
FIELDS = ("date", "cpu", "torch", "program", "version", "what", "whole", "bare", "ratio", "load", "error")
INSTALL_SECONDS, MEASURE_SECONDS = 1200, 300
MEASURES = {  # what is asked of a program -> the table's row
    "step 1": "training step, batch 1: CPU s (x its bare linear layers)",
    "memory 4": "largest memory of a step, batch 4: GB",
    "sample 1": "sampling 1 image: codes a CPU s (% of its bare linear layers)",
    "sample 8": "sampling 8 images of a caption: codes a CPU s (%)",
    "sample-cached 1": "sampling 1 image, its cache called by hand: codes a CPU s (%)",
    "sample-cached 8": "sampling 8 images of a caption, its cache called by hand: codes a CPU s (%)",
}


@dataclass(frozen=True)
class Program:
    """What is measured: `python -m MODULE MEASURE`."""

    name: str
    version: str
    module: str
    measures: tuple[str, ...]
    imports: tuple[str, ...] = ()  # what a peer imports, for pip; none: it runs in this interpreter


@dataclass(frozen=True)
class Row:
    """One measure of one program, in the units of MEASURES; sampling is CPU seconds for a code of all images."""

    program: str
    version: str
    what: str
    torch: str = ""
    whole: float | None = None
    bare: float | None = None
    ratio: float | None = None  # whole / bare of a step, bare / whole of sampling
    load: float | None = None  # of the machine, over the last minute
    error: str = ""


class Failed(Exception):
    """An installation or a measurement failed; the text is one line."""


WHOLE, CACHED = ("step 1", "memory 4", "sample 1", "sample 8"), ("sample-cached 1", "sample-cached 8")
SMALTI = Program("smalti", PROJECT["version"], "pretrain.bench", WHOLE)
DALLE_PYTORCH = Program(
    "dalle-pytorch",
    "1.6.6",
    "benchmarks.peer_dalle_pytorch",
    WHOLE + CACHED,
    (
        *("axial-positional-embedding==0.3.12", "einops==0.8.2", "rotary-embedding-torch==0.9.1", "setuptools<81"),
        *("numpy", "omegaconf", "packaging", "pillow", "pyyaml", "requests", "tqdm"),
    ),
)
RUDALLE = Program(
    "rudalle",
    "1.1.3",
    "benchmarks.peer_rudalle",
    WHOLE,
    (
        *("einops==0.8.2", "huggingface_hub==0.25.2", "transformers==4.38.2", "setuptools<81"),
        *("more-itertools", "numpy", "omegaconf", "pillow", "tqdm"),
    ),
)
PROGRAMS = (SMALTI, DALLE_PYTORCH, RUDALLE)


def call(words: Sequence[str | Path], seconds: float, folder: Path) -> str:
    """What the command prints. It may take most of the memory that is free, so that it fails before others do.

    Raises Failed with the last line that it complained with.
    """
    limit = int(0.9 * psutil.virtual_memory().available)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder), "PYTHONWARNINGS": "ignore"}
    try:
        done = subprocess.run(
            words,
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit)),
        )
    except subprocess.TimeoutExpired:
        raise Failed(f"took longer than {seconds:g} s") from None
    except OSError as error:
        raise Failed(str(error)) from None
    if done.returncode:
        complaints = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        raise Failed(complaints[-1] if complaints else f"ended with exit code {done.returncode}")
    return done.stdout


def python_of(program: Program, environments: Path) -> Path:
    """The interpreter of a program; makes its environment, or the part that is missing.

    torch comes first: a peer that asked for it, or for torchvision, would pull another build. Raises Failed.
    """
    if not program.imports:
        return Path(sys.executable)
    home = environments.absolute() / program.name
    python, done = home / "bin" / "python", home / "installed.txt"
    peer = f"{program.name}=={program.version}"
    wanted = "\n".join([TORCH, peer, *program.imports]) + "\n"
    if done.is_file() and done.read_text() == wanted:
        return python
    if not python.exists():
        home.mkdir(parents=True, exist_ok=True)
        call([sys.executable, "-m", "venv", home], INSTALL_SECONDS, home)
    for words in ([TORCH], ["--no-deps", peer], [TORCH, *program.imports]):
        call([python, "-m", "pip", "install", "--quiet", *words], INSTALL_SECONDS, home)
    done.write_text(wanted)
    return python


def torch_version(python: Path) -> str:
    """The build of torch in the environment of an interpreter, as pip knows it."""
    if python == Path(sys.executable):
        return metadata.version("torch")
    places = [str(path) for path in python.parent.parent.glob("lib/python*/site-packages")]
    return next((found.version for found in metadata.distributions(name="torch", path=places)), "")


def measured(program: Program, what: str, python: Path, folder: Path) -> Row:
    """One measure; its error where it fails."""
    row = Row(program.name, program.version, what, torch_version(python))
    try:
        printed = call([python, "-m", program.module, *what.split()], MEASURE_SECONDS, folder)
        answer = json.loads(printed.strip().splitlines()[-1])
        numbers = {"whole": answer["ours"], "bare": answer.get("theirs"), "ratio": answer.get("ratio")}
        return Row(**vars(row) | numbers | {"load": answer.get("load")})
    except (Failed, ValueError, LookupError, TypeError, AttributeError) as error:
        told = str(error) if isinstance(error, Failed) else f"answered no numbers: {error!r}"
        return Row(**vars(row) | {"error": told})


def rows_of(program: Program, environments: Path, folder: Path) -> list[Row]:
    """All measures of a program, each printed as a JSON line when it is there."""
    try:
        python = python_of(program, environments)
    except Failed as error:
        told = f"cannot be installed: {error}"
        rows = [Row(program.name, program.version, what, error=told) for what in program.measures]
        for row in rows:
            print(json.dumps(vars(row)), flush=True)
        return rows
    rows = []
    for what in program.measures:
        rows.append(measured(program, what, python, folder))
        print(json.dumps(vars(rows[-1])), flush=True)
    return rows


def cell(row: Row | None) -> str:
    """A measure as the table shows it."""
    if row is None:
        return ""
    if row.error or row.whole is None:
        return f"failed: {row.error}"[:120].replace("|", "/")
    if row.what.startswith("sample"):
        tokens = int(row.what.split()[1]) / row.whole
        return f"{tokens:.3g}" + (f" ({row.ratio:.1%})" if row.ratio is not None else "")
    return f"{row.whole:.2f}" + (f" ({row.ratio:.2f}x)" if row.ratio is not None else "")


def table(rows: Sequence[Row]) -> str:
    """A Markdown table: a line for each measure, a column for each program."""
    programs = list(dict.fromkeys((row.program, row.version) for row in rows))
    by_place = {(row.program, row.version, row.what): row for row in rows}
    asked = [what for what in MEASURES if any(row.what == what for row in rows)]
    lines = [["", *(f"{name} {version}" for name, version in programs)], ["---"] * (1 + len(programs))]
    lines += [[MEASURES[what], *(cell(by_place.get((*program, what))) for program in programs)] for what in asked]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def append(rows: Sequence[Row], path: Path) -> None:
    """Add the rows to a CSV file, which gets its header when it is new."""
    new = not path.exists()
    now, cpu = datetime.date.today().isoformat(), cpu_name()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows({"date": now, "cpu": cpu} | vars(row) for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--env", type=Path, default=ROOT / ".peers", help="folder of the peers' environments")
    parser.add_argument("--csv", type=Path, default=ROOT / "benchmarks" / "peers.csv", help="file to add the rows to")
    words = parser.parse_args()
    rows: list[Row] = []
    for program in PROGRAMS:
        found = rows_of(program, words.env, ROOT)
        append(found, words.csv)
        rows += found
    print(f"\n{datetime.date.today()}, {cpu_name()}, one thread, torch {metadata.version('torch')}, fp32\n")
    print(table(rows))


if __name__ == "__main__":
    main()
