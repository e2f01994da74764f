"""Time a training step and sampling of a small model against its linear layers alone; `kernels/bench.py` runs it.

The model has 12 layers of width 512, 256 text slots, 32 x 32 codes, 16,384 words and 8,192 codes, as a
peer of that size would be set up. One thread, process CPU time, in fp32. What is timed and its floor
take turns, so that both meet the machine in the same state; of each the best round counts.
"""

import argparse
import json
import os
import resource
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.linear import linear
from kernels.measure import best_of, cpu_seconds
from pretrain.config import TransformerConfig
from pretrain.draw import Taste, draw_rows
from pretrain.model import Linear, Sizes, Transformer
from pretrain.update import Update

CONFIG = TransformerConfig(n_text=256, n_layers=12, n_heads=8, d_head=64)
SIZES = Sizes(text_vocab=16_384, codebook=8_192, grid=32)
ROUNDS = 5
FLOORS_A_ROW = 4
MEMORY_BAR = 4.0  # GB that a step at batch 4 should fit


class TrainingStep:
    """One update of the model, and of its linear layers alone."""

    def __init__(self, batch: int) -> None:
        self.whole = Update(CONFIG, SIZES, batch, torch.device("cpu"), torch.float32)
        model, optimizer = self.whole.model, self.whole.optimizer
        self.optimizer = optimizer
        slots = {"text_head": CONFIG.n_text - 1, "image_head": SIZES.grid**2}
        named = [(name, module) for name, module in model.named_modules() if isinstance(module, Linear)]
        self.linears = [(module, batch * slots.get(name, model.layout.n_slots)) for name, module in named]
        sides = {(rows, width) for m, rows in self.linears for width in (m.in_features, m.out_features)}
        self.values = {side: torch.randn(side) for side in sorted(sides)}

    def linears_alone(self, door: Callable[..., Tensor] = F.linear) -> None:
        """The matrix products and biases of an update, forward and backward, and AdamW on them."""
        self.optimizer.zero_grad(set_to_none=True)
        for module, rows in self.linears:
            x = self.values[rows, module.in_features].detach().requires_grad_()
            door(x, module.weight, module.bias).backward(self.values[rows, module.out_features])
        self.optimizer.step()


def step_row(batch: int) -> dict[str, float | str]:
    """CPU seconds of an update; of its linear layers by torch's own nn.Linear, the floor; the note
    tells the ratio to the same by our doors."""
    step = TrainingStep(batch)
    ours, floor, own = best_of(ROUNDS, step.whole, step.linears_alone, lambda: step.linears_alone(linear))
    note = f"CPU s; theirs: bare nn.Linear; against bare kernels.linear {ours / own:.2f}"
    return {"ours": ours, "theirs": floor, "ratio": ours / floor, "note": note}


def memory_row(batch: int) -> dict[str, float | str]:
    """The largest memory of the process over two updates, in GB."""
    update = Update(CONFIG, SIZES, batch, torch.device("cpu"), torch.float32)
    update()
    update()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    note = f"GB, peak of the process at batch {batch}; theirs: the bar"
    return {"ours": peak, "theirs": MEMORY_BAR, "ratio": peak / MEMORY_BAR, "note": note}


@torch.no_grad()
def sample_row(candidates: int) -> dict[str, float | str]:
    """CPU seconds a slot of drawing all 1,024 codes of one caption's candidates, reading the caption included.

    The floor is the linear layers of a step alone by torch's own nn.Linear, timed after each row; the note
    tells the ratio to the same by our doors, which on some processors is lower.
    """
    torch.manual_seed(0)
    model = Transformer(CONFIG, SIZES).eval()
    nn.init.normal_(model.image_head.weight, std=0.05)
    text = torch.randint(SIZES.text_vocab, (1, CONFIG.n_text - 1))
    keys = torch.randint(2**62, (candidates, SIZES.grid**2))
    own = [m for name, m in model.named_modules() if isinstance(m, Linear) and name != "text_head"]
    plain = [nn.Linear(m.in_features, m.out_features) for m in own]
    model.pack()
    inputs = {width: torch.randn(candidates, width) for width in {m.in_features for m in own}}
    rows = draw_rows(model, text, keys, Taste())
    ours, floor, own_floor = 0.0, 0.0, 0.0
    for _ in range(SIZES.grid):
        ours += cpu_seconds(lambda: next(rows))
        for _ in range(FLOORS_A_ROW):
            floor += cpu_seconds(lambda: [m(inputs[m.in_features]) for m in plain])
            own_floor += cpu_seconds(lambda: [Linear.forward(m, inputs[m.in_features]) for m in own])
    ours, floors = ours / SIZES.grid**2, SIZES.grid * FLOORS_A_ROW
    floor, own_floor = floor / floors, own_floor / floors
    note = f"CPU s a slot; theirs: bare nn.Linear; bare kernels.linear {own_floor / ours:.2f}"
    return {"ours": ours, "theirs": floor, "ratio": floor / ours, "note": note}


def main() -> None:
    """Print one JSON line: `python -m pretrain.bench step|memory|sample COUNT`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["step", "memory", "sample"])
    parser.add_argument("count", type=int, help="batch, or candidates of one caption")
    words = parser.parse_args()
    torch.set_num_threads(1)
    measure = {"step": step_row, "memory": memory_row, "sample": sample_row}[words.what]
    print(json.dumps(measure(words.count) | {"load": os.getloadavg()[0]}))


if __name__ == "__main__":
    main()
