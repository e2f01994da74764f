"""One update of a model with random weights on a random batch: what the benchmarks of a training step time."""

import torch
from torch import Tensor

from pretrain.config import OptimConfig, TransformerConfig
from pretrain.model import Recompute, Sizes, Transformer, text_image_loss
from pretrain.optim import decay_groups

TEXT_WEIGHT = 0.125  # of the loss (Ramesh et al. 2021, section 2.2)


class Update:
    """A model and its AdamW on one device, with weights, gradients and moments in one dtype."""

    def __init__(
        self,
        config: TransformerConfig,
        sizes: Sizes,
        batch: int,
        device: torch.device,
        dtype: torch.dtype,
        recompute: Recompute = "none",
    ) -> None:
        self.model = random_model(config, sizes, device, dtype, recompute)
        optim = OptimConfig()
        self.optimizer = torch.optim.AdamW(decay_groups(self.model, optim.weight_decay), lr=optim.lr, fused=True)
        self.text = torch.randint(sizes.text_vocab, (batch, config.n_text - 1), device=device)
        self.image = torch.randint(sizes.codebook, (batch, sizes.grid**2), device=device)

    def __call__(self) -> Tensor:
        """Forward, loss, backward, AdamW; the loss."""
        self.optimizer.zero_grad(set_to_none=True)
        of_text, of_image = self.model(self.text, self.image)
        n_words = float(self.text.numel())
        loss = text_image_loss(of_text, of_image, self.text, self.image, TEXT_WEIGHT, n_words).total
        loss.backward()
        self.optimizer.step()
        return loss.detach()


def random_model(
    config: TransformerConfig, sizes: Sizes, device: torch.device, dtype: torch.dtype, recompute: Recompute = "none"
) -> Transformer:
    """Made on the device itself, for a CPU needs a minute for a billion random numbers."""
    torch.manual_seed(0)
    with device:
        return Transformer(config, sizes, recompute=recompute).to(dtype)
