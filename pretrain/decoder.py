"""Logits of one image slot after the other, for many captions with many candidates each.

Text is read once a caption, with whatever codes lead the picture; from then on each step costs the
model's linear layers and a look at the slots that its patterns still see (kernels/decode.py).
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from data_pipeline.loader import PAD
from kernels.attention import attention
from kernels.decode import PatternCache, Visits
from kernels.layout import Layout, Sparsity
from pretrain.model import Transformer


class Decoder:
    """Steps a transformer through the image slots of C captions x N candidates.

    With guidance, each caption is followed by an empty one, and logits are empty + scale * (caption -
    empty) (Ho and Salimans 2021, arXiv 2207.12598; in this form Nichol et al. 2021, section 2.3).
    """

    def __init__(self, model: Transformer, text: Tensor, candidates: int, cfg_scale: float = 1.0) -> None:
        """text (C, T-1) ids with PAD. cfg_scale = 1 is without guidance."""
        self.model, self.candidates, self.cfg_scale = model, candidates, cfg_scale
        self.text = text if cfg_scale == 1 else torch.cat([text, torch.full_like(text, PAD)])
        config, like = model.config, model.row.weight
        like = like.new_empty(config.n_heads, config.d_head)
        self.sparsities = model.sparsities(model.layout)
        self.visits = {sparsity: Visits(sparsity, like) for sparsity in self.sparsities}
        self.caches = [PatternCache(s, self.visits[s], len(self.text), candidates, like) for s in self.sparsities]
        self._step: Callable[..., Tensor] = self._compute
        self._graph = text.is_cuda

    @property
    def cache_bytes(self) -> int:
        return sum(cache.n_bytes for cache in self.caches)

    def read(self, known: Tensor) -> None:
        """Take in the captions and, for each, its first n image codes: known (C, n), n may be 0."""
        n, grid = known.shape[1], self.model.sizes.grid
        known = F.pad(known, (0, -n % grid)).repeat(len(self.text) // len(known), 1)

        def attend(qkv: Tensor, sparsity: Sparsity, cache: PatternCache) -> Tensor:
            cache.fill(qkv[:, : sparsity.layout.n_text + n])
            return attention(qkv, sparsity)

        self._rows(self.text, known, [partial(attend, cache=cache) for cache in self.caches])

    def _rows(self, text: Tensor, codes: Tensor, attends: Sequence[Callable[..., Tensor]]) -> Tensor:
        """One pass over the text and the first rows of codes (C, rows x G): (C, T + rows x G, M) hidden states."""
        slots = torch.arange(codes.shape[1], device=codes.device)
        before = F.pad(codes[:, :-1], (1, 0)) if len(slots) else codes
        x = torch.cat([self.model.embed_text(text), self.model.embed_image(before, slots)], 1)
        grid = self.model.sizes.grid
        layout = Layout(self.model.layout.n_text, codes.shape[1] // grid, grid)
        sparsities = self.model.sparsities(layout) if len(slots) else [Sparsity("dense", layout)] * len(self.caches)
        return self.model.hidden(x, [partial(a, sparsity=s) for a, s in zip(attends, sparsities, strict=True)])

    def step(self, before: Tensor, slot: int) -> Tensor:
        """Logits (C N, K) of image slot `slot`, the codes before it being `before` (C N,). Slots come in order."""
        at = torch.tensor([slot], device=before.device)
        if self._graph and self._step == self._compute:
            self._step = Replay(self._compute, before, at)
        return self._step(before, at)

    def whole(self, codes: Tensor, candidate: int, slot: int) -> Tensor:
        """The same logits (K,) of one candidate alone, codes (I,), from one pass over its rows up to the slot's:
        whatever stands beside it in the batch, these are the same bits."""
        grid, captions = self.model.sizes.grid, len(self.text) // (1 if self.cfg_scale == 1 else 2)
        rows = codes[None, : (slot // grid + 1) * grid]
        logits = []
        for text in self.text[candidate // self.candidates :: captions]:
            hidden = self._rows(text[None], rows, [attention] * len(self.caches))
            logits.append(self.model.image_head(hidden[0, self.model.layout.n_text + slot]).float())
        return self._guided(torch.stack(logits))[0]

    def _compute(self, before: Tensor, slot: Tensor) -> Tensor:
        at = slot if self._graph else int(slot)
        visits = {sparsity: visits.at(at) for sparsity, visits in self.visits.items()}
        attends = [
            partial(cache.attend, visit=visits[sparsity])
            for cache, sparsity in zip(self.caches, self.sparsities, strict=True)
        ]
        before = before.repeat(1 if self.cfg_scale == 1 else 2)
        x = self.model.embed_image(before[:, None], slot)[:, 0]
        return self._guided(self.model.image_head(self.model.hidden(x, attends)).float())

    def _guided(self, logits: Tensor) -> Tensor:
        if self.cfg_scale == 1:
            return logits
        caption, empty = logits.chunk(2)
        return empty + self.cfg_scale * (caption - empty)


class Replay:
    """A function of tensors recorded once as a CUDA graph: one launch for its some thousand kernels."""

    def __init__(self, function: Callable[..., Tensor], *inputs: Tensor) -> None:
        """Runs the function some times on copies of the inputs: what it writes must not add up."""
        self.inputs = [value.clone() for value in inputs]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                function(*self.inputs)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.output = function(*self.inputs)

    def __call__(self, *inputs: Tensor) -> Tensor:
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given)
        self.graph.replay()
        return self.output
