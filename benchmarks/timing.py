"""Time a peer's training step, its memory and its sampling; runs in the peer's environment, which has no smalti.

The sizes and the rules are those of `pretrain/bench.py`: one thread, process CPU time, fp32, and what is timed takes
turns with the peer's own linear layers alone, so that both meet the machine in the same state.
"""

import argparse
import importlib.machinery
import json
import os
import resource
import sys
import time
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

N_LAYERS, D_MODEL, N_HEADS, D_HEAD = 12, 512, 8, 64
N_TEXT, GRID, TEXT_VOCAB, CODEBOOK = 256, 32, 16_384, 8_192
PREFIX = GRID**2 // 2  # sampling starts at row 16: a token there costs what one costs on average over the picture
ROUNDS = 4
MOST_TOKENS, BUDGET_SECONDS = 32, 40.0


@dataclass(frozen=True)
class Peer:
    """How to call a peer."""

    build: Callable[[bool], nn.Module]  # its model with random weights; True: for training
    loss: Callable[[nn.Module, Tensor, Tensor], Tensor]  # model, text B x T, image B x I
    # Ways to sample: model, text N x T, the first PREFIX codes N x I. A way draws code after code, each with one call
    # of the model, until it is stopped by an exception.
    ways: Mapping[str, Callable[[nn.Module, Tensor, Tensor], object]]


class Enough(Exception):
    """Stops a peer's own sampling loop once its time is known."""


class Hollow(types.ModuleType):
    """A module with nothing in it, whatever is asked for: an empty class."""

    __path__: list[str] = []

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = importlib.machinery.ModuleSpec(name, None)  # importlib.util.find_spec wants one

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def hollow_out(*names: str) -> None:
    """Let a peer import what it does not use here: torchvision (no build for each torch), tokenisers, VQGANs."""
    for name in names:
        parts = name.split(".")
        for n_parts in range(1, len(parts) + 1):
            dotted = ".".join(parts[:n_parts])
            sys.modules.setdefault(dotted, Hollow(dotted))


def cpu_seconds(work: Callable[[], object]) -> float:
    """CPU time of this process that `work` takes."""
    start = time.process_time()
    work()
    return time.process_time() - start


def linears_of(model: nn.Module) -> list[nn.Linear]:
    return [module for module in model.modules() if isinstance(module, nn.Linear)]


class TrainingStep:
    """One update of a peer's model, and of its linear layers alone on as many rows as they were given."""

    def __init__(self, peer: Peer, batch: int) -> None:
        torch.manual_seed(0)
        self.peer, self.model = peer, peer.build(True).train()
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
        self.text = torch.randint(1, TEXT_VOCAB, (batch, N_TEXT))
        self.image = torch.randint(CODEBOOK, (batch, GRID**2))
        self.rows: dict[nn.Linear, int] = {}

    def whole(self) -> None:
        """Forward, loss, backward, AdamW."""
        self.optimizer.zero_grad(set_to_none=True)
        self.peer.loss(self.model, self.text, self.image).backward()
        self.optimizer.step()

    def count_rows(self) -> None:
        """An update that notes how many rows each linear layer multiplies."""

        def note(linear: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            assert isinstance(linear, nn.Linear)
            self.rows[linear] = inputs[0].numel() // linear.in_features

        hooks = [linear.register_forward_pre_hook(note) for linear in linears_of(self.model)]
        self.whole()
        for hook in hooks:
            hook.remove()
        sides = {(rows, width) for m, rows in self.rows.items() for width in (m.in_features, m.out_features)}
        self.values = {side: torch.randn(side) for side in sorted(sides)}

    def linears_alone(self) -> None:
        """The matrix products and biases of `whole`, forward and backward, and AdamW on them."""
        self.optimizer.zero_grad(set_to_none=True)
        for linear, rows in self.rows.items():
            x = self.values[rows, linear.in_features].detach().requires_grad_()
            F.linear(x, linear.weight, linear.bias).backward(self.values[rows, linear.out_features])
        self.optimizer.step()


def step_row(peer: Peer, batch: int) -> dict[str, float]:
    """CPU seconds of an update and of its floor: of each the best of some rounds in which they take turns."""
    step = TrainingStep(peer, batch)
    step.count_rows()
    step.linears_alone()
    rounds = [(cpu_seconds(step.whole), cpu_seconds(step.linears_alone)) for _ in range(ROUNDS)]
    whole, bare = (min(column) for column in zip(*rounds, strict=True))
    return {"ours": whole, "theirs": bare, "ratio": whole / bare}


def memory_row(peer: Peer, batch: int) -> dict[str, float]:
    """The largest memory of the process over two updates, in GB."""
    step = TrainingStep(peer, batch)
    step.whole()
    step.whole()
    return {"ours": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9}


@dataclass
class Clock:
    """Called after each pass of the model: times a token from pass to pass, and the linear layers in between."""

    model: nn.Module
    candidates: int
    whole: list[float] = field(default_factory=list)
    bare: list[float] = field(default_factory=list)
    since: float = 0.0  # 0: the first pass has not ended; it reads the prefix and does not count

    def __call__(self, *_: object) -> None:
        if self.since:
            self.whole.append(time.process_time() - self.since)
        if len(self.whole) >= MOST_TOKENS or sum(self.whole) > BUDGET_SECONDS:
            raise Enough
        self.bare += [cpu_seconds(self.linears_alone) for _ in range(4)]
        self.since = time.process_time()

    def linears_alone(self) -> None:
        """The linear layers of a decode step: one row a candidate."""
        for linear in linears_of(self.model):
            F.linear(torch.ones(self.candidates, linear.in_features), linear.weight, linear.bias)


@torch.no_grad()
def sample_row(peer: Peer, way: str, candidates: int) -> dict[str, float]:
    """CPU seconds of a code of all candidates of one caption from row 16 on, and of the bare linears of a step."""
    torch.manual_seed(0)
    model = peer.build(False).eval()
    text = torch.randint(1, TEXT_VOCAB, (1, N_TEXT)).repeat(candidates, 1)
    image = torch.randint(CODEBOOK, (1, GRID**2)).repeat(candidates, 1)[:, :PREFIX]
    clock = Clock(model, candidates)
    model.register_forward_hook(clock)
    try:
        peer.ways[way](model, text, image)
    except Enough:
        pass
    else:
        raise RuntimeError(f"{way} ended after {len(clock.whole)} codes")
    whole, bare = (sum(times) / len(times) for times in (clock.whole, clock.bare))
    return {"ours": whole, "theirs": bare, "ratio": bare / whole, "tokens": len(clock.whole)}


def measure(peer: Peer) -> None:
    """Print one JSON line: `SCRIPT step|memory|WAY COUNT`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["step", "memory", *peer.ways])
    parser.add_argument("count", type=int, help="batch, or candidates of one caption")
    words = parser.parse_args()
    torch.set_num_threads(1)
    if words.what in peer.ways:
        row = sample_row(peer, words.what, words.count)
    else:
        row = {"step": step_row, "memory": memory_row}[words.what](peer, words.count)
    print(json.dumps(row | {"load": os.getloadavg()[0]}))
