"""A dVAE run folder -> weights that the PyPI package `dall-e` loads: encoder.pt and decoder.pt.

    smalti dvae export runs/dvae out=exported

Each file is a dict of tensors under the package's names. They are read, in any version of torch, by

    encoder = dall_e.Encoder(n_hid=256, n_blk_per_group=2, vocab_size=8192)
    encoder.load_state_dict(torch.load("exported/encoder.pt", weights_only=True))

and likewise dall_e.Decoder(n_init=128, ...); the line with this run's sizes is printed. They are not
whole pickled modules, which `dall_e.load_model` asks for: such a file would run code where it is
loaded, is refused by torch.load since torch 2.6, and holds modules of one torch version. The dVAE
must have the published form: model.fold=1, model.n_groups=4.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from cluster.command import Command, run_command
from cluster.manifest import is_done, write_bytes, write_manifest
from cluster.settings import setting
from dvae.openai import published_bytes
from dvae.train import open_dvae


@dataclass(frozen=True)
class ExportConfig:
    """What is read and written."""

    dvae: str = setting("runs/dvae", "finished dVAE run (first plain word)")
    out: str = setting("exported", "folder to write")


def export_dvae(config: ExportConfig) -> None:
    """Run the stage; see the module's text."""
    model, about = open_dvae(Path(config.dvae), torch.device("cpu"))
    out, made_from, shape = Path(config.out), {"dvae": about.fingerprint}, model.config
    files = {f"{part}.pt": data for part, data in published_bytes(model).items()}
    if is_done(out, "openai", {}, made_from):
        print(f"{out}: finished already")
        return
    out.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        write_bytes(out / name, data)
    write_manifest(out, "openai", {}, {}, sorted(files), made_from)
    sizes = f"n_hid={shape.width}, n_blk_per_group={shape.n_blocks}, vocab_size={shape.codebook}"
    print(f"{out}: for dall_e.Encoder({sizes}) and dall_e.Decoder(n_init={shape.n_init}, {sizes}), by load_state_dict")


COMMAND = Command(
    "dvae export", ExportConfig, Path(__file__).parent / "configs" / "openai_export", export_dvae, __doc__,
    plain=("dvae",),
)  # fmt: skip

if __name__ == "__main__":
    sys.exit(run_command(COMMAND, sys.argv[1:]))
