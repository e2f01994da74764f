"""A DeepSpeed job for test_engine_files.py: `torchrun --nproc-per-node 4 engine_job.py FOLDER`.

Four ranks, as one shard group, as two with replicas, and each for itself; every layout saves a small model, and every
layout restores what every other one saved. What each case gave is told in FOLDER/cases.json by rank 0.
"""

import json
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import deepspeed.ops
import torch
import torch.distributed as dist
import torch.nn.functional as F
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from torch import Tensor, nn

from cluster.checkpoint import Checkpoints
from cluster.process import Place, joined_place
from pretrain.engine_files import AVERAGE, EngineFiles, average_path
from pretrain.engine_restore import restore, restore_average, save_through

STAGES, SHARDS = (1, 2, 3), (1, 2, 4)
WIDTH = 32
# Groups in several flat tensors, and only the smallest parameters kept whole: both as in a large model.
SMALL_PIECES = {"sub_group_size": 300, "stage3_param_persistence_threshold": 20}
BF16_SUMS = 2**-8  # relative: one rounding to bf16; the same products are summed in another order
Case = dict[str, Any]


class Coded(torch.optim.Optimizer):
    """Momentum in int16 and squares in bf16: states that are not float32, as smalti's own optimizer has them."""

    def __init__(self, groups: Any, lr: float = 1e-2) -> None:
        super().__init__(groups, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["step"] = torch.zeros(())
                    state["exp_avg"] = torch.zeros(p.shape, dtype=torch.int16)
                    state["exp_avg_sq"] = torch.zeros(p.shape, dtype=torch.bfloat16)
                state["step"] += 1
                state["exp_avg"].copy_((0.5 * state["exp_avg"] + 1000 * p.grad.clamp(-10, 10)).round())
                state["exp_avg_sq"].lerp_(p.grad.square().bfloat16(), 0.1)
                p -= group["lr"] * state["exp_avg"].float() / 1000


class Small(nn.Module):
    """Two layers, an embedding, sizes that no number of ranks divides, and a parameter of a single element."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Embedding(13, WIDTH)
        self.layers = nn.ModuleList(nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)) for _ in range(2))
        self.head = nn.Linear(WIDTH, 7)
        self.scale = nn.Parameter(torch.ones(1))
        self.register_buffer("seen", torch.zeros(1, dtype=torch.int64))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.token(ids)
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x) * self.scale

    def groups(self) -> list[dict[str, Any]]:
        """One for each layer, by dimensions; and one for the rest."""
        layers = [list(layer.parameters()) for layer in self.layers]
        inside = {id(p) for layer in layers for p in layer}
        split = [[p for p in layer if (p.dim() > 1) == matrix] for layer in layers for matrix in (True, False)]
        return [{"params": group} for group in [*split, [p for p in self.parameters() if id(p) not in inside]]]


class Groups:
    """What DeepSpeed calls an mpu: data-parallel groups of `size` neighbours, nothing model-parallel."""

    def __init__(self, place: Place, groups: dict[int, Any]) -> None:
        size = max(groups)
        self.shards, self.alone, self.size, self.rank = groups[size], groups[1], size, place.rank % size

    def get_data_parallel_group(self) -> Any:
        return self.shards

    def get_data_parallel_rank(self) -> int:
        return self.rank

    def get_data_parallel_world_size(self) -> int:
        return self.size

    def get_model_parallel_group(self) -> Any:
        return self.alone

    def get_model_parallel_rank(self) -> int:
        return 0

    def get_model_parallel_world_size(self) -> int:
        return 1


def start(place: Place, groups: dict[int, Any], stage: int, shards: int, precision: str, optimizer: str) -> Any:
    """A DeepSpeed engine; the seed of its weights is the number of its ranks, so that a restore has work to do."""
    torch.manual_seed(10 * stage + shards)
    model = Small()
    made: torch.optim.Optimizer = Coded(model.groups())
    if optimizer == "adamw":
        made = torch.optim.AdamW(model.groups(), lr=1e-2, fused=True)
    settings = {
        "train_micro_batch_size_per_gpu": 4 // shards,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": stage} | (SMALL_PIECES if stage == 3 else {}),
        "bf16": {"enabled": precision == "bf16"},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31,
    }
    mpu = Groups(place, {1: groups[1], shards: groups[shards]})
    return deepspeed.initialize(model=model, optimizer=made, config=settings, mpu=mpu)[0]


def train(engine: Any, place: Place, shards: int, steps: range) -> list[float]:
    """Losses of the shard group; the global batch of a step is the same in every layout."""
    losses = []
    for step in steps:
        ids = torch.randint(13, (4, 5), generator=torch.Generator().manual_seed(step))
        mine = ids.chunk(shards)[place.rank % shards]
        loss = F.cross_entropy(engine(mine).float().flatten(0, 1), mine.flatten() % 7)
        engine.backward(loss)
        engine.step()
        engine.module.seen += 1
        losses.append(loss.detach())
    mean = torch.stack(losses)
    dist.all_reduce(mean)
    return (mean / place.world_size).tolist()


def names_of(engine: Any) -> dict[int, str]:
    return {id(parameter): name for name, parameter in engine.module.named_parameters()}


def whole_state(engine: Any) -> dict[str, Tensor]:
    """Everything that a restore must bring back, gathered by DeepSpeed: weights, moments, what the model computes."""
    if hasattr(engine.optimizer, "_hp_optimizer_states_linked"):  # 0.19.8 links after its first group, too early
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    state = {"buffer seen": engine.module.seen.clone()}
    for name, parameter in engine.module.named_parameters():
        state[f"{name} weight"] = safe_get_full_fp32_param(parameter).clone()
        for key in ("exp_avg", "exp_avg_sq"):
            state[f"{name} {key}"] = safe_get_full_optimizer_state(parameter, key).float().clone()
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            state[f"{name} in the model"] = parameter.detach().clone()
    return state


def steps_of(engine: Any) -> list[float]:
    return [float(state["step"]) for state in engine.optimizer.optimizer.state.values()]


def differences(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> list[str]:
    return [name for name in wanted if not torch.equal(found[name].float().flatten(), wanted[name].float().flatten())]


class Job:
    """One run of this file."""

    def __init__(self, folder: Path, place: Place) -> None:
        self.folder, self.place = folder, place
        self.groups = {
            size: [dist.new_group(list(range(first, first + size))) for first in range(0, place.world_size, size)][
                place.rank // size
            ]
            for size in SHARDS
            if size <= place.world_size
        }
        self.cases: list[Case] = []

    def layouts(self) -> Iterator[tuple[int, int]]:
        return ((stage, shards) for stage in STAGES for shards in self.groups)

    def start(self, stage: int, shards: int, precision: str = "bf16", optimizer: str = "coded") -> Any:
        return start(self.place, self.groups, stage, shards, precision, optimizer)

    def save(self, engine: Any, name: str, shards: int, by_deepspeed: bool = False) -> Path:
        """Through the writer of Checkpoints, in the background; or by DeepSpeed's own."""
        folder = self.folder / name
        checkpoints = Checkpoints(folder, self.place, 1, writers=range(shards))
        if not by_deepspeed:
            save_through(engine, checkpoints.writer)

        def write(into: Path, tag: str) -> None:
            target = into if not by_deepspeed or self.place.rank < shards else into / "replica"
            engine.save_checkpoint(str(target), tag=tag, client_state={"note": name}, save_latest=False)
            if not by_deepspeed:
                rank = self.place.rank % shards
                averages = [-master.detach() for master in masters_of(engine)]
                checkpoints.writer.save({"groups": averages}, str(average_path(into / tag, rank)))

        began = checkpoints.save(3, {}, write, background=True)
        with torch.no_grad():
            for master in masters_of(engine):
                master.mul_(1)  # the writer holds a copy of its own
        if not (began and checkpoints.wait() and checkpoints.saved_step == 3):
            raise RuntimeError(f"{folder} was not saved")
        return folder / "global_step3"

    def tell(self, kind: str, name: str, wrong: list[str]) -> None:
        self.cases.append({"kind": kind, "name": name, "wrong": wrong})

    def check_files(self, name: str, saved: Path, want: dict[str, Tensor], shards: int) -> None:
        """What EngineFiles and DeepSpeed's own tool read from a folder."""
        files = EngineFiles(saved)
        found = {"buffer seen": files.buffers["seen"]}
        for parameter in files.names:
            for key in ("weight", *files.keys(parameter)):
                found[f"{parameter} {key}"] = files.tensor(parameter, key)
        self.tell("read", name, differences(found, {key: want[key] for key in want if "in the model" not in key}))
        wrong = [n for n in files.names if tuple(files.tensor(n).shape) != files.shape(n)]
        wrong += [n for n in files.names if files.scalars(n) != {"step": torch.tensor(3.0)}]
        wrong += [] if files.n_ranks == shards and files.caller.get("note") == name else ["client state"]
        types = {files.dtype(n, key) for n in files.names for key in files.keys(n)}
        wrong += [] if types == {torch.int16, torch.bfloat16} else [str(types)]
        part = files.names[0]
        wrong += [] if torch.equal(files.read(part, start=5, stop=99), files.read(part)[5:99]) else ["a part"]
        self.tell("details", name, wrong)
        if files.has_average():
            averages = {f"{n} weight": -files.tensor(n, AVERAGE) for n in files.names}
            self.tell("average", name, differences(averages, {key: want[key] for key in averages}))
        theirs = get_fp32_state_dict_from_zero_checkpoint(str(saved.parent), tag=saved.name)
        as_ours = {f"{n} weight": tensor for n, tensor in theirs.items() if n != "seen"}
        self.tell("zero_to_fp32", name, differences(as_ours, {key: want[key] for key in as_ours}))

    def matrix(self) -> None:
        """Every layout saves; every layout restores every save."""
        saves = {}
        for stage, shards in self.layouts():
            engine = self.start(stage, shards)
            train(engine, self.place, shards, range(3))
            name, want = f"stage {stage} on {shards}", whole_state(engine)
            saved = self.save(engine, name, shards)
            saves[name] = saved, want, train(engine, self.place, shards, range(3, 5))
            if self.place.is_main:
                self.check_files(name, saved, want, shards)
            dist.barrier()
        for stage, shards in self.layouts():
            for name, (saved, want, losses) in saves.items():
                engine = self.start(stage, shards)
                restore(engine, names_of(engine), EngineFiles(saved))
                case = f"{name} -> stage {stage} on {shards}"
                wrong = differences(whole_state(engine), want)
                averages = restore_average(engine, names_of(engine), EngineFiles(saved))
                pairs = zip(averages, masters_of(engine), strict=True)
                wrong += [] if all(torch.equal(average, -master) for average, master in pairs) else ["average"]
                wrong += [] if set(steps_of(engine)) == {3.0} and engine.global_steps == 3 else ["step counts"]
                self.tell("restore", case, wrong)
                now = train(engine, self.place, shards, range(3, 5))
                gap = max(abs(a - b) / b for a, b in zip(now, losses, strict=True))
                self.tell("goes on", case, [f"{gap:.1e}"] if gap > BF16_SUMS else [])

    def skips(self, stage: int) -> None:
        """A group whose updates were all left out so far has no state, and a step count of its own later."""
        name = f"stage {stage}, a group without an update"
        engine, fresh = (self.start(stage, self.place.world_size, "bf16", "adamw") for _ in range(2))
        update = engine.optimizer._optimizer_step
        engine.optimizer._optimizer_step = lambda group: update(group) if group else None
        train(engine, self.place, self.place.world_size, range(3))
        engine.optimizer._optimizer_step = update
        saved = self.save(engine, name, self.place.world_size)
        restore(fresh, names_of(fresh), EngineFiles(saved))
        here, there = (train(one, self.place, self.place.world_size, range(3, 6)) for one in (engine, fresh))
        wrong = [] if here == there and sorted(set(steps_of(fresh))) == [3.0, 6.0] else ["losses or steps"]
        self.tell("bit for bit", name, wrong + differences(whole_state(fresh), whole_state(engine)))

    def goes_on(self, stage: int, precision: str, by_deepspeed: bool) -> None:
        """The run that was saved and the restored one take the same next steps, to the last bit."""
        shards = self.place.world_size
        name = f"stage {stage} in {precision}, {'DeepSpeed' if by_deepspeed else 'smalti'} restores"
        engine = self.start(stage, shards, precision, "adamw")
        train(engine, self.place, shards, range(3))
        saved = self.save(engine, name, shards, by_deepspeed)
        losses = train(engine, self.place, shards, range(3, 6))
        want = whole_state(engine)
        fresh = self.start(stage, shards, precision, "adamw")
        if by_deepspeed:
            fresh.load_checkpoint(str(saved.parent), tag=saved.name)
            fresh.module.seen.copy_(torch.tensor([3]))
        else:
            restore(fresh, names_of(fresh), EngineFiles(saved))
        wrong = [] if train(fresh, self.place, shards, range(3, 6)) == losses else ["losses"]
        self.tell("bit for bit", name, wrong + differences(whole_state(fresh), want))


def masters_of(engine: Any) -> list[Tensor]:
    flat = getattr(engine.optimizer, "fp32_partitioned_groups_flat", None)
    return flat if flat is not None else engine.optimizer.single_partition_of_fp32_groups


def main(folder: Path) -> None:
    os.environ["DS_ACCELERATOR"] = "cpu"
    torch.set_num_threads(1)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    with joined_place(timeout_minutes=3.0) as place:
        deepspeed.init_distributed(dist_backend=None, auto_mpi_discovery=False, verbose=False)
        job = Job(folder, place)
        job.matrix()
        for stage in STAGES:
            for precision in ("fp32", "bf16"):
                job.goes_on(stage, precision, by_deepspeed=False)
            job.goes_on(stage, "bf16", by_deepspeed=True)
            job.skips(stage)
        if place.is_main:
            (folder / "cases.json").write_text(json.dumps(job.cases))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
