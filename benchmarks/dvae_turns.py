"""Training steps and encodings of a size, ours and the published modules', in turns: for benchmarks/dvae.py.

`python -m benchmarks.dvae_turns SIZE` prints one JSON object. Each program has a process of its own, so that neither
finds memory that the other has freed.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch

from benchmarks.distributed_jobs import Failed
from benchmarks.dvae_sizes import (
    SIZES,
    Published,
    made,
    mapped_pictures,
    noise_for,
    seconds_of,
    stepper,
    training_flops,
)
from dvae.config import DvaeConfig
from kernels.linear import linear

PROGRAMS = ("ours", "theirs")
ROUNDS, MATRIX = 5, 2048
Times = dict[str, dict[str, list[float]]]  # seconds of each program's works, a number a round


def products() -> dict[str, Callable[[], object]]:
    """On AMD processors torch's own product is not the fastest (see kernels/linear.py)."""
    a, b = torch.randn(2, MATRIX, MATRIX)
    nothing = torch.zeros(MATRIX)
    return {"a @ b": lambda: a @ b, "kernels/linear.py": lambda: linear(a, b, nothing)}


def works(program: str, config: DvaeConfig) -> dict[str, Callable[[], object]]:
    """What a program is timed at: fp32, one picture."""
    ours, x, noise = made(config), mapped_pictures(config, 1), noise_for(config, 1)
    if program == "ours":
        encode = torch.no_grad()(lambda: ours.encode(x))
        return products() | {"step": stepper(ours, x, noise), "encode": encode}
    theirs, plain = Published(config), x.contiguous()
    theirs.take_weights(ours)
    encode = torch.no_grad()(lambda: theirs.encoder(plain).argmax(1))
    return {"step": stepper(theirs, plain, noise), "encode": encode}


def answer_turns(program: str, config: DvaeConfig) -> None:
    """For each line that comes do every work once, and print its seconds."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    todo = works(program, config)
    for _ in sys.stdin:
        print(json.dumps({name: seconds_of(work) for name, work in todo.items()}), flush=True)


@contextmanager
def waiting(program: str, size: str) -> Iterator[Callable[[], dict[str, float]]]:
    """A process of a program; each call is its turn."""
    words = [sys.executable, "-m", "benchmarks.dvae_turns", size, "--program", program]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0) as job:
        to_it, from_it = job.stdin, job.stdout
        assert to_it and from_it

        def turn() -> dict[str, float]:
            with suppress(BrokenPipeError):  # it has ended, which the next line tells
                to_it.write(b"\n")
            line = from_it.readline()
            if not line:
                raise Failed(f"the process of {program} ended with exit code {job.wait()}")
            return json.loads(line)

        try:
            yield turn
        finally:
            job.kill()


def measured(size: str, rounds: int = ROUNDS) -> Times:
    """The first turn of each, which makes buffers, does not count; after that they begin by turns."""
    with ExitStack() as stack:
        turns = {program: stack.enter_context(waiting(program, size)) for program in PROGRAMS}
        for turn in turns.values():
            turn()
        found = [
            {program: turns[program]() for program in (PROGRAMS if number % 2 else reversed(PROGRAMS))}
            for number in range(rounds)
        ]
    return {
        program: {work: [one[program][work] for one in found] for work in found[0][program]} for program in PROGRAMS
    }


def told(times: Times, flops: int) -> dict[str, Any]:
    """Ratios of each round, how fast the better product is, and the best step's share of that rate.

    flops: of forward and backward of one picture.
    """
    ours = times["ours"]

    def ratios(work: str) -> list[float]:
        return [theirs / mine for mine, theirs in zip(ours[work], times["theirs"][work], strict=True)]

    fastest = min((work for work in ours if work not in ("step", "encode")), key=lambda work: min(ours[work]))
    peak = 2 * MATRIX**3 / min(ours[fastest])
    return {
        "step": ratios("step"),
        "encode": ratios("encode"),
        "share": flops / min(ours["step"]) / peak,
        "gflop_s": peak / 1e9,
        "product": fastest,
        "seconds": {
            program: {work: statistics.median(column) for work, column in columns.items()}
            for program, columns in times.items()
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("--program", choices=PROGRAMS, help="be one of the processes")
    words = parser.parse_args()
    if words.program:
        answer_turns(words.program, SIZES[words.size])
        return
    source = Published(SIZES["tiny"]).source
    print(json.dumps(told(measured(words.size), training_flops(SIZES[words.size])) | {"source": source}))


if __name__ == "__main__":
    main()
