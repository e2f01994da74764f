"""The demo's page: one HTML file with everything inside, and the same as one PNG."""

import base64
import html
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from cluster.manifest import write_bytes
from cluster.metrics import read_metrics
from data_pipeline.loader import Shards, caption_of, first_pictures, picture_of
from dvae.likelihood import map_pixels, most_likely_pixels
from dvae.train import open_dvae
from pretrain.pictures import read_rows

N_RECONSTRUCTIONS = 24
N_SHOWN = 8  # ranked candidates beside the real picture
CELL = 84  # pixels a picture is shown at

STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:1080px;margin:2.5em auto;padding:0 1em;color:#222}
h1{font-size:2em;margin-bottom:0} h2{margin-top:2em;border-bottom:2px solid #e7a33e;padding-bottom:.15em}
img{max-width:100%} .wall img{width:84px;height:84px;image-rendering:auto;border-radius:4px}
.wall td{padding:3px;vertical-align:middle}
.wall td:first-child{font-size:14px;width:190px;text-align:right;padding-right:12px}
.real{border-right:3px solid #e7a33e;padding-right:10px!important}
pre{background:#f5f2ec;padding:1em;overflow-x:auto;font-size:13px}
table.n td{padding:.15em 1.5em .15em 0} small{color:#666}
"""


def write_page(out: Path, numbers: dict[str, Any], commands: list[str]) -> None:
    """Write out/index.html and out/index.png from the finished stages in `out`."""
    curves = draw_curves(out)
    mosaic = draw_reconstructions(out)
    wall = read_wall(out)
    page = _html(numbers, commands, curves, mosaic, wall)
    write_bytes(out / "index.html", page.encode())
    write_bytes(out / "index.png", _png(_poster(numbers, curves, mosaic, wall)))


def draw_curves(out: Path) -> Image.Image:
    """Four panels: the three models' curves and the use of codes."""
    dvae, transformer, scorer = (read_metrics(out / "runs" / name) for name in ("dvae", "train", "scorer"))
    figure = Figure(figsize=(13, 6.4), dpi=100, layout="constrained")
    axes = figure.subplots(2, 3).ravel()
    _plot(axes[0], "dVAE: loss (nats per pixel value)", [("training", dvae, "train/nats")])
    _plot(axes[1], "dVAE: held-out PSNR (dB)", [("mean over pictures", dvae, "val/psnr_db")])
    used = [("held-out, share of all codes", dvae, "val/codes_used"), ("in a batch", dvae, "vae/codes_used_in_batch")]
    _plot(axes[2], "dVAE: codes in use", used)
    axes[2].set_ylim(0, 1)
    text = [("training", transformer, "train/text_loss"), ("held-out", transformer, "val/text_loss")]
    _plot(axes[3], "transformer: text loss (nats per token)", text)
    image = [("training", transformer, "train/image_loss"), ("held-out, true captions", transformer, "val/image_loss"),
             ("held-out, shuffled captions", transformer, "val/image_loss_shuffled")]  # fmt: skip
    _plot(axes[4], "transformer: image loss (nats per token)", image)
    found = [("true picture in best 5 of 64", scorer, "val/top5_of_64")]
    _plot(axes[5], "scorer: held-out recall", found)
    axes[5].set_ylim(0, 1)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return Image.open(buffer).convert("RGB")


def _plot(axis: Any, title: str, lines: list[tuple[str, list[dict[str, Any]], str]]) -> None:
    for label, records, tag in lines:
        points = [(record["step"] + 1, record[tag]) for record in records if tag in record]
        if points:
            steps, values = zip(*points, strict=True)
            axis.plot(steps, values, label=label, marker="." if len(points) < 40 else "", linewidth=1.5)
    axis.set_title(title, fontsize=10)
    axis.set_xlabel("step", fontsize=8)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)


@torch.no_grad()
def draw_reconstructions(out: Path) -> Image.Image:
    """Held-out pictures in the upper lines, what the dVAE makes of them below."""
    model, _ = open_dvae(out / "runs" / "dvae", torch.device("cpu"))
    shards = Shards(out / "data" / "images", "images", "heldout")
    pixels = first_pictures(shards, N_RECONSTRUCTIONS, model.config.image_side)
    drawn = most_likely_pixels(model.decode(model.encode(map_pixels(pixels))))
    side = pixels.shape[-1]
    pairs = torch.stack([pixels, drawn], 2)  # (N, 3, 2, P, P): the original above its twin
    half = N_RECONSTRUCTIONS // 2
    lines = [torch.cat(list(pairs[i : i + half].flatten(2, 3)), -1) for i in range(0, len(pairs), half)]
    sheet = torch.cat(lines, 1) if len({line.shape for line in lines}) == 1 else lines[0]
    array = (sheet * 255).round().byte().permute(1, 2, 0).numpy()
    size = (array.shape[1] * CELL // side, array.shape[0] * CELL // side)
    return Image.fromarray(array).resize(size, Image.Resampling.LANCZOS)


def read_wall(out: Path) -> list[tuple[str, Image.Image, list[Image.Image]]]:
    """(caption, the real held-out picture, ranked candidates) for each caption drawn."""
    real = {caption_of(sample): sample for sample in Shards(out / "data" / "images", "images", "heldout")}
    wall = []
    for rows in read_rows(out / "ranked").values():
        caption = rows[0]["caption"]
        drawn = [Image.open(out / "ranked" / row["file"]).convert("RGB") for row in rows[:N_SHOWN]]
        wall.append((caption, Image.fromarray(np.array(picture_of(real[caption], drawn[0].width))), drawn))
    return wall


def _rows(numbers: dict[str, Any]) -> list[tuple[str, str]]:
    dvae, transformer, scorer = numbers["dvae"], numbers["transformer"], numbers["scorer"]
    used, perplexity = f"{dvae['codes_used']:.0%} of {dvae['codebook']:,}", f"perplexity {dvae['perplexity']:.0f}"
    gap = transformer["image_loss_shuffled"] - transformer["image_loss_true"]
    return [
        ("dVAE, held-out PSNR", f"{dvae['psnr_db']:.2f} dB (of the mean error: {dvae['psnr_of_mean_db']:.2f} dB)"),
        ("codes in use on held-out pictures", f"{used}; {perplexity}"),
        ("transformer, held-out image loss", f"{transformer['image_loss_true']:.3f} nats per token"),
        ("... with shuffled captions", f"{transformer['image_loss_shuffled']:.3f} nats: {gap:.3f} more"),
        ("scorer, true picture in best 5 of 64", f"{scorer['top5_of_64']:.0%} of held-out captions"),
        ("time in all", f"{sum(numbers['seconds'].values()) / 60:.1f} minutes"),
        ("peak memory", f"{numbers['peak_memory_gib']:.1f} GiB"),
    ]


def _html(numbers: dict[str, Any], commands: list[str], curves: Image.Image, mosaic: Image.Image, wall: list) -> str:
    table = "".join(f"<tr><td>{html.escape(name)}<td><b>{html.escape(value)}</b>" for name, value in _rows(numbers))
    seconds = "".join(f"<tr><td>{name}<td align=right>{value:.1f} s" for name, value in numbers["seconds"].items())
    lines = "".join(
        f"<tr><td>{html.escape(caption)}<td class=real>{_tag(real)}<td>" + "<td>".join(map(_tag, drawn))
        for caption, real, drawn in wall
    )
    about = f"smalti {numbers['versions']['smalti']}, commit {numbers['commit']}, torch {numbers['versions']['torch']}"
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>smalti demo</title><style>{STYLE}</style>"
        f"<h1>smalti demo</h1><p><small>{html.escape(about)}</small></p>"
        "<p>A discrete VAE, a sparse transformer and a contrastive scorer, trained from nothing on this machine on "
        "emoji in three styles. Every caption below asks for a concept in a style that training never saw together; "
        "the concept was seen in another style.</p>"
        f"<table class=n>{table}</table>"
        "<h2>Held-out captions</h2><p>The real picture, then the best candidates, best first.</p>"
        f"<table class=wall><tr><td><td class=real><small>real</small><td colspan=8><small>drawn</small>{lines}</table>"
        f"<h2>What the dVAE keeps</h2><p>Held-out pictures, and below each what its codes draw.</p>{_tag(mosaic)}"
        f"<h2>Curves</h2>{_tag(curves)}"
        f"<h2>Time per stage</h2><table class=n>{seconds}</table>"
        f"<h2>The same by hand</h2><pre>{html.escape(chr(10).join(commands))}</pre>"
        f"<h2>Numbers for scripts</h2><pre>{html.escape(json.dumps(numbers, indent=1))}</pre></html>"
    )


def _poster(numbers: dict[str, Any], curves: Image.Image, mosaic: Image.Image, wall: list) -> Image.Image:
    """The page's essence as one picture."""
    width, cell, margin = curves.width, CELL, 24
    shown = wall[:16]
    height = 120 + 26 * len(_rows(numbers)) + len(shown) * (cell + 6) + mosaic.height + curves.height + 5 * margin
    sheet = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((margin, margin), "smalti demo", fill="black", font=ImageFont.load_default(40))
    top = 100
    for name, value in _rows(numbers):
        pen.text((margin, top), name, fill="#555", font=ImageFont.load_default(18))
        pen.text((420, top), value, fill="black", font=ImageFont.load_default(18))
        top += 26
    top += margin
    for caption, real, drawn in shown:
        pen.text((margin, top + 30), caption[:44], fill="black", font=ImageFont.load_default(16))
        sheet.paste(real.resize((cell, cell), Image.Resampling.LANCZOS), (400, top))
        for column, picture in enumerate(drawn):
            sheet.paste(picture.resize((cell, cell), Image.Resampling.LANCZOS), (510 + column * (cell + 6), top))
        top += cell + 6
    top += margin
    sheet.paste(mosaic, (margin, top))
    sheet.paste(curves, (0, top + mosaic.height + margin))
    return sheet


def _png(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "png", optimize=True)
    return out.getvalue()


def _tag(image: Image.Image) -> str:
    return f'<img src="data:image/png;base64,{base64.b64encode(_png(image)).decode()}">'
