"""Published dVAE weights (encoder.pkl, decoder.pkl) -> a dVAE run folder, without running their pickle.

    smalti dvae import encoder.pkl decoder.pkl out=runs/dvae

The files are OpenAI's (github.com/openai/DALL-E; 215 and 175 MB); what comes out is a finished run
folder, as `smalti dvae` writes it. Codes and reconstructions are those of the PyPI package `dall-e`
for the same weights. Takes some seconds. Encoding then takes 0.4 GB for each picture of 256 pixels
in a batch, so tokenise with `batch=8` or so.

A VQGAN of taming-transformers is not read. It is another network (attention, group norms, codes by the
nearest embedding or by Gumbel logits, pixels without a likelihood): every stage that codes or draws
pictures would do it in two ways, and none of the measures of a dVAE's health would hold. Its shape,
moreover, is in a YAML file beside a checkpoint that pickles the whole trainer.
"""

import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from cluster.command import Command, run_command
from cluster.manifest import FolderError, file_digest, is_done, write_json, write_manifest
from cluster.settings import SettingError, setting
from cluster.weights import WEIGHTS, save_weights
from dvae.openai import N_GROUPS, read_published


@dataclass(frozen=True)
class ImportConfig:
    """What is read and written."""

    encoder: str = setting("encoder.pkl", "the published encoder (first plain word)")
    decoder: str = setting("decoder.pkl", "the published decoder (second plain word)")
    out: str = setting("runs/dvae", "run folder to write")
    image_side: int = setting(256, "pixels along a side of the pictures it is for (256)")

    def __post_init__(self) -> None:
        unit = 2 ** (N_GROUPS - 1)
        if self.image_side < unit or self.image_side % unit:
            raise SettingError(f"image_side={self.image_side} must be a multiple of {unit}")


def import_dvae(config: ImportConfig) -> None:
    """Run the stage; see the module's text."""
    encoder, decoder, out = Path(config.encoder), Path(config.decoder), Path(config.out)
    shape, weights = read_published(encoder, decoder, config.image_side)
    settings = {"model": asdict(shape)}
    made_from = {"encoder": file_digest(encoder), "decoder": file_digest(decoder)}
    if is_done(out, "dvae", settings, made_from):
        print(f"{out}: finished already")
        return
    if (out / "checkpoints").exists():
        raise FolderError(f"{out} holds an unfinished dVAE run; name another `out`, or remove it")
    out.mkdir(parents=True, exist_ok=True)
    save_weights(out, weights)
    write_json(out / "config.json", {"model_type": "smalti-dvae", **asdict(shape)})
    n_parameters = sum(tensor.numel() for tensor in weights.values())
    write_manifest(out, "dvae", settings, {"parameters": n_parameters}, [WEIGHTS, "config.json"], made_from)
    print(
        f"{out}: {shape.codebook:,} codes, {shape.grid}x{shape.grid} of them for a picture of {shape.image_side} "
        f"pixels, {n_parameters / 1e6:.1f} M parameters"
    )


COMMAND = Command(
    "dvae import", ImportConfig, Path(__file__).parent / "configs" / "openai_import", import_dvae, __doc__,
    plain=("encoder", "decoder"),
)  # fmt: skip

if __name__ == "__main__":
    sys.exit(run_command(COMMAND, sys.argv[1:]))
