"""A copy in host memory of the state that a checkpoint holds, and its files, written later.

Training waits only while the state is copied; from then on it may change it again. A SnapshotWriter
stands where DeepSpeed's engine has its `checkpoint_engine`, or takes states by `save` from any trainer.
"""

import copy
import hashlib
import io
import os
from collections import OrderedDict
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

BLOCK_BYTES = 2**28  # of host memory, a power of two: torch rounds pinned memory up to one
ALIGNED_BYTES = 64


class SnapshotWriter:
    """Takes states with `save`, and writes them with `write_out`. The memory of one snapshot serves the next.

    The other methods are those that DeepSpeed (0.19) calls of a checkpoint engine; they do nothing, for the
    folder is made, sealed and pointed at by `Checkpoints`. No call fails: a rank that fails alone inside
    DeepSpeed's collective `save_checkpoint` would leave the others waiting. `problem` says what went wrong.
    """

    def __init__(self, writes: bool = True) -> None:
        """writes=False: for a rank whose state another one saves; it keeps nothing."""
        self.writes = writes
        self.problem = ""
        self.reader: Any = None  # DeepSpeed's own checkpoint engine, if it is to read
        self.memory = HostMemory()
        self._taken: list[tuple[Path, Any]] = []
        self._met: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = {}

    def clear(self) -> None:
        """Begin a snapshot; the one before must be written."""
        self.problem, self._taken = "", []
        self.memory.clear()

    def save(self, state_dict: Any, path: str) -> None:
        """Copy a state (dicts, lists and tuples of tensors and small things) that is to be the file `path`."""
        if not self.writes or self.problem:
            return
        try:
            self._met = {}
            self._taken.append((Path(path), self._copied(state_dict)))
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
        except Exception as error:  # see the class
            self.problem = f"{path} cannot be copied into memory: {first_line(error)}"
        finally:
            self._met = {}

    def write_out(self) -> dict[str, dict[str, Any]]:
        """Write what was taken, flushed to the disk: path -> its "bytes" and "sha256". OSError, RuntimeError."""
        records = {}
        try:
            for path, state in self._taken:
                path.parent.mkdir(parents=True, exist_ok=True)
                with open(path, "wb", buffering=0) as file:
                    out = _Digesting(file)
                    torch.save(state, out)  # type: ignore[arg-type]
                    os.fsync(file.fileno())
                records[str(path)] = {"bytes": out.n_bytes, "sha256": out.digest.hexdigest()}
        except (OSError, RuntimeError) as error:
            for path, _ in self._taken:  # leaves room on a full disk to say so
                path.unlink(missing_ok=True)
            cause = error.__context__  # torch.save hides the disk's own words behind its own
            raise cause if isinstance(cause, OSError) else error from None
        finally:
            self._taken = []
        return records

    def _copied(self, value: Any) -> Any:
        """The same structure in containers of its own, which training does not change."""
        if isinstance(value, Tensor):
            return self._on_host(value)
        if isinstance(value, OrderedDict):
            new = OrderedDict((key, self._copied(inner)) for key, inner in value.items())
            new.__dict__.update(value.__dict__)  # the versions that a module's state_dict carries
            return new
        if type(value) is dict:
            return {key: self._copied(inner) for key, inner in value.items()}
        if type(value) in (list, tuple):
            return type(value)(self._copied(inner) for inner in value)
        if isinstance(value, Enum):
            return value.value  # plain, so that the file loads with weights_only
        return copy.deepcopy(value)

    def _on_host(self, tensor: Tensor) -> Tensor:
        """The tensor in host memory, where what is shared stays shared and views are stored without the rest."""
        tensor = tensor.detach()
        key = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor.device)
        if tensor.numel() == 0:
            return torch.empty(tensor.shape, dtype=tensor.dtype)
        if key not in self._met:
            host = self.memory.take(tensor.numel() * tensor.element_size(), tensor.is_cuda)
            host = host.view(tensor.dtype).view(tensor.shape)
            host.copy_(tensor, non_blocking=True)
            self._met[key] = host, tensor  # the tensor lives as long as its address is a key
        return self._met[key][0]

    def create(self, info: Any) -> None:
        """DeepSpeed: a checkpoint begins."""

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """DeepSpeed: make a folder."""

    def commit(self, info: Any) -> bool:
        """DeepSpeed: a checkpoint ends."""
        return True

    def cleanup(self) -> None:
        """DeepSpeed: the engine ends."""

    def is_decoupled(self) -> bool:
        """DeepSpeed: false, or it would commit at its own time, collectively."""
        return False

    def is_data_parallel_writer(self, rank: int) -> bool:
        """DeepSpeed: who saves what all ranks hold alike."""
        return rank == 0

    def preserves_storage_sharing(self) -> bool:
        """DeepSpeed: false, for views are copied here without the rest of their storage."""
        return False

    def load(self, path: str, map_location: Any = None) -> Any:
        """DeepSpeed: read a file, in its own way."""
        return self.reader.load(path, map_location=map_location)


class HostMemory:
    """Blocks of host memory, dealt out from the first on and again after `clear`."""

    def __init__(self) -> None:
        self._blocks: list[Tensor] = []  # (bytes,) uint8
        self._number = self._at = 0  # of the block dealt from, and where in it

    @property
    def n_bytes(self) -> int:
        return sum(len(block) for block in self._blocks)

    def clear(self) -> None:
        """Everything that was dealt is free again; blocks that were not needed go."""
        del self._blocks[self._number + 1 :]
        self._number = self._at = 0

    def take(self, n_bytes: int, pinned: bool) -> Tensor:
        """(n_bytes,) uint8, a storage of its own. pinned: what a new block would be. RuntimeError without memory."""
        while self._number < len(self._blocks) and self._at + n_bytes > len(self._blocks[self._number]):
            self._number, self._at = self._number + 1, 0
        if self._number == len(self._blocks):
            self._blocks.append(_new_block(max(n_bytes, BLOCK_BYTES), pinned))
        block, start = self._blocks[self._number], self._at
        self._at = start + n_bytes + -n_bytes % ALIGNED_BYTES
        return torch.frombuffer(block.numpy(), dtype=torch.uint8, count=n_bytes, offset=start)


def _new_block(n_bytes: int, pinned: bool) -> Tensor:
    if pinned:
        try:
            return torch.empty(n_bytes, dtype=torch.uint8, pin_memory=True)
        except RuntimeError:  # there is a limit to it; without, copies are slower
            pass
    return torch.empty(n_bytes, dtype=torch.uint8)


class _Digesting(io.RawIOBase):
    """A file that counts and digests what passes."""

    def __init__(self, file: io.FileIO) -> None:
        self.file, self.digest, self.n_bytes = file, hashlib.sha256(), 0

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        left = view
        while left:
            left = left[self.file.write(left) :]
        self.digest.update(view)
        self.n_bytes += view.nbytes
        return view.nbytes


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__
