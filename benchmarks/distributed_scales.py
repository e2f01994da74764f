"""Why every resblock has a gradient scale of its own: one deep small model trained with one scale, and with many.

    python -m benchmarks.distributed_scales train DATA OUT fp32
    python -m benchmarks.distributed_scales train DATA OUT fp16-global ROOM FP32
    python -m benchmarks.distributed_scales probe DATA OUT FP32

ROOM is how many bits below overflow the scales begin: a scale's rule brings it just under the overflow of what it
scales, in thousands of updates, so where that is is read off the float32 run FP32. More bits below are what a model
needs whose gradients spread that much wider, and leave as little of float16's range as it would have.
"""

import json
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from cluster.process import Place, joined_place
from cluster.weights import WEIGHTS
from data_pipeline.bpe import open_vocabulary
from data_pipeline.loader import LoaderConfig, TokenBatches, words_in
from pretrain import precision
from pretrain.config import OptimConfig, TrainConfig, TransformerConfig
from pretrain.engine import Engine
from pretrain.evaluate import HeldOut, evaluate
from pretrain.model import Sizes, Transformer, text_image_loss
from pretrain.train import open_tokens

MODEL = TransformerConfig(n_text=16, n_layers=16, n_heads=4, d_head=16)
STEPS, BATCH, LOOK_EVERY = 200, 32, 10
OPTIM = OptimConfig(lr=2e-3, warmup_steps=40, weight_decay=0.1, clip=1.0)
LARGEST = math.log2(torch.finfo(torch.float16).max)
ROOMS = (2, 4, 8, 12, 16, 18, 20, 22, 24, 26, 28, 30)
SETTLED = 2  # bits below overflow to begin at where a scale would be after thousands of updates
STRESS = 26  # and where one scale would be if gradients spread so much wider
FINE = 0.1  # relative error of a resblock's parameter gradient


def config_of(data: Path, kind: precision.Precision) -> TrainConfig:
    return TrainConfig(
        tokens=str(data / "tokens"), vocab=str(data / "vocab"), n_steps=STEPS, precision=kind, bpe_dropout=0.0,
        caption_dropout=0.0, model=MODEL, optim=OPTIM, data=LoaderConfig(batch=BATCH),
    )  # fmt: skip


@contextmanager
def watched(model: Transformer) -> Iterator[tuple[dict[str, list[Tensor]], dict[str, list[Tensor]]]]:
    """What each resblock's branch computes in float16 in the one backward pass inside: the gradients that enter it
    and leave it, in this order, as they are cast; and those of its matrices."""
    activations: dict[str, list[Tensor]] = {name: [] for name in model.resblocks()}
    matrices: dict[str, list[Tensor]] = {name: [] for name in model.resblocks()}

    def keep(gradients: list[Tensor]) -> Callable[[Tensor], None]:
        return lambda gradient: gradients.append(gradient.detach().clone())

    def at_ends(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, tensors: tuple[Tensor, ...], result: Tensor | None = None) -> None:
            tensor = tensors[0] if result is None else result
            if tensor.requires_grad:
                tensor.register_hook(keep(activations[name]))

        return hook

    handles = []
    for name, block in model.resblocks().items():
        ends = at_ends(name)
        handles += [block.inner.register_forward_pre_hook(ends), block.inner.register_forward_hook(ends)]
        handles += [p.register_hook(keep(matrices[name])) for p in block.inner.parameters() if p.dim() == 2]
    yield activations, matrices
    for handle in handles:
        handle.remove()


def limits_of(run: Path) -> list[float]:
    """log2 of the largest scale of each resblock with which nothing of the float32 run would have overflown."""
    return [LARGEST - largest for largest in json.loads((run / "largest.json").read_text()).values()]


def begin_at(engine: Engine, limits: list[float], room: float) -> None:
    """Put the scales `room` bits below their limits, and one for all below the least. The paper's bounds would be
    in the way of both: they go with its number of GPUs and its batch."""
    scales = engine._settlement.scales
    assert scales is not None
    precision.LOWEST, precision.HIGHEST = -100.0, 100.0
    if scales.tied:
        limits = [min(limits)] * len(limits)
    state = scales.state()
    scales.restore(state | {"log2": [limit - room for limit in limits]})


def train(
    place: Place, data: Path, out: Path, kind: precision.Precision, room: str = "", reference: str = ""
) -> dict[str, Any]:
    """STEPS updates; OUT gets metrics.jsonl, the weights, and in float32 the largest gradients of each resblock."""
    config = config_of(data, kind)
    vocabulary, _ = open_vocabulary(Path(config.vocab))
    shards = open_tokens(config, "train")
    sizes = Sizes(vocabulary.size, shards.manifest.counts["codebook"], shards.manifest.counts["grid"])
    engine = Engine(config, sizes, place)
    if room:
        begin_at(engine, limits_of(Path(reference)), float(room))
    out.mkdir(parents=True, exist_ok=True)
    batches = TokenBatches(shards, config.data, vocabulary, MODEL.n_text, 0.0, 0.0)
    largest = dict.fromkeys(engine.model.resblocks(), -math.inf)
    skipped = 0
    with (out / "metrics.jsonl").open("w") as file:
        for step in range(STEPS):
            if kind != "fp32" or step % LOOK_EVERY:
                update = engine.step(step, next(batches))
            else:
                with watched(engine.model) as (activations, matrices):
                    update = engine.step(step, next(batches))
                for name in largest:
                    most = max(tensor.abs().max().item() for tensor in activations[name] + matrices[name])
                    largest[name] = max(largest[name], math.log2(most) if most else -math.inf)
            skipped += not update.applied
            file.write(json.dumps({"step": step} | update.values) + "\n")
        last = evaluate(engine, HeldOut(open_tokens(config, "heldout"), vocabulary, MODEL.n_text))
        file.write(json.dumps({"step": STEPS - 1} | last) + "\n")
    engine.release(out)
    (out / "largest.json").write_text(json.dumps(largest))
    return last | {"skipped": skipped}


def gradients(model: Transformer, batch: Any, scales: Tensor | None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Of each resblock: its activations' gradients as cast, and its parameters' gradients, unscaled; both flat."""
    if scales is not None:
        model.scale_gradients(scales)
    model.zero_grad()
    with watched(model) as (seen, _):
        text, image = model(batch.text, batch.image)
        text_image_loss(text, image, batch.text, batch.image, 0.125, words_in(batch)).total.backward()
    activations = {name: torch.cat([tensor.flatten() for tensor in tensors]) for name, tensors in seen.items()}
    parameters = {}
    for number, (name, block) in enumerate(model.resblocks().items()):
        flat = torch.cat([p.grad.flatten() for p in block.parameters() if p.grad is not None])
        parameters[name] = flat if scales is None else flat / scales[number]
    return activations, parameters


def probe(place: Place, data: Path, out: Path, reference: str) -> dict[str, Any]:
    """The float32 run's last weights and one batch: of each resblock the norm of the gradient that enters it, and for
    each of ROOMS the share of its activation gradients that become 0, and the error of its parameter gradients."""
    config = config_of(data, "fp32")
    vocabulary, _ = open_vocabulary(Path(config.vocab))
    shards = open_tokens(config, "train")
    sizes = Sizes(vocabulary.size, shards.manifest.counts["codebook"], shards.manifest.counts["grid"])
    batch = next(TokenBatches(shards, config.data, vocabulary, MODEL.n_text, 0.0, 0.0))
    model = Transformer(MODEL, sizes)
    model.load_state_dict(load_file(Path(reference) / WEIGHTS))
    true, wanted = gradients(model, batch, None)
    norms = {name: tensor[: len(tensor) // 2].norm().item() for name, tensor in true.items()}
    limits = torch.tensor(limits_of(Path(reference)))
    found: dict[str, Any] = {"norms": norms, "one": {}, "own": {}}
    for kind, tops in (("one", limits.min().expand_as(limits)), ("own", limits)):
        for room in ROOMS:
            cast, got = gradients(model, batch, torch.exp2(tops - room))
            zeros = [((cast[name] == 0) & (true[name] != 0)).sum() / (true[name] != 0).sum() for name in true]
            errors = [(got[name] - wanted[name]).norm() / wanted[name].norm() for name in wanted]
            found[kind][room] = {"zeros": torch.stack(zeros).tolist(), "errors": torch.stack(errors).tolist()}
    out.mkdir(parents=True, exist_ok=True)
    (out / "probe.json").write_text(json.dumps(found))
    return {"resblocks": len(norms)}


def main() -> None:
    work: dict[str, Callable[..., dict[str, Any]]] = {"train": train, "probe": probe}
    torch.set_num_threads(1)
    with joined_place() as place:
        name, data, out, *words = sys.argv[1:]
        print(json.dumps(work[name](place, Path(data), Path(out), *words)), flush=True)


if __name__ == "__main__":
    main()
