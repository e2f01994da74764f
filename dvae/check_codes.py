"""Whether codes can be trusted: those of 16 bit against those of fp32, and pictures drawn from those written."""

from pathlib import Path

import numpy as np
import torch

from cluster.manifest import write_bytes
from data_pipeline.contents import Codes
from data_pipeline.loader import to_pixels
from data_pipeline.shards import Sample, open_shard
from dvae.health import png_of
from dvae.likelihood import map_pixels, most_likely_pixels
from dvae.model import Dvae
from dvae.train import open_dvae

N_CODES = 65_536  # compared: a share of 99.9 % is then known to about a hundredth of a percent
N_DRAWN, N_SHOWN = 16, 8  # pictures measured, and of them those in the sheet
BATCH = 8  # pictures at a time, whatever the batch of the work: the numbers must not depend on it
FAR_DB = 6.0  # four times the squared error; the mean of 16 pictures strays from that of all by about 1 dB
SAMPLE = "sample.png"


@torch.no_grad()
def encode(pictures: np.ndarray, model: Dvae, device: torch.device) -> np.ndarray:
    """(N, P, P, 3) uint8 -> (N, G, G) uint16 codes. A GPU is kept from rounding fp32 to TF32, as it does unasked."""
    mapped = map_pixels(to_pixels(pictures).to(device)).contiguous(memory_format=torch.channels_last)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        return model.encode(mapped).cpu().numpy().astype(np.uint16)


def equal_share(dvae: Path, pictures: list[np.ndarray], device: torch.device) -> float:
    """Of the codes of these (P, P, 3) uint8 pictures the share that bf16 and fp32 give alike."""
    parts = [np.stack(pictures[at : at + BATCH]) for at in range(0, len(pictures), BATCH)]
    found = []
    for computes in (torch.float32, torch.bfloat16):
        model, _ = open_dvae(dvae, device, computes)
        found.append(np.concatenate([encode(part, model, device) for part in parts]))
    return float((found[0] == found[1]).mean())


@torch.no_grad()
def draw_back(folder: Path, dvae: Path, sample: list[tuple[str, str, np.ndarray]], device: torch.device) -> float:
    """Read codes that were written, draw them, and tell the mean PSNR in dB, with a warning if it is far too low.

    sample: of each picture the token shard, the key and what was coded of it first, (P, P, 3) uint8.
    Writes `sample.png`, originals above what is drawn. ShardError if a shard cannot hold codes of this dVAE.
    """
    model, about = open_dvae(dvae, device)
    expected = Codes(model.config.grid, model.config.codebook)
    codes = torch.from_numpy(np.stack([expected.read(_sample(folder / name, key))[0] for name, key, _ in sample]))
    originals = to_pixels(np.stack([picture for _, _, picture in sample]))
    parts = codes.long().to(device).split(BATCH)
    drawn = torch.cat([most_likely_pixels(model.decode(part)).cpu() for part in parts])
    rows = (list(pixels[:N_SHOWN]) for pixels in (originals, drawn))
    write_bytes(folder / SAMPLE, png_of(torch.cat([torch.cat(row, 2) for row in rows], 1)))
    error = (drawn - originals).square().mean((1, 2, 3)).double().clamp(min=1e-10)
    psnr = round(-10 * error.log10().mean().item(), 2)
    _tell(folder, psnr, about.counts.get("val/psnr_db"), len(sample))
    return psnr


def _sample(path: Path, key: str) -> Sample:
    shard = open_shard(path)
    return shard.read(shard.keys.index(key))


def _tell(folder: Path, psnr: float, own: float | None, count: int) -> None:
    """own: the dVAE's PSNR on its held-out pictures; None if nobody measured it."""
    told = "" if own is None else f" (its run measured {own:.1f} dB held out)"
    print(f"{count} pictures drawn from their codes have {psnr:.1f} dB PSNR{told}: {folder / SAMPLE}")
    if own is not None and psnr < own - FAR_DB:
        print(
            f"warning: that is {own - psnr:.1f} dB below what the dVAE reached: these are not its kind of pictures, "
            "or the dVAE or the shards are damaged"
        )
