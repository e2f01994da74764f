"""Frechet distance between two sets of pictures in the features of a given network (Heusel et al. 2017, FID).

The network is a file of the user's, as none is shipped: a TorchScript module of (N, 3, P, P) uint8 pixels that
answers (N, D) features, such as the `inception-2015-12-05.pt` that goes with StyleGAN, which scales them itself.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cluster.process import Place, gathered
from cluster.settings import UserError

BATCH = 32
FLAG = "return_features"  # of StyleGAN's file: features instead of the probabilities of classes


class Features:
    """The network of a file."""

    def __init__(self, path: Path, device: torch.device) -> None:
        """UserError if it is no TorchScript module."""
        try:
            self.network: Any = torch.jit.load(str(path), map_location=device).eval()
            names = [argument.name for argument in self.network.forward.schema.arguments]
        except (OSError, RuntimeError, ValueError, AttributeError) as error:
            reason = (str(error).strip().splitlines() or ["it is empty"])[0]
            raise UserError(f"fid_inception={path} is no TorchScript module that can be read: {reason}") from None
        self.device, self._options = device, {FLAG: True} if FLAG in names else {}

    @torch.no_grad()
    def of(self, pixels: Tensor, place: Place) -> Tensor:
        """(n, D) float64 features of all ranks' pictures (N, 3, P, P) in [0, 1]."""
        parts = ((part * 255).round().to(self.device, torch.uint8) for part in pixels.split(BATCH) if len(part))
        found = [self.network(part, **self._options).double().cpu() for part in parts]
        return torch.cat([part for rank in gathered(place, found) for part in rank])


def frechet_distance(ours: Tensor, theirs: Tensor) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of features (n, D), in float64.

    The trace of the root is the sum of the roots of the eigenvalues of C1^(1/2) C2 C1^(1/2), which is symmetric.
    """
    (m1, c1), (m2, c2) = _moments(ours), _moments(theirs)
    values, vectors = torch.linalg.eigh(c1)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ c2 @ root).clamp(min=0).sqrt().sum()
    return ((m1 - m2).square().sum() + c1.trace() + c2.trace() - 2 * cross).item()


def _moments(features: Tensor) -> tuple[Tensor, Tensor]:
    return features.mean(0), torch.atleast_2d(features.double().T.cov())
