"""Settings of the discrete VAE: its shape, and how it is trained."""

from dataclasses import dataclass
from typing import Literal

from cluster.run import RunConfig
from cluster.settings import SettingError, require_at_least_one, section, setting
from data_pipeline.loader import LoaderConfig
from data_pipeline.remote import CacheConfig
from dvae.likelihood import Likelihood


@dataclass(frozen=True)
class DvaeConfig:
    """Shape of the encoder and decoder. The paper's is image_side=256, fold=1, width=256,
    n_groups=4, n_blocks=2, n_init=128, codebook=8192 (released code, encoder.py and decoder.py)."""

    image_side: int = setting(64, "pixels along a side of the square picture")
    fold: int = setting(1, "fold x fold pixels become channels before the first conv; 1 is the paper's")
    width: int = setting(64, "channels of the first group; group g has width * 2**g")
    n_groups: int = setting(4, "groups of blocks, the side halves between them")
    n_blocks: int = setting(2, "residual blocks a group")
    n_init: int = setting(128, "channels of a code's embedding at the decoder's entry")
    codebook: int = setting(1024, "number of codes (K)")

    def __post_init__(self) -> None:
        require_at_least_one(self, ("image_side", "fold", "width", "n_groups", "n_blocks", "n_init"), "model.")
        if self.width % 4:
            raise SettingError(f"model.width={self.width} must be a multiple of 4 (bottlenecks are a quarter wide)")
        if not 2 <= self.codebook <= 65_536:
            raise SettingError(f"model.codebook={self.codebook} must be from 2 to 65536 (codes are stored as uint16)")
        if self.image_side % self.reduction:
            raise SettingError(
                f"model.image_side={self.image_side} must be a multiple of fold * 2**(n_groups-1) = {self.reduction}"
            )

    @property
    def reduction(self) -> int:
        """Pixels of the picture along one side of a code."""
        return self.fold * 2 ** (self.n_groups - 1)

    @property
    def grid(self) -> int:
        """Codes along a side (G)."""
        return self.image_side // self.reduction


@dataclass(frozen=True)
class ScheduleConfig:
    """What changes with the step; the paper's values beside each (appendix A.2)."""

    lr: float = setting(1e-4, "first step size (1e-4)")
    final_lr: float = setting(1.25e-6, "last step size (1.25e-6)")
    lr_steps: int = setting(1_200_000, "updates from first to last step size (1200000)")
    temperature: float = setting(1.0, "first relaxation temperature (1)")
    final_temperature: float = setting(0.0625, "last relaxation temperature (1/16)")
    temperature_steps: int = setting(150_000, "updates from first to last temperature (150000)")
    kl_weight: float = setting(6.6, "last weight beta of the KL term, which rises from 0 (6.6)")
    kl_steps: int = setting(5_000, "updates until beta is reached (5000)")

    def __post_init__(self) -> None:
        if not 0 < self.final_temperature <= self.temperature:
            raise SettingError(
                f"schedule.final_temperature={self.final_temperature} must be above 0 and at most "
                f"schedule.temperature={self.temperature}"
            )


@dataclass(frozen=True)
class DvaeTrainConfig(RunConfig):
    """A run of the discrete VAE."""

    images: str = setting("data/images", "image shards, from `smalti preprocess`; several folders with :: between")
    heldout_images: str = setting("", "tars of held-out pictures, where `images` are not ours but any WebDataset tars")
    out: str = setting("runs/dvae", "run folder to write")
    n_steps: int = setting(3_000_000, "updates (the paper: 3000000)")
    seed: int = setting(0, "decides initial weights and noise")
    start: Literal["seeded", "paper"] = setting("paper", "seeded: linear codec and k-means codebook; paper: random")
    likelihood: Likelihood = setting(
        "logit-laplace", "of a pixel; logit-laplace: the paper's, of absolute errors; logit-normal: of squared errors"
    )
    min_log_scale: float = setting(-20.0, "floor of the Laplace's ln b; the paper has none")
    weight_decay: float = setting(1e-4, "AdamW's (the paper: 1e-4)")
    clip: float = setting(1.0, "global gradient norm")
    augment: Literal["none", "paper"] = setting(
        "none", "none: the middle square; paper: a random crop, shrunk (Listing 1), of pictures kept larger"
    )
    flip: bool = setting(True, "flip pictures at random")
    precision: Literal["fp32", "bf16", "fp16"] = setting(
        "fp32", "of convolutions, but the two next to the relaxation (the paper: fp16, with one loss scale)"
    )
    activation_checkpointing: Literal["none", "block"] = setting(
        "none", "block: keep the inputs of residual blocks and compute the rest again; changes no bit"
    )
    relaxation: Literal["gumbel", "straight-through"] = setting(
        "gumbel", "gumbel: relaxed codes in forward and backward, as the paper; straight-through: hard codes in forward"
    )
    average_decay: float = setting(0.0, "of the iterate average that is measured and released (0.999); 0 is none")
    collapse_below: float = setting(0.02, "share of the codebook, in use or as perplexity, below which codes collapse")
    collapse_after: int = setting(3, "held-out measurements in a row that are a collapse")
    on_collapse: Literal["warn", "stop"] = setting("warn", "warn: say what to change; stop: say it and end")
    fid_inception: str = setting("", "TorchScript file of an Inception: the finished run then tells its FID")
    evaluate_every: int = setting(1_000, "steps between held-out measurements")
    save_every: int = setting(1_000, "steps between checkpoints")
    model: DvaeConfig = section(DvaeConfig)
    schedule: ScheduleConfig = section(ScheduleConfig)
    data: LoaderConfig = section(LoaderConfig)
    cache: CacheConfig = section(CacheConfig)

    def __post_init__(self) -> None:
        if self.start == "seeded" and self.model.n_groups != 1:
            raise SettingError(
                f"start='seeded' needs a linear path, so model.n_groups=1, not {self.model.n_groups} (raise model.fold)"
            )
        super().__post_init__()
        require_at_least_one(self, ("n_steps", "collapse_after"))
        for name in ("average_decay", "collapse_below"):
            if not 0 <= getattr(self, name) < 1:
                raise SettingError(f"{name}={getattr(self, name)} must be at least 0 and below 1")
