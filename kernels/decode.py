"""Keys and values for drawing one slot at a time: of each layer, only what its pattern can still see.

Row and conv need the last reach + 1 image slots, a ring. Column needs its own column, a run of memory
in a store ordered by column. Text is seen by all, so it is stored once for all candidates of a caption,
whose queries then are the rows of one product. Order inside a ring is free: positions are in the
embeddings, not in the keys. Shapes do not change from slot to slot, and slots may be tensors, so that
one CUDA graph serves every step.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.layout import Sparsity
from kernels.reference import wide


@dataclass(frozen=True)
class Visit:
    """Where one image slot writes its key, which run of the store it reads, and what it sees there.

    Places are numbers where stores can then be read as views, and (1,) int64 tensors for a CUDA graph.
    """

    write: int | Tensor  # place in the store
    run: int | Tensor
    bias: Tensor  # (places in a run,), 0 or -inf


class Visits:
    """The visits of all image slots under one pattern, as tables; layers of a pattern share them."""

    def __init__(self, sparsity: Sparsity, like: Tensor) -> None:
        """like: the dtype and device of keys. `runs` x `length` places make up a store."""
        layout = sparsity.layout
        slot = torch.arange(layout.n_image)
        if sparsity.pattern == "column":
            self.runs, self.length = layout.columns, layout.rows
            run, place = slot % layout.columns, slot.div(layout.columns, rounding_mode="floor")
            seen = torch.arange(self.length) <= place[:, None]
        else:
            self.runs, self.length = 1, sparsity.reach + 1
            run, place = torch.zeros_like(slot), slot % self.length
            age = (slot[:, None] - torch.arange(self.length)) % self.length  # of what the ring holds there
            seen = sparsity.sees(age) & (age <= slot[:, None])
        self.places = (run * self.length + place).tolist()
        self.write = (run * self.length + place).to(like.device)
        self.run = run.to(like.device)
        self.bias = torch.zeros(seen.shape, dtype=like.dtype).masked_fill_(~seen, -torch.inf).to(like.device)

    def at(self, slot: int | Tensor) -> Visit:
        """The visit of an image slot, given as a number or as a (1,) int64 tensor."""
        if isinstance(slot, Tensor):
            return Visit(self.write[slot], self.run[slot], self.bias[slot][0])
        return Visit(self.places[slot], self.places[slot] // self.length, self.bias[slot])


class PatternCache:
    """Keys and values of one layer for C captions with N candidates each.

    Heads come first in memory, so that every product is one batched product over views.
    """

    def __init__(self, sparsity: Sparsity, visits: Visits, captions: int, candidates: int, like: Tensor) -> None:
        """like (H, D): the dtype and device of keys and values."""
        h, d = like.shape
        self.n_text = sparsity.layout.n_text
        self.captions, self.candidates, self.visits = captions, candidates, visits
        self.text_keys = like.new_zeros(h * captions, d, self.n_text)  # as the product with one query reads it
        self.text_values = like.new_zeros(h * captions, self.n_text, d)
        self.image = like.new_zeros(2, h * captions * candidates, visits.runs * visits.length, d)

    @property
    def n_bytes(self) -> int:
        return sum(store.numel() * store.element_size() for store in (self.text_keys, self.text_values, self.image))

    def fill(self, qkv: Tensor) -> None:
        """Store the first slots of each caption, all text and perhaps some image: qkv (C, T + n, 3, H, D)."""
        keys_values = qkv[:, :, 1:].permute(2, 3, 0, 1, 4)  # (2, H, C, T + n, D)
        keys, values = keys_values[:, :, :, : self.n_text].flatten(1, 2)
        self.text_keys.copy_(keys.transpose(1, 2))
        self.text_values.copy_(values)
        image = keys_values[:, :, :, self.n_text :]
        latest = {place: slot for slot, place in enumerate(self.visits.places[: image.shape[3]])}
        if latest:
            places = torch.tensor(list(latest), device=image.device)
            slots = torch.tensor(list(latest.values()), device=image.device)
            image = image[:, :, :, slots].repeat_interleave(self.candidates, 2)
            self.image.index_copy_(2, places, image.flatten(1, 2))

    def attend(self, qkv: Tensor, visit: Visit) -> Tensor:
        """Store one image slot of every candidate and attend from it: qkv (C N, 3, H, D) -> (C N, H, D)."""
        x, _, h, d = qkv.shape
        by_head = qkv.permute(1, 2, 0, 3).contiguous().view(3, h * x, 1, d)
        q, (keys, values) = by_head[0], self._store(by_head[1:], visit)
        rows, scale = (h * self.captions, self.candidates), d**-0.5
        text = torch.baddbmm(visit.bias[0], q.view(*rows, d), self.text_keys, beta=0, alpha=scale)
        image = torch.baddbmm(visit.bias, q, keys.transpose(1, 2), alpha=scale)
        weight = torch.cat([text.view(h * x, 1, self.n_text), image], 2).softmax(2, dtype=wide(q)).to(q.dtype)
        text, image = weight.split([self.n_text, image.shape[2]], 2)
        seen = torch.bmm(text.view(*rows, self.n_text), self.text_values).view(h * x, 1, d)
        return torch.baddbmm(seen, image, values).view(h, x, d).transpose(0, 1)

    def _store(self, keys_values: Tensor, visit: Visit) -> Tensor:
        """Write a slot's (2, H C N, 1, D) and give the run of the store that it reads, (2, H C N, places, D)."""
        length = self.visits.length
        if isinstance(visit.write, int):
            self.image.select(2, visit.write).copy_(keys_values[:, :, 0])
        else:
            self.image.index_copy_(2, visit.write, keys_values)
        if isinstance(visit.run, int):
            return self.image.narrow(2, visit.run * length, length)
        if self.visits.runs == 1:
            return self.image
        return self.image.unflatten(2, (self.visits.runs, length)).index_select(2, visit.run).squeeze(2)
