"""Settings of the transformer: its shape, its optimiser, and how it is trained."""

from dataclasses import dataclass
from typing import Literal

from cluster.power_sgd import PowerSGDConfig
from cluster.run import RunConfig
from cluster.settings import SettingError, require_at_least_one, section, setting
from data_pipeline.loader import LoaderConfig
from data_pipeline.remote import CacheConfig
from data_pipeline.shares import check_share
from pretrain.precision import Precision


@dataclass(frozen=True)
class TransformerConfig:
    """Shape. The paper's is n_layers=64, n_heads=62, d_head=64, n_text=256 (section 2.2, B.1)."""

    n_text: int = setting(256, "text slots, start-of-text included (T)")
    n_layers: int = setting(12, "attention + MLP pairs (L)")
    n_heads: int = setting(8, "heads (H)")
    d_head: int = setting(64, "width of a head (D)")
    conv_kernel: int = setting(11, "odd side of the last layer's conv pattern")
    conv_half_window: bool = setting(False, "conv sees the plain upper half of its window; false: figure 11's rule")

    def __post_init__(self) -> None:
        require_at_least_one(self, ("n_layers", "n_heads", "d_head", "conv_kernel"), "model.")
        if self.n_text < 2:
            raise SettingError(f"model.n_text={self.n_text} must be at least 2: start-of-text and one token")
        if self.conv_kernel % 2 == 0:
            raise SettingError(f"model.conv_kernel={self.conv_kernel} must be odd")

    @property
    def d_model(self) -> int:
        """Width of the residual stream (M = H D)."""
        return self.n_heads * self.d_head


@dataclass(frozen=True)
class AdamConfig:
    """AdamW, clipping, and a step size that ramps up and goes down a cosine."""

    lr: float = setting(4.5e-4, "peak step size (the paper: 4.5e-4)")
    warmup_steps: int = setting(100, "linear ramp to the peak (the paper: 5000)")
    final_lr: float = setting(0.1, "cosine: fraction of the peak that it ends at")
    beta1: float = setting(0.9, "decay of the mean")
    beta2: float = setting(0.96, "decay of the variance (the paper: 0.96)")
    eps: float = setting(1e-8, "added to the root of the variance")
    weight_decay: float = setting(4.5e-2, "on matrices, not on gains, biases or embeddings (the paper: 4.5e-2)")
    clip: float = setting(4.0, "global gradient norm (the paper: 4)")


@dataclass(frozen=True)
class OptimConfig(AdamConfig):
    """The transformer's optimiser. The paper's values where it states them (Ramesh et al. 2021, B.2)."""

    schedule: Literal["cosine", "constant", "plateau"] = setting("cosine", "after the ramp (the paper: plateau)")
    halvings: int = setting(5, "plateau: times the step size is halved (the paper: 5)")
    plateau_window: int = setting(1000, "plateau: updates whose losses are averaged")
    plateau_patience: int = setting(10, "plateau: windows without a better mean before a halving")
    plateau_threshold: float = setting(0.002, "plateau: what share of the loss counts as better")
    moments: Literal["fp32", "bf16", "16-bit"] = setting(
        "fp32", "how resblocks' matrices keep theirs; 16-bit: 1-6-9 for means, 0-6-10 for variances (the paper)"
    )
    variance_clip: float = setting(0.0, "largest running variance, 0: no limit (the paper: 5)")
    average_every: int = setting(0, "updates between copies into the averaged weights, 0: none (the paper: 25)")
    average_decay: float = setting(0.99, "of the average at each copy (the paper: 0.99)")


@dataclass(frozen=True)
class TrainConfig(RunConfig):
    """A run of the transformer."""

    tokens: str = setting("data/tokens", "token shards, from `smalti tokenise`; several folders with :: between")
    vocab: str = setting("data/vocab", "the BPE, from `smalti preprocess`")
    out: str = setting("runs/train", "run folder to write")
    dry_run: bool = setting(False, "show parameters, shards, memory and DeepSpeed's settings of the run, and stop")
    json: bool = setting(False, "dry_run: as JSON")
    n_steps: int = setting(1000, "updates")
    seed: int = setting(0, "decides the initial weights")
    precision: Precision = setting(
        "auto",
        "auto: bf16 where the device computes in it, else fp32; fp16-resblock: float16 branches, each with its own "
        "gradient scale (the paper); fp16-global: one scale for all",
    )
    attention: Literal["auto", "triton", "cpu", "dense"] = setting(
        "auto", "what computes attention; auto: the fastest on the device; dense: all scores, under a mask"
    )
    activation_checkpointing: Literal["none", "attention", "resblock"] = setting(
        "none", "resblocks whose activations the backward pass computes again instead of keeping them"
    )
    compile: bool = setting(False, "torch.compile the MLP resblocks: a slow start, faster steps on a GPU")
    accumulate: int = setting(1, "parts of a batch whose gradients are added up before an update")
    zero_stage: int = setting(1, "DeepSpeed ZeRO shards: 1 optimiser states, 2 and gradients, 3 and weights")
    zero_shards: int = setting(
        0,
        "processes that share one copy of the state, as those of a node do; other such groups hold replicas; 0: all",
    )
    offload_optimizer: bool = setting(False, "optimiser states and their update on the CPU")
    offload_activations: bool = setting(False, "activations that activation_checkpointing keeps wait on the CPU")
    on_overflow: Literal["update", "block"] = setting(
        "update", "what a float16 overflow leaves out: the whole update (the paper), or its resblock's"
    )
    on_spike: Literal["log", "skip"] = setting(
        "log", "a loss or gradient norm far above those before it is told, or its update is left out as well"
    )
    on_bad_numbers: Literal["skip", "rollback", "stop"] = setting(
        "skip", "an update with an Inf or NaN is left out; rollback: the run also goes on from its last checkpoint"
    )
    text_weight: float = setting(0.125, "share of the text loss; the image has the rest (the paper: 1/8)")
    bpe_dropout: float = setting(0.1, "chance to skip a BPE merge in training (the paper: 0.1)")
    caption_dropout: float = setting(
        0.1, "chance to train on an empty caption, which `smalti sample cfg_scale=...` needs (the paper: 0)"
    )
    model: TransformerConfig = section(TransformerConfig)
    optim: OptimConfig = section(OptimConfig)
    power_sgd: PowerSGDConfig = section(PowerSGDConfig)
    data: LoaderConfig = section(LoaderConfig)
    cache: CacheConfig = section(CacheConfig)

    def __post_init__(self) -> None:
        if self.zero_shards and self.zero_stage != 3:
            raise SettingError(f"zero_shards={self.zero_shards} needs zero_stage=3: its shards are rows of matrices")
        if self.zero_shards and self.on_overflow == "block":
            raise SettingError("on_overflow=block does not go with zero_shards: replicas leave out whole updates only")
        if self.power_sgd.rank and self.offload_optimizer:
            raise SettingError(
                f"power_sgd.rank={self.power_sgd.rank} and offload_optimizer=true do not go together: updates are made "
                "from the factors, where these are"
            )
        if self.zero_stage not in (1, 2, 3):
            raise SettingError(f"zero_stage={self.zero_stage} must be 1, 2 or 3")
        super().__post_init__()
        require_at_least_one(self, ("n_steps", "accumulate"))
        if self.offload_activations and self.activation_checkpointing == "none":
            raise SettingError("offload_activations=true needs activation_checkpointing=resblock or attention")
        if not 0 < self.text_weight < 1:
            raise SettingError(f"text_weight={self.text_weight} must be between 0 and 1")
        if not 0 <= self.bpe_dropout < 1:
            raise SettingError(f"bpe_dropout={self.bpe_dropout} must be at least 0 and below 1")
        if not 0 <= self.caption_dropout < 1:
            raise SettingError(f"caption_dropout={self.caption_dropout} must be at least 0 and below 1")


@dataclass(frozen=True)
class ScorerConfig:
    """Shape of the contrastive scorer."""

    image_side: int = setting(64, "pixels along a side of the picture")
    fold: int = setting(4, "fold x fold pixels become channels first")
    width: int = setting(96, "channels of the first stage; the next two have twice as many")
    n_text: int = setting(16, "text slots")
    n_layers: int = setting(2, "layers of the text tower")
    n_heads: int = setting(4, "heads of the text tower, 32 wide each")
    embed: int = setting(128, "width of the shared space")

    def __post_init__(self) -> None:
        if self.width % 8:
            raise SettingError(f"model.width={self.width} must be a multiple of 8 (groups of the normalisation)")
        if self.image_side % (4 * self.fold):
            raise SettingError(f"model.image_side={self.image_side} must be a multiple of 4 * fold = {4 * self.fold}")


@dataclass(frozen=True)
class ScorerTrainConfig(RunConfig):
    """A run of the scorer."""

    images: str = setting("data/images", "image shards, from `smalti preprocess`; several folders with :: between")
    vocab: str = setting("data/vocab", "the BPE, from `smalti preprocess`")
    out: str = setting("runs/scorer", "run folder to write")
    n_steps: int = setting(1000, "updates")
    seed: int = setting(0, "decides the initial weights")
    shift: int = setting(4, "pixels by which pictures are moved at random")
    bpe_dropout: float = setting(0.1, "chance to skip a BPE merge in training")
    evaluate_every: int = setting(100, "steps between held-out measurements")
    model: ScorerConfig = section(ScorerConfig)
    optim: AdamConfig = section(AdamConfig)
    data: LoaderConfig = section(LoaderConfig)
    cache: CacheConfig = section(CacheConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least_one(self, ("n_steps",))


@dataclass(frozen=True)
class SampleConfig:
    """What is drawn, and how."""

    captions: str = setting("", "text file with one caption a line, or one caption")
    model: str = setting("runs/train", "trained transformer")
    dvae: str = setting("runs/dvae", "the dVAE its tokens were made with")
    vocab: str = setting("data/vocab", "the BPE its captions were read with")
    out: str = setting("samples", "folder to write")
    candidates: int = setting(16, "pictures a caption (the paper: 512)")
    temperature: float = setting(1.0, "divides the logits; the paper samples at 1")
    top_k: int = setting(0, "keep only the k likeliest codes; 0 keeps all")
    top_p: float = setting(1.0, "keep the likeliest codes that make up this probability; 1 keeps all")
    cfg_scale: float = setting(
        1.0, "classifier-free guidance: 1 is none, 3 is usual; needs caption_dropout in training"
    )
    prime: str = setting("", "picture whose codes begin each candidate; what is transparent in it is drawn")
    prime_rows: int = setting(0, "only its top rows of codes (the paper: 15 of 32); 0 is all that is opaque")
    preview: bool = setting(False, "write OUT/preview.png after each row of codes")
    seed: int = setting(0, "with the caption and the candidate's number decides the picture")
    precision: Literal["auto", "fp32", "bf16"] = setting(
        "auto", "auto: bf16 on a GPU that computes in it, else fp32; only in fp32 is a picture the same in any batch"
    )
    batch: int = setting(64, "pictures drawn at a time; changes nothing but speed and memory")
    tasks: int = setting(0, "so many tasks share the work, each with its task=; the same words without both end it")
    task: int = setting(-1, "number of this task, from 0; it does its share and no more")

    def __post_init__(self) -> None:
        require_at_least_one(self, ("candidates", "batch"))
        check_share(self.tasks, self.task)
        if self.tasks and self.task < 0:
            raise SettingError(f"tasks={self.tasks} needs task=0 to task={self.tasks - 1}, the share to do now")
        if self.temperature <= 0:
            raise SettingError(f"temperature={self.temperature} must be above 0")
        if self.top_k < 0:
            raise SettingError(f"top_k={self.top_k} must be at least 0")
        if not 0 < self.top_p <= 1:
            raise SettingError(f"top_p={self.top_p} must be above 0 and at most 1")
        if self.cfg_scale < 0:
            raise SettingError(f"cfg_scale={self.cfg_scale} must be at least 0")
        if self.prime_rows < 0 or (self.prime_rows and not self.prime):
            raise SettingError(f"prime_rows={self.prime_rows} must be at least 0, and needs prime=PICTURE")


@dataclass(frozen=True)
class RerankConfig:
    """What is ranked, and by what."""

    samples: str = setting("samples", "pictures, from `smalti sample`")
    scorer: str = setting("runs/scorer", "trained contrastive model")
    vocab: str = setting("data/vocab", "the BPE it reads captions with")
    out: str = setting("ranked", "folder to write, best first")
    keep: int = setting(0, "pictures kept a caption; 0 keeps all")

    def __post_init__(self) -> None:
        if self.keep < 0:
            raise SettingError(f"keep={self.keep} must be at least 0")
