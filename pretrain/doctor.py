"""Look before a launch whether a run can go: the ranks, their machines, links and clocks, its data and its disk.

    smalti doctor emoji                                          this machine alone
    smalti launch local processes=4 doctor dalle-12b-tiny        as the run will be started, for instance so
    torchrun --nproc-per-node 4 -m pretrain.doctor dalle-12b-tiny    or so

Takes the words of `smalti train`, and says a line for each check: `ok`, `fix` with what to do, or `skip` with why.
Exit code 1 if anything must be mended. Leaves nothing behind (but what a cache of remote data fetches); needs no more
than a minute or two. Every rank that cannot join the others says so itself; all else is said by rank 0.
"""

import hashlib
import json
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from cluster.checkpoint import about_of, found_in
from cluster.checks import (
    Facts,
    Finding,
    facts_here,
    free_bytes,
    gigabytes,
    host_name,
    judge_accelerators,
    judge_locks,
    judge_memory,
    judge_open_files,
    judge_shared_memory,
    judge_versions,
)
from cluster.checks_together import bandwidths, clocks, shared_folder, why_apart
from cluster.command import run_command
from cluster.manifest import FolderError, Manifest, file_digest, refuse_difference, refuse_other_origin
from cluster.process import (
    Launched,
    Place,
    computes_bf16,
    environment_with,
    gathered,
    joined_place,
    read_launch,
    share_cores,
)
from cluster.run import Run
from cluster.settings import SettingError, UserError, require_at_least_one, section, setting, to_toml
from data_pipeline.bpe import open_vocabulary
from data_pipeline.folders import Shards, joined, open_folders
from data_pipeline.open_files import MOST_OPEN
from pretrain.config import TrainConfig
from pretrain.plan import CommandAboutARun
from pretrain.plan_machines import GPUS, kind_of
from pretrain.plan_memory import Memory
from pretrain.plan_report import checkpoints_kept
from pretrain.plan_shape import blueprint, sizes_of
from pretrain.plan_time import LINK_REACHED

PACKAGES = ("kernels", "cluster", "data_pipeline", "dvae", "pretrain")
SOCKETS = 4  # groups in which a rank may have a connection to each other rank
LIBRARIES = 256  # files that Python, torch and DeepSpeed have open
MEGABYTES = {"cuda": 256, "cpu": 16}  # measured with, if nothing is said: enough for the rate of the link to show


@dataclass(frozen=True)
class DoctorConfig:
    """A run that is to be launched, and how hard it is looked at."""

    timeout_seconds: float = setting(60.0, "how long ranks wait for each other, unless the launcher says")
    megabytes: int = setting(0, "what bandwidth is measured with; 0: 256 on GPUs, 16 on CPUs")
    intra_gb_s: float = setting(0.0, "GB/s from a rank to the others of its node; 0: what the plan has for its GPU")
    inter_gb_s: float = setting(0.0, "GB/s from a node to the others, all its links together; 0: the same")
    deep: int = setting(0, "token shards, here and there in the set, that are read and held against their digests")
    json: bool = setting(False, "a JSON object a line")
    train: TrainConfig = section(TrainConfig)

    def __post_init__(self) -> None:
        for name in ("megabytes", "intra_gb_s", "inter_gb_s", "deep"):
            if getattr(self, name) < 0:
                raise SettingError(f"{name}={getattr(self, name)} must be at least 0")
        require_at_least_one(self, ("timeout_seconds",))


@dataclass(frozen=True)
class Data:
    """What a host sees of the run's data; problem: what is wrong with it, if anything."""

    made_from: dict[str, str]
    told: str = ""
    problem: str = ""


def doctor(config: DoctorConfig) -> None:
    """Look, and say what is found. UserError on rank 0, or a rank that stands apart, if something must be mended."""
    launched = read_launch(environment_with({}))
    bad, is_in, begun = 0, False, time.monotonic()
    try:
        with joined_place(config.timeout_seconds / 60) as place:
            is_in = True
            share_cores(place)
            for finding in examine(config, place, time.monotonic() - begun, launched):
                bad += finding.state == "fix" and place.is_main
                if place.is_main:
                    say(finding, config.json)
    except (UserError, RuntimeError) as error:
        if isinstance(error, SettingError):
            raise
        said = str(error).strip().splitlines()[0]
        if alone := _cut_off(launched, is_in, said, time.monotonic() - begun):
            say(alone, config.json)
        bad += 1
    if bad:
        raise UserError(f"{bad} of what was looked at must be mended before the run" if is_in else "it cannot start so")


def say(finding: Finding, as_json: bool) -> None:
    print(json.dumps(asdict(finding)) if as_json else finding.line(), flush=True)


def _cut_off(launched: Launched, is_in: bool, said: str, seconds: float) -> Finding | None:
    """What a rank says that could not join the others, or lost them."""
    where = f"rank {launched.rank} on {host_name()}"
    if is_in:
        said = re.sub(r"^\[[^]]*\] *", "", said).partition(". ")[0]  # gloo adds its source and advice
        return Finding("ranks", "fix", f"{where} lost the others ({said})", "see what ended or hangs on other hosts")
    if said.startswith("local rank"):
        return Finding("accelerators", "fix", f"{where}: {said}", "start as many processes on a host as it has GPUs")
    return why_apart(launched, host_name(), seconds, said)


def examine(config: DoctorConfig, place: Place, seconds: float, launched: Launched) -> Iterator[Finding]:
    """All checks, one after the other; every rank must take all of them in step, and what rank 0 gets counts.

    seconds: how long the ranks took to meet.
    """
    run = resolved(config.train, place)
    facts = gathered(place, facts_here(place, {"code": code_digest(), "settings": text_digest(to_toml(config))}))
    hosts = [one.host for one in facts]
    yield _met(place, hosts, seconds, launched)
    yield judge_versions(facts)
    if len({one.versions["settings"] for one in facts}) > 1:
        yield Finding("all else", "skip", "ranks with different settings would wait for each other for ever")
        return
    memory, finding = planned(run, place.world_size)
    yield finding
    yield from machines(facts, memory, place)
    first = hosts.index(hosts[place.rank]) == place.rank  # one a host looks at the data
    data = gathered(place, data_here(run) if first else None)
    yield judge_data(data, hosts)
    if config.deep:
        yield deep_look(config.deep, run, place, hosts)
    seen = data[0]
    yield run_folder(run, place, seen) if seen and not seen.problem else Finding("run", "skip", "its data is not there")
    yield shared_folder(place, Path(run.out), hosts)
    yield disk_room(run, memory)
    yield clocks(place, hosts)
    if memory is None:
        yield Finding("bandwidth", "skip", "who sends to whom is not known without a plan")
        return
    n_bytes = 10**6 * (config.megabytes or MEGABYTES[place.device.type])
    yield from bandwidths(place, memory.plan.topology, hosts, assumed_rates(config, facts), n_bytes)


def resolved(run: TrainConfig, place: Place) -> TrainConfig:
    """With the precision that `smalti train` would take. Collective."""
    has_bf16 = computes_bf16(place)
    return replace(run, precision="bf16" if has_bf16 else "fp32") if run.precision == "auto" else run


def _met(place: Place, hosts: Sequence[str], seconds: float, launched: Launched) -> Finding:
    if place.world_size == 1:
        told = "one process alone; start it as the run will be started to see the others"
        return Finding("rendezvous", "skip", told)
    where = f"{launched.address} port {launched.port}"
    n_hosts = len(set(hosts))
    told = f"{place.world_size} ranks on {n_hosts} host{'s' * (n_hosts > 1)} met at {where} in {seconds:.1f} s"
    return Finding("rendezvous", "ok", told)


def code_digest() -> str:
    """Of the program's own files, so that a host with another checkout is seen."""
    root = Path(__file__).parent.parent
    digest = hashlib.sha256()
    for path in sorted(path for package in PACKAGES for path in (root / package).rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:8]


def text_digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def planned(run: TrainConfig, world_size: int) -> tuple[Memory | None, Finding]:
    """What the run would hold; None if that is not known, or the run cannot be on so many ranks."""
    try:
        sizes, from_data = sizes_of(run, whole=False)
        memory = Memory(blueprint(run, sizes, world_size))
        topology, samples, total = memory.plan.topology, memory.plan.samples, gigabytes(memory.total)
    except FolderError:
        return None, Finding("plan", "skip", "the sizes of the data are not known")
    except SettingError as error:
        return None, Finding("plan", "fix", str(error), "start as many processes as the settings want, or change these")
    told = f"{topology.n_replicas} groups of {topology.shard_size} ranks, {samples} samples at once on each"
    source = "" if from_data else " (sizes are the paper's: there is no data yet)"
    return memory, Finding("plan", "ok", f"{told}, {total} GB a rank{source}")


def machines(facts: Sequence[Facts], memory: Memory | None, place: Place) -> Iterator[Finding]:
    """What each rank found about its own. Without GPUs all that the plan counts is in the host's memory."""
    on_device = memory.total if memory else None
    on_host = sum(memory.host.values()) if memory else None
    if place.device.type == "cpu" and on_device is not None and on_host is not None:
        on_host += on_device
    yield judge_accelerators(facts, on_device)
    yield judge_memory(facts, on_host)
    yield judge_open_files(facts, LIBRARIES + MOST_OPEN + SOCKETS * len(facts))
    yield judge_shared_memory(facts)
    yield judge_locks(facts)


def data_here(run: TrainConfig) -> Data:
    """What this host sees of the folders, every file in its size; as `smalti train` opens them."""
    try:
        vocabulary, vocab = open_vocabulary(Path(run.vocab))
        folders = open_folders(run.tokens, "tokens", run.cache)
        about: Manifest = joined([folder.manifest for folder in folders])
        refuse_other_origin(Path(run.tokens), about, "vocab", Path(run.vocab), vocab)
        shards, heldout = (Shards(folders, "tokens", split) for split in ("train", "heldout"))
    except OSError as error:
        return Data({}, problem=f"{error.strerror}: {error.filename}")
    except UserError as error:
        return Data({}, problem=str(error))
    made_from = {"tokens": about.fingerprint, "dvae": about.made_from["dvae"], "vocab": vocab}
    told = f"{len(shards):,} samples in {len(shards.shards)} shards, {len(heldout):,} held out"
    return Data(made_from, f"{told} ({about.fingerprint[:12]}), made with this vocabulary of {vocabulary.size:,}")


def judge_data(data: Sequence[Data | None], hosts: Sequence[str]) -> Finding:
    """None: another rank of its host looked."""
    looked = [(one, host) for one, host in zip(data, hosts, strict=True) if one]
    usual = looked[0][0]
    for one, host in looked:
        if one.problem:
            value, _, advice = one.problem.partition("; ")
            where = "" if len(looked) == 1 else f"{host}: "
            return Finding("data", "fix", where + value, advice or "put back a copy, or make the folder again")
        if one.made_from != usual.made_from:
            value = f"{host} sees other data at the same place than {hosts[0]}"
            return Finding("data", "fix", value, "all hosts must see the same folders, or equal copies of them")
    return Finding("data", "ok", usual.told + (f", alike on {len(looked)} hosts" if len(looked) > 1 else ""))


def deep_look(count: int, run: TrainConfig, place: Place, hosts: Sequence[str]) -> Finding:
    """Hash some shards, each rank others; a round of them at a time, so that no rank waits long for another."""
    try:
        folders = open_folders(run.tokens, "tokens", run.cache, whole=False)
    except UserError:
        folders = []
    here = [one for one in folders if hasattr(one, "path")]
    found = [
        (one.path / name, record["sha256"])
        for one in here for name, record in sorted(one.manifest.files.items()) if name.endswith(".tar")
    ]  # fmt: skip
    count = min(count, len(found))
    if min(gathered(place, count)) < count or not count:
        return Finding("digests", "skip", "there are no shards on all hosts' own file systems to be read")
    chosen = [found[number * len(found) // count] for number in range(count)]
    for first in range(0, count, place.world_size):
        mine = chosen[first + place.rank : first + place.rank + 1]
        wrong = [text for path, sha256 in mine if (text := _differs(path, sha256))]
        for rank, texts in enumerate(gathered(place, wrong)):
            if texts:
                value = f"{texts[0]}, read by rank {rank} on {hosts[rank]}"
                return Finding("digests", "fix", value, "put back a copy of the file, or make the folder again")
    return Finding("digests", "ok", f"{count} of {len(found)} shards are as their manifest says, to the last byte")


def _differs(path: Path, sha256: str) -> str:
    try:
        return "" if file_digest(path) == sha256 else f"{path} holds other bytes than its manifest says"
    except OSError as error:
        return f"{path}: {error.strerror}"


def run_folder(run: TrainConfig, place: Place, data: Data) -> Finding:
    """Is there a run already, and would this one go on from it? Rank 0's answer counts, so the others do not look."""
    if not place.is_main:
        return Finding("run", "skip", "")
    try:
        begun = Run(run, "transformer", ("tokens", "vocab"), data.made_from, place)
        folders = found_in(begun.folder / "checkpoints")
        if begun.is_finished:
            return Finding("run", "ok", f"{run.out} is finished already: nothing is left to do")
        if not folders:
            return Finding("run", "ok", f"{run.out} is new")
        number, newest = folders[-1]
        about = about_of(newest)
        refuse_difference(begun.folder, "settings", about["settings"], begun.identity.settings, begun.allowed)
        refuse_difference(begun.folder, "inputs", about["made_from"], data.made_from)
    except (OSError, ValueError, KeyError) as error:
        return Finding("run", "fix", f"{run.out}: {error}", "remove what is damaged there, or name another out")
    except UserError as error:
        value, _, advice = str(error).rpartition("; ")
        return Finding("run", "fix", value or advice, advice if value else "mend it")
    if not run.resume:
        return Finding("run", "fix", f"{run.out} holds a run and resume=false", "name another out, or resume=true")
    return Finding("run", "ok", f"{run.out} goes on from {newest.name}")


def disk_room(run: TrainConfig, memory: Memory | None) -> Finding:
    """For the checkpoints that are kept, one more that is being written, and the weights at the end."""
    free = free_bytes(Path(run.out))
    if free is None:
        return Finding("disk", "skip", "this system does not tell how much is free")
    if memory is None:
        return Finding("disk", "skip", f"{gigabytes(free)} GB free; what is needed is not known without a plan")
    count = checkpoints_kept(run) + 1
    need = count * memory.checkpoint + 4 * memory.plan.numel
    files = (path for path in (Path(run.out) / "checkpoints").rglob("*") if path.is_file())
    there = sum(path.stat().st_size for path in files)
    told = f"{gigabytes(need)} for {count} checkpoints of {gigabytes(memory.checkpoint)} and the weights"
    told += f", of which {gigabytes(there)} are there" if there else ""
    if free < need - there:
        advice = f"make room at {run.out}, name another out, or keep fewer (keep_last, keep_every)"
        return Finding("disk", "fix", f"{gigabytes(free)} GB free, {told}", advice)
    return Finding("disk", "ok", f"{gigabytes(free)} GB free, {told}")


def assumed_rates(config: DoctorConfig, facts: Sequence[Facts]) -> tuple[float, float] | None:
    """GB/s that NCCL would reach by the plan: of a rank inside its host, of a host to the others. None: of no GPU that
    the plan knows, and nothing was said."""
    gpu = facts[0].accelerator
    kind = kind_of(gpu.name, gpu.total) if gpu else None
    intra = config.intra_gb_s or (GPUS[kind].link_gb_s if kind else 0.0)
    inter = config.inter_gb_s or (GPUS[kind].node_gb_s if kind else 0.0)
    return (LINK_REACHED * intra, LINK_REACHED * inter) if intra or inter else None


COMMAND = CommandAboutARun("doctor", DoctorConfig, Path(__file__).parent / "configs" / "doctor", doctor, __doc__)

if __name__ == "__main__":
    sys.exit(run_command(COMMAND, sys.argv[1:]))
