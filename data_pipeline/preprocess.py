"""Raw image-caption pairs -> `images/` shards, `vocab/` and a report of what was dropped and why.

    smalti preprocess emoji out=data

Reads what img2dataset writes (tars or files), any WebDataset tars, or a folder of pictures with a
.txt beside each. Writes OUT/images (shards of KEY.<picture>, KEY.txt, KEY.json), OUT/vocab (the BPE)
and OUT/report.json and report.html. Can be killed and run again: finished shards are kept. Shared by
the ranks of a launch, or by tasks (tasks=8 task=0, ...; `smalti preprocess merge` ends it): the
result is the same bytes. About 400 small pictures a second and core.
"""

import sys
from collections import Counter
from pathlib import Path

from cluster.command import Command, run_command
from cluster.manifest import is_done
from cluster.metrics import Progress
from cluster.process import Place, meet, meeting_place
from data_pipeline.convert import (
    PreprocessConfig,
    all_parts,
    convert_part,
    digest_of_parts,
    filters_of,
    image_settings,
    shard_folder,
)
from data_pipeline.merge import merge, remember, start
from data_pipeline.shares import in_processes, said_by_each_rank
from data_pipeline.thinning import origin_of


def preprocess(config: PreprocessConfig) -> None:
    """Run the stage; see the module's text."""
    against, images = start(config), Path(config.out) / "images"
    filters_of(config.filters)  # so that a rule that makes no sense is refused before anything is written
    with meeting_place(on_cpu=True) as place, said_by_each_rank(place):
        if not is_done(images, "images", image_settings(config), origin_of(against)):
            convert(config, images, place)
        elif config.tasks:
            print(f"{images} is finished already")
        if config.tasks:
            return
        meet(place)
        if place.is_main:
            merge(config)


def convert(config: PreprocessConfig, images: Path, place: Place) -> None:
    """This process's share of the source -> shards."""
    parts = all_parts(config)
    share = config.share(parts, place)
    shard_folder(config).mkdir(parents=True, exist_ok=True)
    remember(images / "settings.json", image_settings(config), "other settings")
    remember(images / "parts.json", {"parts": len(parts), "sha256": digest_of_parts(parts)}, "a source of other files")
    progress = Progress("preprocess", len(share), unit="shard")
    fates: Counter[str] = Counter()
    for result in in_processes(convert_part, [(part, config) for part in share], config.workers):
        fates += result
        progress.advance(note=f"{fates['kept: train'] + fates['kept: heldout']} pairs kept")
    progress.close()
    if config.tasks:
        print(f"task {config.task} of {config.tasks}: {len(share)} of {len(parts)} shards are done; "
              "when all tasks are, `smalti preprocess merge` with the same words ends it")  # fmt: skip


COMMAND = Command("preprocess", PreprocessConfig, Path(__file__).parent / "configs", preprocess, __doc__)

if __name__ == "__main__":
    sys.exit(run_command(COMMAND, sys.argv[1:]))
