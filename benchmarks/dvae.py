"""What the discrete VAE reaches and costs: `python -m benchmarks.dvae [--json] [ROW...]`.

Each row is a claim with its bar, measured in processes of its own; ROW is one name, or the first part of several
(`size`). emoji-128/... and dalle-pytorch train on pictures of 128 px: images=FOLDER, or that of
`smalti preprocess emoji image_side=128 out=data-128`. size/codes is set beside the package `dall-e`, and dalle-pytorch
beside the package of that name, where they are installed; size/gpu is left out without a GPU. The rows of size take
about 5 minutes on two cores, the others 3 minutes a seed.
"""

import argparse
import datetime
import json
import os
import platform
import signal
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.distributed_jobs import ROOT, Failed, Row, answers, last_json
from benchmarks.peers import DALLE_PYTORCH, cpu_name
from cluster.manifest import read_manifest
from cluster.metrics import read_metrics
from cluster.process import n_accelerators

SIZE_SECONDS, RUN_SECONDS = 1800, 7200
SEEDS = (0, 1, 2, 3, 4)
MINUTE = 60.0
NO_GPU = "this machine has no GPU"
Setup = argparse.Namespace  # images: Path; folder: Path for runs; size: str; preset: list of words


def on_all_cores(module: str, words: list[str], seconds: float) -> str:
    """What a module prints that may use every core."""
    cores = str(len(os.sched_getaffinity(0)))
    return answers([["env", f"OMP_NUM_THREADS={cores}", sys.executable, "-m", module, *words]], seconds)[0]


def of_size(setup: Setup, what: str) -> dict[str, Any]:
    return last_json(on_all_cores("benchmarks.dvae_sizes", [what, setup.size], SIZE_SECONDS))


def codes_rows(setup: Setup) -> list[Row]:
    """The same weights here and in the published modules: fp32, two pictures."""
    found = of_size(setup, "codes")
    note = f"against {found['source']}; {found['distinct']} different codes"
    return [
        Row("size/codes equal", found["equal"], 1.0, True, note),
        Row("size/pixels apart", found["pixels"], 1e-4, False, note),
    ]


def speed_rows(setup: Setup) -> list[Row]:
    """Fp32 on all cores, one picture: medians of rounds in which all take turns."""
    found = last_json(on_all_cores("benchmarks.dvae_turns", [setup.size], SIZE_SECONDS))
    seconds = found["seconds"]

    def against(what: str) -> str:
        rates = f"{1 / seconds['ours'][what]:.3g} against {1 / seconds['theirs'][what]:.3g} pictures/s"
        rounds = f"rounds {min(found[what]):.2f} to {max(found[what]):.2f}"
        return f"{rates}, {rounds}; {found['source']}"

    share = (
        f"{found['product']} {found['gflop_s']:.0f} GFLOP/s in fp32; the step {found['share'] * found['gflop_s']:.0f}"
    )
    return [
        Row("size/step", statistics.median(found["step"]), 1.2, True, against("step"), found),
        Row("size/encode", statistics.median(found["encode"]), 1.2, True, against("encode")),
        Row("size/matmul share", found["share"], 0.5, True, share),
    ]


def memory_rows(setup: Setup) -> list[Row]:
    found = of_size(setup, "memory")
    without = found["without checkpointing, fp16"]
    computed = (
        f"GB in fp16, batch 8, blocks checkpointed; fp32 {found['computed']['fp32']:.1f}, fp16 without {without:.1f}"
    )
    resident = f"GB resident after two such steps in fp32 on a CPU; computed {found['computed']['fp32']:.1f}"
    return [
        Row("size/memory computed", found["computed"]["fp16"], 16.0, False, computed, found),
        Row("size/memory resident", found["resident"], 16.0, False, resident),
    ]


def gpu_row(setup: Setup) -> Row:
    """No bar: recorded, where there is a GPU."""
    if not n_accelerators():
        return Row("size/gpu share", None, 0.0, True, NO_GPU)
    found = of_size(setup, "gpu")
    note = (
        f"{found['name']}: step {found['step']:.0f}, encode {found['encode']:.0f} pictures/s in bf16, "
        f"{found['gigabytes']:.1f} GB; matmul {found['tflop_s']:.0f} TFLOP/s"
    )
    return Row("size/gpu share", found["mfu"], 0.0, True, note, found)


def trained(setup: Setup, seed: int) -> dict[str, Any]:
    """A run of the preset: what it measured on held-out pictures at its end; its minutes, restarts left out; the least
    share of the codebook that it ever had, in use or as perplexity, and what its alarm calls a collapse."""
    need_pictures(setup)
    out = setup.folder / f"seed{seed}"
    words = [*setup.preset, f"images={setup.images}", f"out={out}", f"seed={seed}", f"data.seed={seed}"]
    on_all_cores("dvae.train", words, RUN_SECONDS)
    records = read_metrics(out)
    measured = [line for line in records if "val/psnr_db" in line]
    seconds = sum(line.get("perf/step_seconds", 0.0) for line in records)
    settings = read_manifest(out, "dvae").settings
    codebook = settings["model"]["codebook"]
    least = min(min(line["val/codes_used"], line["val/perplexity"] / codebook) for line in measured)
    return measured[-1] | {"minutes": seconds / MINUTE, "least": least, "bar": settings["collapse_below"]}


def need_pictures(setup: Setup) -> None:
    if not (setup.images / "manifest.json").is_file():
        made = "smalti preprocess emoji image_side=128 out=data-128"
        raise Failed(f"{setup.images} has no pictures: make them with `{made}`, or give images=FOLDER")


def emoji_rows(setup: Setup) -> list[Row]:
    """Every seed has to reach the bars: the worst is told. Minutes are those of the steps."""
    found = [trained(setup, seed) for seed in setup.seeds]
    columns = {key: [run[key] for run in found] for key in ("val/psnr_db", "val/codes_used", "least", "minutes")}

    def note(key: str, form: str) -> str:
        return f"seeds {setup.seeds}: {', '.join(format(value, form) for value in columns[key])}"

    healthy = sum(run["least"] >= run["bar"] for run in found)
    collapse = f"{healthy} of {len(found)} seeds without collapse; least share of the codebook, {note('least', '.1%')}"
    return [
        Row("emoji-128/psnr", min(columns["val/psnr_db"]), 24.0, True, f"dB held-out; {note('val/psnr_db', '.2f')}"),
        Row("emoji-128/codes", min(columns["val/codes_used"]), 0.6, True, note("val/codes_used", ".1%")),
        Row("emoji-128/collapse", healthy, len(found), True, collapse),
        Row("emoji-128/minutes", max(columns["minutes"]), 60.0, False, note("minutes", ".1f")),
    ]


def peer_row(setup: Setup) -> Row:
    """The peer trains on the same pictures for the minutes that a run of ours has taken."""
    try:
        version = metadata.version("dalle-pytorch")
    except metadata.PackageNotFoundError:
        peer, imports = f"{DALLE_PYTORCH.name}=={DALLE_PYTORCH.version}", " ".join(map(repr, DALLE_PYTORCH.imports))
        raise Failed(f"it is not installed: `pip install --no-deps {peer}`, then `pip install {imports}`") from None
    ours = trained(setup, setup.seeds[0])
    words = [str(setup.images), str(ours["minutes"] * MINUTE)]
    theirs = last_json(on_all_cores("benchmarks.peer_discrete_vae", words, RUN_SECONDS))
    note = (
        f"{ours['val/psnr_db']:.2f} against {theirs['psnr']:.2f} dB after {ours['minutes']:.0f} minutes, codes in use "
        f"{ours['val/codes_used']:.0%} and {theirs['codes']:.0%}; dalle-pytorch {version}, {theirs['steps']} steps"
    )
    return Row("dalle-pytorch", ours["val/psnr_db"] - theirs["psnr"], 2.0, True, note, {"theirs": theirs})


ROWS: dict[str, Callable[[Setup], Row | list[Row]]] = {
    "size/codes": codes_rows,
    "size/step": speed_rows,
    "size/memory": memory_rows,
    "size/gpu": gpu_row,
    "emoji-128": emoji_rows,
    "dalle-pytorch": peer_row,
}


def chosen(names: list[str]) -> list[str]:
    """The rows that these words name, or all."""
    unknown = [name for name in names if not any(row == name or row.startswith(f"{name}/") for row in ROWS)]
    if unknown:
        raise SystemExit(f"no row {', '.join(unknown)}; there are: {', '.join(ROWS)}")
    return [row for row in ROWS if not names or any(row == name or row.startswith(f"{name}/") for name in names)]


def rows(names: list[str], setup: Setup) -> Iterator[Row]:
    """Rows one after the other; one that cannot be measured has no value, and says why."""
    for name in chosen(names):
        try:
            made = ROWS[name](setup)
        except Failed as error:
            made = Row(name, None, 0.0, True, str(error))
        yield from made if isinstance(made, list) else [made]


def verdict(row: Row) -> bool | None:
    """None of what is not measured for want of a GPU, which is no failure."""
    return None if row.note == NO_GPU else row.ok


def about(row: Row) -> dict[str, object]:
    named = {"what": row.what, "value": row.value, "bar": row.bar, "ok": verdict(row)}
    return named | {"at_least": row.at_least, "note": row.note, "load": os.getloadavg()[0], "details": row.details}


def shown(row: Row) -> str:
    value = "none" if row.value is None else f"{row.value:.4g}"
    word = {True: "ok", False: "MISSED", None: "not measured:"}[verdict(row)]
    return f"{row.what:<22} {value:>9} {'>=' if row.at_least else '<='} {row.bar:<7g} {word:<7} {row.note}"


def machine() -> dict[str, object]:
    versions = {name: metadata.version(name) for name in ("torch", "numpy")}
    here = {"cpu": cpu_name(), "cores": len(os.sched_getaffinity(0)), "system": platform.platform()}
    return {"what": "device", "date": datetime.date.today().isoformat(), **here, **versions}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", metavar="ROW | images=FOLDER", help=f"rows: {', '.join(ROWS)}")
    parser.add_argument("--json", action="store_true", help="one JSON object a row, the machine first")
    parser.add_argument("--keep", type=Path, help="a folder for the runs that rows make, which then stay and go on")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS, help="of emoji-128; the first for dalle-pytorch")
    words = parser.parse_args()
    given = [word.removeprefix("images=") for word in words.words if word.startswith("images=")]
    names = [word for word in words.words if not word.startswith("images=")]
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that processes and folders are cleared
    verdicts = []
    with tempfile.TemporaryDirectory() as temporary:
        setup = Setup(
            images=Path(given[-1] if given else ROOT / "data-128" / "images").absolute(), size="published",
            folder=(words.keep or Path(temporary)).absolute(), preset=["emoji-128"], seeds=tuple(words.seeds),
        )  # fmt: skip
        if words.json:
            print(json.dumps(machine()), flush=True)
        for row in rows(names, setup):
            verdicts.append(verdict(row))
            print(json.dumps(about(row)) if words.json else shown(row), flush=True)
    return 1 if False in verdicts else 0


if __name__ == "__main__":
    sys.exit(main())
