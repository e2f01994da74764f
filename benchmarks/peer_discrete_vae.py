"""DALLE-pytorch's DiscreteVAE on our pictures: `python -m benchmarks.peer_discrete_vae IMAGES SECONDS`.

As its train_vae.py has it: two residual blocks, embeddings of 512, squared error without KL, Adam at 1e-3 with a decay
of 0.98, a temperature from 1 towards 0.5, both moved at every hundredth step. Codebook and grid are those of emoji-128,
and the hidden width is its README's 64, for at train_vae.py's 256 two cores do few steps. Prints one JSON object.
"""

import argparse
import importlib
import json
import math
import os
import time
from pathlib import Path

import torch

from benchmarks.timing import hollow_out
from data_pipeline.loader import ImageBatches, LoaderConfig, Shards, first_pictures

SIDE, CODEBOOK, LAYERS, BATCH, HIDDEN, EMBEDDING, RESIDUAL = 128, 1024, 3, 8, 64, 512, 2
RATE, RATE_DECAY, COOLING, COOLEST, EVERY = 1e-3, 0.98, 1e-6, 0.5, 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path)
    parser.add_argument("seconds", type=float)
    words = parser.parse_args()
    hollow_out("taming.models.vqgan", "torchvision")
    peer = importlib.import_module("dalle_pytorch")
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    vae = peer.DiscreteVAE(
        image_size=SIDE, num_layers=LAYERS, num_tokens=CODEBOOK, codebook_dim=EMBEDDING, hidden_dim=HIDDEN,
        num_resnet_blocks=RESIDUAL, temperature=1.0, kl_div_loss_weight=0.0,
    )  # fmt: skip
    optimizer = torch.optim.Adam(vae.parameters(), RATE)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, RATE_DECAY)
    batches = ImageBatches(Shards(words.images, "images", "train"), LoaderConfig(batch=BATCH), SIDE, flip=True)
    temperature, steps, until = 1.0, 0, time.monotonic() + words.seconds
    while time.monotonic() < until:
        loss = vae(next(batches).pixels, return_loss=True, temp=temperature)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if steps % EVERY == 0:
            temperature = max(temperature * math.exp(-COOLING * steps), COOLEST)
            schedule.step()
        steps += 1
    pixels = first_pictures(Shards(words.images, "images", "heldout"), 1024, SIDE)
    vae.eval()
    errors, codes = [], []
    for part in pixels.split(16):
        with torch.no_grad():
            codes.append(vae.get_codebook_indices(part))
            drawn = vae.decode(codes[-1])
        if getattr(vae, "normalization", None):  # it decodes to where it normalised its input
            means, scales = (torch.tensor(one).view(1, 3, 1, 1) for one in vae.normalization)
            drawn = drawn * scales + means
        errors.append((drawn.clamp(0, 1) - part).square().mean((1, 2, 3)))
    psnr = -10 * torch.cat(errors).clamp(min=1e-10).log10().mean().item()
    print(json.dumps({"psnr": psnr, "codes": len(torch.cat(codes).unique()) / CODEBOOK, "steps": steps}))


if __name__ == "__main__":
    main()
