"""The README of a release: what the model is, what it was trained on, what was measured, and what it cannot do."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.manifest import flat
from pretrain.config import TransformerConfig
from pretrain.model import Sizes


@dataclass(frozen=True)
class Card:
    """What a release says of itself."""

    model: TransformerConfig
    sizes: Sizes
    n_parameters: int
    step: int
    weights: str  # "trained" or "average"
    dtype: str
    settings: dict[str, Any]
    made_from: dict[str, str]
    data: dict[str, int]  # counts of the token shards, if they were there to be asked
    measured: dict[str, float]


def card_text(card: Card, folder: Path) -> str:
    """Markdown, with the header that the Hugging Face Hub reads."""
    return "\n\n".join((_header(), _model(card), _data(card), _measured(card), _use(folder), _limits(card))) + (
        f"\n\n## Settings\n\n```\n{_lines(flat(card.settings))}\n```\n"
    )


def _header() -> str:
    return "---\nlibrary_name: smalti\npipeline_tag: text-to-image\ntags:\n- text-to-image\n- dall-e\n---"


def _model(card: Card) -> str:
    model, sizes = card.model, card.sizes
    kind = "the average of the weights over the last updates" if card.weights == "average" else "the weights"
    return (
        f"# A text-to-image transformer after {card.step:,} updates\n\n"
        f"Predicts the {sizes.grid}x{sizes.grid} codes of a picture from a caption, one after the other "
        "(Ramesh et al. 2021, arXiv 2102.12092), as `smalti train` makes it. "
        f"{card.n_parameters:,} parameters in {card.dtype}: {kind}.\n\n"
        "| layers | width | heads | text slots | caption vocabulary | picture codes |\n|---|---|---|---|---|---|\n"
        f"| {model.n_layers} | {model.d_model} | {model.n_heads} x {model.d_head} | {model.n_text} "
        f"| {sizes.text_vocab:,} | {sizes.codebook:,} |"
    )


def _data(card: Card) -> str:
    counts = "; ".join(f"{name}: {count:,}" for name, count in card.data.items()) or "not known any more"
    origin = _lines({f"fingerprint of {name}": value for name, value in card.made_from.items()})
    return f"## Training data\n\nSamples: {counts}.\n\n```\n{origin}\n```"


def _measured(card: Card) -> str:
    if not card.measured:
        return "## Measured\n\nNothing was measured up to this checkpoint."
    rows = "\n".join(f"| {name} | {value:.4g} |" for name, value in card.measured.items())
    note = "`val/` is on held-out samples, the last time they were measured; losses are nats per token."
    return f"## Measured\n\n| | |\n|---|---|\n{rows}\n\n{note}"


def _use(folder: Path) -> str:
    return (
        "## Use\n\nThe pictures are decoded by the dVAE that the tokens were made with (its fingerprint is above).\n\n"
        f"```\nsmalti sample model={folder.name} vocab={folder.name}/vocab dvae=runs/dvae captions=captions.txt\n```"
    )


def _limits(card: Card) -> str:
    guided = bool(card.settings.get("caption_dropout"))
    guidance = "Trained with empty captions too, so `cfg_scale` works." if guided else "`cfg_scale` cannot be used."
    return (
        "## Limits\n\n"
        f"- Captions of more than {card.model.n_text - 1} tokens are refused.\n"
        f"- {guidance}\n"
        "- It knows what its training data shows, with all that is missing or one-sided there; nothing filters what it "
        "draws.\n"
        "- Held-out losses say how well codes are predicted, not how well pictures look or fit their captions."
    )


def _lines(values: dict[str, Any]) -> str:
    return "\n".join(f"{name} = {value}" for name, value in values.items())
