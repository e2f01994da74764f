"""The transformer under DeepSpeed: forward, backward, and an update of all ranks together.

How DeepSpeed is started, how smalti reaches its shards, and what it does to them before an update is in
engine_start.py, engine_shards.py and engine_update.py; no other files know DeepSpeed.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from cluster.power_sgd import PowerSGD
from cluster.process import Place, gathered, sum_over_ranks, wait_for_all
from cluster.snapshot import SnapshotWriter
from cluster.topology import Topology, take_seat
from cluster.weights import save_weights
from data_pipeline.loader import TokenBatch, words_in
from pretrain.average import Average
from pretrain.bad_numbers import bad_weights, told, watched
from pretrain.config import TrainConfig
from pretrain.engine_files import EngineFiles, average_path
from pretrain.engine_replicas import errors_path, power_sgd, restore_errors
from pretrain.engine_restore import restore, restore_average, save_through
from pretrain.engine_shards import Shards
from pretrain.engine_start import start
from pretrain.engine_update import LOSS, Settlement, Update
from pretrain.model import Losses, Sizes, text_image_loss
from pretrain.schedule import Schedule

TAGS = (LOSS, "train/text_loss", "train/image_loss")


class Engine:
    """A sharded model with its optimiser; every rank calls every method in step."""

    def __init__(self, config: TrainConfig, sizes: Sizes, place: Place) -> None:
        """SettingError if the batch or the processes do not come out even."""
        self.config, self.place = config, place
        self.topology = Topology(place.world_size, config.zero_shards or place.world_size)
        self._seat = take_seat(self.topology, place.rank)
        started = start(config, sizes, place, self._seat)
        self.model, self._engine, self._whole = started.model, started.engine, started.whole
        self._optimizer = started.optimizer
        self._names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        self._shards = Shards(self._engine.optimizer, self._names)
        self._replicas: PowerSGD | None = None
        if self.topology.n_replicas > 1:
            self._replicas = power_sgd(config.power_sgd, self._seat, place.device, config.seed)
        resblocks = list(self.model.resblocks())
        self._settlement = Settlement(config, place, self._shards, resblocks, self._replicas)
        if self._settlement.scales:
            self.model.scale_gradients(self._settlement.scales.values)
        self._schedule = Schedule(config.optim, config.n_steps)
        self._average: Average | None = None
        if config.optim.average_every:
            self._average = Average(config.optim.average_every, config.optim.average_decay)
        self._writer: SnapshotWriter | None = None
        self.passed_over: set[int] = set()  # updates that a rollback came back from

    def step(self, number: int, batch: TokenBatch) -> Update:
        """One update, or what stood against it."""
        if number in self.passed_over:
            return Update({}, sum_over_ranks(self.place, batch.seen.sums), False, bad=())
        rate = self._schedule.rate(number)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        losses = self._backward(batch)
        update = self._settlement.settle(number, losses, batch.seen.sums)
        if self._average:
            self._average.before_step()
        self._engine.step()
        self._settlement.close(update)
        if self._average:
            self._average.update(number, self._shards.masters)
        self._schedule.learn(number, update.values[LOSS])
        return replace(update, values=update.values | {"train/lr": rate})

    def losses(self, batch: TokenBatch, n_words: float) -> Losses:
        """The two losses of this rank's batch, the text's divided by n_words, with their graph if gradients are on."""
        text, image = batch.text.to(self.place.device), batch.image.to(self.place.device)
        text_logits, image_logits = self._engine(text, image)
        weight = self.config.text_weight
        return text_image_loss(text_logits, image_logits, text, image, weight, max(n_words, 1.0))

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """No gradients inside, and the averaged weights, if there are any."""
        self._engine.eval()
        with torch.no_grad(), self._averaged():
            yield

    def blame(self, batch: TokenBatch, update: Update) -> str:
        """Where a bad update's Inf or NaN came from, after a second look at its batch."""
        assert update.bad is not None
        self._engine.eval()
        modules: list[str] = []
        keys: list[str] = []
        for part in parts_of(batch, self.config.accumulate):
            with torch.no_grad(), watched(self.model) as found:
                self.losses(part, float(words_in(part)))
            if found and not modules:
                modules, keys = found, part.keys
        said = told(self.place.rank, modules, bad_weights(self.model), update.bad, keys)
        return "; ".join(text for text in gathered(self.place, said) if text)

    def save_through(self, writer: SnapshotWriter) -> None:
        """Let the writer write what `save` gives it."""
        self._writer = writer
        save_through(self._engine, writer)

    def save(self, folder: Path, tag: str) -> None:
        """DeepSpeed's own files into folder / tag, and ours beside them."""
        assert self._writer is not None
        self._engine.save_checkpoint(str(folder), tag=tag, client_state={"smalti": self._state()}, save_latest=False)
        files, shard = folder / tag, self._seat.shard_index
        if self._average and (averaged := self._average.state()):
            self._writer.save({"groups": averaged}, str(average_path(files, shard)))
        if self._replicas:
            self._writer.save(self._replicas.state_dict(), str(errors_path(files, shard)))

    def load(self, folder: Path, tag: str) -> None:
        """A checkpoint of any ZeRO stage and any number of ranks. FolderError if it is of another model."""
        files = EngineFiles(folder / tag)
        restore(self._engine, self._names, files)
        state = files.caller["smalti"]
        self._settlement.restore(state["settlement"])
        self._schedule.restore(state["schedule"])
        self.passed_over |= set(state["passed_over"])
        if self._average and files.has_average():
            self._average.restore(restore_average(self._engine, self._names, files))
        if self._replicas:
            restore_errors(self._replicas, folder / tag, files.n_ranks)

    def release(self, folder: Path) -> None:
        """The whole weights, or the average of them if the run keeps one, as the release of a run folder.

        Stored as fp32, with the values the model computes with: in a bf16 run those of its bf16 copy.
        """
        with self._averaged(), self._whole(list(self.model.parameters()), enabled=self.config.zero_stage == 3):
            if self.place.is_main:
                save_weights(folder, {name: p.float() for name, p in self.model.named_parameters()})
        wait_for_all(self.place)

    def _state(self) -> dict[str, Any]:
        passed_over = sorted(self.passed_over)
        return {
            "settlement": self._settlement.state(), "schedule": self._schedule.state(), "passed_over": passed_over,
        }  # fmt: skip

    def _backward(self, batch: TokenBatch) -> dict[str, float]:
        """The gradients of this rank's batch, part by part; its losses."""
        self._engine.train()
        count = self.config.accumulate
        words = sum_over_ranks(self.place, {"words": words_in(batch)})["words"] / (self.place.world_size * count)
        sums = dict.fromkeys(TAGS, 0.0)
        for number, part in enumerate(parts_of(batch, count)):
            if number:
                self._engine.step()  # DeepSpeed counts parts here, and updates behind the last one
            losses = self.losses(part, words)
            self._engine.backward(losses.total)
            values = torch.stack([losses.total, losses.text, losses.image]).detach().tolist()
            sums = {tag: total + value / count for (tag, total), value in zip(sums.items(), values, strict=True)}
        return sums

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        if self._average is None:
            yield
            return
        with self._average.averaged(self._shards.masters):
            self._shards.publish()
            yield
        self._shards.publish()


def parts_of(batch: TokenBatch, count: int) -> Iterator[TokenBatch]:
    """A batch cut into `count` equal ones."""
    size = len(batch.keys) // count
    for first in range(0, size * count, size):
        part = slice(first, first + size)
        yield TokenBatch(batch.text[part], batch.image[part], batch.keys[part])
