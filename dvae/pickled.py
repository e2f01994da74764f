"""Reads a file of torch.save as data: the pickle in it is walked through, and nothing it names is called.

A pickle is a program, and loading one runs it. Here each instruction is interpreted on plain
values: objects become a class name with attributes, tensors become places in the file. A name
outside the few that such a file needs is refused before anything else happens. Both containers are
read: the zip archive (torch 1.6 and newer) and the older stream of pickles followed by raw numbers.
"""

import io
import math
import pickletools
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from cluster.settings import UserError

# what torch.save writes round the objects themselves (torch/serialization.py, torch/_utils.py)
ORDERED = "collections.OrderedDict"
TENSOR, PARAMETER = "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter"
DEVICE, SETS, FLOATS = "torch.device", ("__builtin__.set", "builtins.set"), "torch.FloatStorage"
KNOWN = frozenset((ORDERED, TENSOR, PARAMETER, DEVICE, FLOATS, *SETS))
FLOAT_BYTES = 4
ZIP_START = b"PK\x03\x04"
STREAM_MAGIC, STREAM_VERSION = 0x1950A86A20F9469CFC6C, 1001  # first two pickles of the older container

# instructions by what they do; argument: the instruction carries the value it pushes
ARGUMENT = frozenset(
    ("BININT", "BININT1", "BININT2", "INT", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "UNICODE")
)
CONSTANT = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
EMPTY: dict[str, Any] = {"EMPTY_TUPLE": tuple, "EMPTY_LIST": list, "EMPTY_DICT": dict}
SHORT_TUPLE = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


@dataclass(frozen=True)
class Name:
    """A class or function that the file refers to: its dotted name, never the thing."""

    text: str


@dataclass
class Thing:
    """An object of the file: the dotted name of its class, and its attributes."""

    kind: str
    state: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Storage:
    """A run of `count` float32 numbers in the file."""

    key: str
    count: int


@dataclass(frozen=True)
class Stored:
    """A tensor of the file, not read yet."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True)
class Pickled:
    """What a file holds: `root` of Things, dicts, lists, tuples, plain values and Stored; the numbers by key."""

    path: Path
    root: Any
    numbers: dict[str, bytes]

    def tensor(self, stored: Stored) -> Tensor:
        """The float32 tensor, contiguous; UserError if the file holds fewer numbers than it says."""
        with damage_named(self.path):
            data = self.numbers[stored.storage.key]
            if len(data) != stored.storage.count * FLOAT_BYTES or math.prod(stored.shape) > stored.storage.count:
                raise ValueError(f"{len(data)} bytes for {stored}")
            flat = torch.frombuffer(bytearray(data), dtype=torch.float32)
            return flat.as_strided(stored.shape, stored.stride, stored.offset).clone(
                memory_format=torch.contiguous_format
            )


@contextmanager
def damage_named(path: Path) -> Iterator[None]:
    """Whatever goes wrong inside is the file's fault, which may ask for anything: one UserError that names it."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else ""
        raise UserError(
            f"{path} is cut, damaged, or no file of torch.save ({type(error).__name__}: {reason})"
        ) from None


def read_pickled(path: Path, objects: frozenset[str]) -> Pickled:
    """Read a file of torch.save whose objects are of these classes (dotted names).

    UserError naming the file: if it refers to anything else (and then which), holds other numbers
    than little-endian float32, is cut or damaged. OSError if it cannot be opened.
    """
    with open(path, "rb") as file, damage_named(path):
        start = file.read(len(ZIP_START))
        file.seek(0)
        machine = _Machine(path, KNOWN | objects)
        return _read_zip(path, file, machine) if start == ZIP_START else _read_stream(path, file, machine)


def _read_zip(path: Path, file: IO[bytes], machine: "_Machine") -> Pickled:
    with zipfile.ZipFile(file) as archive:
        packed = next((info for info in archive.infolist() if info.compress_type != zipfile.ZIP_STORED), None)
        if packed:
            raise UserError(f"{path}: {packed.filename} is compressed, which torch.save does not do")
        (program,) = (name for name in archive.namelist() if name.endswith("/data.pkl") and name.count("/") == 1)
        folder = program.removesuffix("data.pkl")
        if f"{folder}byteorder" in archive.namelist() and archive.read(f"{folder}byteorder") != b"little":
            raise UserError(f"{path} was written on a big-endian machine")
        root = machine.run(io.BytesIO(archive.read(program)))
        data = f"{folder}data/"
        numbers = {name.removeprefix(data): archive.read(name) for name in archive.namelist() if name.startswith(data)}
    return Pickled(path, root, numbers)


def _read_stream(path: Path, file: IO[bytes], machine: "_Machine") -> Pickled:
    if machine.run(file) != STREAM_MAGIC or machine.run(file) != STREAM_VERSION:
        raise ValueError("its first words are others")
    if machine.run(file)["little_endian"] is not True:
        raise UserError(f"{path} was written on a big-endian machine")
    root, keys, numbers = machine.run(file), machine.run(file), {}
    for key in keys:
        size = int.from_bytes(file.read(8), "little") * FLOAT_BYTES
        numbers[key] = file.read(min(size, path.stat().st_size))  # fewer in a cut file: `tensor` counts them
    return Pickled(path, root, numbers)


class _Machine:
    """Interprets pickles of one file, one instruction at a time."""

    def __init__(self, path: Path, known: frozenset[str]) -> None:
        self.path, self.known = path, known
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def run(self, file: IO[bytes]) -> Any:
        """What the next pickle of the file describes; the file then stands behind it."""
        self.stack, self.marks, self.memo = [], [], {}
        for opcode, argument, _ in pickletools.genops(file):
            if opcode.name == "STOP":
                break
            self._obey(opcode.name, argument)
        return self.stack.pop()

    def _obey(self, instruction: str, argument: Any) -> None:
        stack = self.stack
        if instruction in ARGUMENT:
            stack.append(argument)
        elif instruction in CONSTANT:
            stack.append(CONSTANT[instruction])
        elif instruction in EMPTY:
            stack.append(EMPTY[instruction]())
        elif instruction in SHORT_TUPLE:
            stack.append(tuple(stack.pop() for _ in range(SHORT_TUPLE[instruction]))[::-1])
        else:
            self._obey_rarer(instruction, argument)

    def _obey_rarer(self, instruction: str, argument: Any) -> None:
        stack = self.stack
        match instruction:
            case "PROTO" | "FRAME":
                pass
            case "MARK":
                self.marks.append(len(stack))
            case "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(self.memo[argument])
            case "GLOBAL" | "INST":
                stack.append(self._named(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                attribute, module = stack.pop(), stack.pop()
                stack.append(self._named(module, attribute))
            case "TUPLE":
                stack.append(tuple(self._since_mark()))
            case "APPEND" | "APPENDS":
                items = self._since_mark() if instruction == "APPENDS" else [stack.pop()]
                stack[-1].extend(items)
            case "SETITEM" | "SETITEMS":
                items = self._since_mark() if instruction == "SETITEMS" else [stack.pop(), stack.pop()][::-1]
                stack[-1].update(zip(items[::2], items[1::2], strict=True))
            case "BINPERSID":
                stack.append(self._persistent(stack.pop()))
            case "REDUCE" | "NEWOBJ":
                arguments, maker = stack.pop(), stack.pop()
                stack.append(self._made(maker, arguments))
            case "BUILD":
                state = stack.pop()
                if isinstance(stack[-1], Thing):  # else the attributes of an OrderedDict, which nobody reads
                    stack[-1].state.update(state)
            case _:
                raise UserError(f"{self.path} uses the pickle instruction {instruction}, which torch.save does not")

    def _since_mark(self) -> list[Any]:
        mark = self.marks.pop()
        items = self.stack[mark:]
        del self.stack[mark:]
        return items

    def _named(self, module: Any, attribute: Any) -> Name:
        name = f"{module}.{attribute}"
        if name not in self.known:
            raise UserError(f"{self.path} refers to {name!r}, which the published weights do not need; nothing was run")
        return Name(name)

    def _persistent(self, words: Any) -> Storage | Name:
        match words:
            case ("storage", Name(), str(key), str(), int(count), *view) if view in ([], [None]):
                return Storage(key, count)  # of float32: no other class of storage is known
            case ("module", Name() as name, *_):  # the older container adds the source text of each class
                return name
        raise UserError(f"{self.path} holds a storage of a kind that the published weights do not have")

    def _made(self, maker: Any, arguments: Any) -> Any:
        match (maker, arguments):
            case (Name(text=name), ()) if name not in KNOWN:
                return Thing(name)
            case (Name(text=name), ()) if name == ORDERED:
                return {}
            case (Name(text=name), _) if name == DEVICE or name in SETS:
                return None
            case (Name(text=name), (Stored() as tensor, *_)) if name == PARAMETER:
                return tensor
            case (Name(text=name), (Storage() as storage, int(offset), tuple(shape), tuple(stride), *_)):
                if name == TENSOR and all(type(number) is int for number in shape + stride):
                    return Stored(storage, offset, shape, stride)
        raise UserError(f"{self.path} makes an object in a way that torch.save does not")
