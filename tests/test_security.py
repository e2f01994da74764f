"""What comes from outside cannot run code, leave its folder, fill the memory or steer the terminal.

Each danger goes in by the door a user has. Two have tests of their own: published dVAE weights
(tests/dvae/test_openai.py) and manifests of remote folders (tests/data_pipeline/test_remote.py).
"""

import ast
import gzip
import io
import json
import os
import pickle
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from cluster.command import run_command
from cluster.manifest import FolderError
from cluster.settings import UserError
from cluster.weights import STATE, WEIGHTS, load_state, load_weights
from data_pipeline import shards
from data_pipeline.bpe import open_vocabulary
from data_pipeline.foreign import open_foreign
from data_pipeline.images import MAX_PIXELS, ImageProblem, decode, square
from data_pipeline.loader import tokens_batch
from data_pipeline.preprocess import COMMAND
from data_pipeline.shards import Sample, ShardError, open_shard, plain_key, write_shard
from tests.pairs import make_pairs, pair_members, picture, write_tar

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("cluster", "kernels", "data_pipeline", "dvae", "pretrain")
CLEAR_SCREEN = "\x1b[2J"


class Source:
    """A folder `in` of pairs, and what `smalti preprocess` says and makes of it."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self.out, self.capsys = folder / "in", folder / "out", capsys
        self.folder.mkdir()

    def preprocess(self, source: str = "") -> tuple[int, str]:
        """Exit code, and what was printed to stderr."""
        words = [f"source={source or self.folder}", f"out={self.out}", "vocab_size=300", "heldout_fraction=0"]
        code = run_command(COMMAND, words)
        return code, self.capsys.readouterr().err

    @property
    def fates(self) -> dict[str, int]:
        return json.loads((self.out / "report.json").read_text())


@pytest.fixture
def source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Source:
    return Source(tmp_path, capsys)


class Bomb:
    """Unpickled, it makes a folder of that name."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., None], tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.fixture
def bomb(tmp_path: Path) -> tuple[bytes, Path]:
    """A pickle, and the folder that is there if it was loaded."""
    pickle.loads(pickle.dumps(Bomb(tmp_path / "works")))
    assert (tmp_path / "works").is_dir()
    return pickle.dumps(Bomb(tmp_path / "loaded")), tmp_path / "loaded"


def test_a_pickle_in_the_place_of_codes_is_refused(data: Path, bomb: tuple[bytes, Path]) -> None:
    vocabulary, _ = open_vocabulary(data / "vocab")
    with pytest.raises((UserError, ValueError), match="npy|pickle"):
        tokens_batch([Sample("k", {"npy": bomb[0], "txt": b"a"})], vocabulary, 8, 0.0, 0, range(1))
    assert not bomb[1].exists()


def test_a_pickle_in_the_place_of_weights_is_refused(tmp_path: Path, bomb: tuple[bytes, Path]) -> None:
    (tmp_path / WEIGHTS).write_bytes(bomb[0])
    with pytest.raises(FolderError, match=f"{WEIGHTS} cannot be read"):
        load_weights(tmp_path, torch.nn.Linear(1, 1))
    assert not bomb[1].exists()


def test_a_pickle_in_the_place_of_a_state_is_refused(tmp_path: Path, bomb: tuple[bytes, Path]) -> None:
    model = torch.nn.Linear(1, 1)
    (tmp_path / STATE).write_bytes(pickle.dumps(Bomb(bomb[1]), protocol=2))
    torch.save({"model": Bomb(bomb[1])}, tmp_path / "whole.pt")  # in torch's own container too
    for path in (tmp_path / STATE, tmp_path / "whole.pt"):
        path.rename(tmp_path / STATE)
        with pytest.raises(pickle.UnpicklingError):
            load_state(tmp_path, model, torch.optim.SGD(model.parameters()), torch.device("cpu"))
    assert not bomb[1].exists()


def calls() -> list[tuple[str, str, dict[str, str]]]:
    """(where, name, keyword arguments) of every call in the packages."""
    found = []
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call):
                    words = {word.arg or "**": ast.unparse(word.value) for word in node.keywords}
                    found.append((f"{path.relative_to(ROOT)}:{node.lineno}", ast.unparse(node.func), words))
    return found


def test_no_file_calls_a_shell_or_an_unpickler() -> None:
    barred = {
        "os.system", "os.popen", "eval", "exec", "pickle.load", "pickle.loads", "pickle.Unpickler",
        "subprocess.getoutput", "torch.hub.load", "yaml.load", "marshal.loads", "shelve.open",
    }  # fmt: skip
    strays = []
    for where, name, words in calls():
        pickled = (name == "torch.load" and words.get("weights_only") != "True") or (
            name == "np.load" and words.get("allow_pickle") != "False"
        )
        if name in barred or words.get("shell", "False") != "False" or pickled:
            strays.append(f"{where} {name} {words}")
    assert not strays


def test_a_command_in_the_place_of_a_source_is_refused(source: Source, tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", pair_members(range(3)))
    code, said = source.preprocess(f"pipe:touch {tmp_path}/ran; cat {tmp_path}/a.tar")
    assert code == 1 and "runs no shell commands; name a file, or a URL" in said
    assert not (tmp_path / "ran").exists()


def a_member(name: str, kind: bytes = tarfile.REGTYPE, size: int = 0) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.size, member.linkname = kind, size, "/etc/passwd"
    return member


@pytest.mark.parametrize(
    "member",
    [
        a_member("/etc/stolen.txt"), a_member("../stolen.txt"), a_member("x/../../stolen.txt"),
        a_member("stolen.txt", tarfile.SYMTYPE), a_member("stolen.txt", tarfile.LNKTYPE),
        a_member("stolen.txt", tarfile.FIFOTYPE), a_member("stolen.txt", tarfile.CHRTYPE),
        a_member("stolen.txt", tarfile.BLKTYPE),
    ],
    ids=["absolute", "above", "above within", "symlink", "hard link", "fifo", "character device", "block device"],
)  # fmt: skip
def test_a_member_that_leaves_its_folder_or_is_no_file_is_refused(
    source: Source, member: tarfile.TarInfo, tmp_path: Path
) -> None:
    path = write_tar(source.folder / "a.tar", pair_members(range(3)))
    with tarfile.open(path, "a") as tar:
        tar.addfile(member)
    code, said = source.preprocess()
    assert code == 0 and f"a.tar: member '{member.name}' is a link, a device or leaves its folder; refused" in said
    assert source.fates["kept: train"] == 3 and source.fates["damaged or empty tar"] == 1
    with pytest.raises(ShardError, match=r"a\.tar: member .* refused"):
        open_foreign(str(path), tmp_path / "indexes")
    assert not list(tmp_path.rglob("stolen*")) and not (tmp_path / "indexes").exists()


def png(*chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of the given chunks, with right checksums."""
    data = b"\x89PNG\r\n\x1a\n"
    for name, content in chunks:
        data += struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
    return data


def header(width: int, height: int) -> tuple[bytes, bytes]:
    return b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)


def one_of_three(source: Source, ending: str, data: bytes) -> dict[str, int]:
    """What became of three pairs, the second with that picture."""
    make_pairs(source.folder / "pairs", 3)
    (source.folder / "pairs" / "0001.png").unlink()
    (source.folder / "pairs" / f"0001.{ending}").write_bytes(data)
    code, said = source.preprocess()
    assert code == 0, said
    return source.fates


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_picture_of_too_many_pixels_is_refused_before_any_is_decoded(source: Source) -> None:
    """There are no pixels behind the header: whoever decodes finds the picture unreadable, not too large."""
    bomb = png(header(20_000, 5_001), (b"IDAT", b""))
    assert MAX_PIXELS < 20_000 * 5_001
    with pytest.raises(ImageProblem, match="image too large"):
        square(bomb, 64)  # while training
    assert one_of_three(source, "png", bomb) == {"read": 3, "kept: train": 2, "dropped: image too large": 1}


def test_text_in_a_picture_that_unpacks_to_much_is_refused(source: Source) -> None:
    text = b"Comment\0\0" + zlib.compress(bytes(50_000_000), 9)
    pixels = zlib.compress(b"\0\xff\0\0" * 1)
    for name in (b"zTXt", b"iTXt"):
        content = text if name == b"zTXt" else b"Comment\0\1\0\0\0" + text[9:]
        with pytest.raises(ImageProblem, match="image unreadable"):
            decode(png(header(1, 1), (name, content), (b"IDAT", pixels), (b"IEND", b"")), 100)
    assert decode(png(header(1, 1), (b"IDAT", pixels), (b"IEND", b"")), 100).size == (1, 1)
    fates = one_of_three(source, "png", png(header(1, 1), (b"zTXt", text), (b"IDAT", pixels), (b"IEND", b"")))
    assert fates["dropped: image unreadable"] == 1


def test_of_an_animation_only_the_first_picture_is_decoded(source: Source) -> None:
    """The last frame is broken: whoever decodes it fails."""
    frames = [Image.effect_noise((64, 64), n + 1).convert("RGB") for n in range(5)]
    out = io.BytesIO()
    frames[0].save(out, "webp", save_all=True, append_images=frames[1:], lossless=True)
    data = out.getvalue()
    pixels = data.rindex(b"VP8L") + 13  # behind the chunk's name and size, and the picture's sides
    broken = data[:pixels] + b"\xff" * (len(data) - pixels)
    with Image.open(io.BytesIO(broken)) as image, pytest.raises(OSError):
        image.seek(4)
        image.load()
    assert decode(broken, 64 * 64).tobytes() == decode(data, 64 * 64).tobytes()
    assert one_of_three(source, "webp", broken)["kept: train"] == 3


def test_a_picture_that_is_a_postscript_program_is_not_run(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pillow hands EPS to Ghostscript, whatever the name of the file."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    (tmp_path / "bin" / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n0 0 8 8 rectfill\n%%EOF\n"
    with pytest.raises(ImageProblem, match="image unreadable"):
        decode(eps, 100)
    with pytest.raises(OSError, match="cannot identify"):
        square(eps, 8)
    assert one_of_three(source, "jpg", eps)["dropped: image unreadable"] == 1
    assert not (tmp_path / "ran").exists()


def raw_member(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    """A tar's header alone, whatever size it claims."""
    return a_member(name, kind, size).tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (raw_member("k.png", 1 << 40), "member 'k.png' makes a sample of 1099511628288 bytes, more than 268435456"),
        (raw_member("k.txt", 9 << 20), "member 'k.txt' is a text of 9437184 bytes, more than 8388608"),
        (raw_member("k.json", 9 << 20), "member 'k.json' is a text of 9437184 bytes, more than 8388608"),
        (raw_member("x", 1 << 40, tarfile.XHDTYPE), "a header asks for 1099511627776 bytes at once"),
        (raw_member("x", 1 << 40, tarfile.GNUTYPE_LONGNAME), "a header asks for 1099511627776 bytes at once"),
        (bytes(65 << 20), "ends in more than 67108864 zeros"),
    ],
    ids=["member", "caption", "json", "pax header", "long name", "padding"],
)
def test_a_small_tar_that_unpacks_to_much_is_refused_unread(source: Source, content: bytes, said: str) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in pair_members(range(2)):
            member = a_member(name, size=len(data))
            tar.addfile(member, io.BytesIO(data))
        end = tar.offset
    whole = buffer.getvalue()
    (source.folder / "a.tar.gz").write_bytes(gzip.compress(whole[:end] + content + bytes(1 << 20), 1))
    code, printed = source.preprocess()
    assert code == 0 and "a.tar.gz" in printed and said in printed and "refused" in printed
    assert source.fates["damaged or empty tar"] == 1 and source.fates["kept: train"] >= 1


def test_a_sample_of_very_many_members_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their headers count: a tar of nothing but names fills the memory too."""
    monkeypatch.setattr(shards, "SAMPLE_BYTES", 100 * 512)
    write_tar(tmp_path / "a.tar", [(f"k.{n}", b"") for n in range(101)])
    with pytest.raises(ShardError, match=r"member 'k\.100' makes a sample of 51712 bytes"):
        list(shards.read_foreign(tmp_path / "a.tar"))


def test_json_that_is_nested_deeply_costs_a_pair_at_most(source: Source) -> None:
    members = pair_members(range(3))
    write_tar(source.folder / "a.tar", [*members[:3], ("0001.json", b"[" * 1_000_000), members[5], *members[6:]])
    code, said = source.preprocess()
    assert code == 0, said
    assert source.fates == {"read": 3, "kept: train": 2, "dropped: no caption": 1}


@pytest.mark.parametrize(("name", "limit"), [("0001.txt", shards.TEXT_BYTES), ("0001.png", shards.SAMPLE_BYTES)])
def test_loose_texts_and_pictures_of_many_mb_are_refused_by_name(source: Source, name: str, limit: int) -> None:
    pairs = make_pairs(source.folder / "pairs", 3)
    os.truncate(pairs / name, limit + 1)
    code, said = source.preprocess(str(pairs))
    assert code == 1 and f"{name} has {limit + 1} bytes, more than {limit}; remove it from {pairs}" in said
    assert len(said.splitlines()) == 1


def test_names_cannot_steer_the_terminal(source: Source, tmp_path: Path) -> None:
    evil = f"{CLEAR_SCREEN}evil\nsmalti preprocess: all is well"
    write_tar(source.folder / f"{evil}.tar", [*pair_members(range(2)), (f"../{evil}.txt", b"x")])
    code, said = source.preprocess()
    assert code == 0 and "\x1b" not in said
    warnings = [line for line in said.splitlines() if line.startswith("smalti preprocess: ")]
    assert (
        len(warnings) == 1 and "\\x1b[2Jevil\\nsmalti preprocess: all is well.tar: member '../\\x1b[2J" in warnings[0]
    )
    for missing in (f"{tmp_path}/{evil}", f"pipe:{evil}", f"emoji:{evil}", f"http://{evil}"):
        code, said = source.preprocess(missing)
        assert code == 1 and "\x1b" not in said and len(said.splitlines()) == 1


def test_names_become_keys_of_one_printable_line(source: Source) -> None:
    pairs = make_pairs(source.folder / "pairs", 2)
    for ending in ("png", "txt"):
        (pairs / f"0001.{ending}").rename(pairs / f"a\n{CLEAR_SCREEN}\u2028\x85b.{ending}")
    assert source.preprocess(str(pairs))[0] == 0
    assert open_shard(source.out / "images" / "train-000000.tar").keys == ["0000", "a__[2J__b"]
    assert plain_key("\u732b \u200d emoji") == "\u732b \u200d emoji"  # what joins emoji is no control character


def link(at: Path, to: Path) -> None:
    at.unlink(missing_ok=True)
    at.symlink_to(to)


@pytest.mark.parametrize("name", ["0001.txt", "0001.png", "0001.json"])
def test_a_link_out_of_a_folder_of_pictures_is_refused(source: Source, tmp_path: Path, name: str) -> None:
    pairs = make_pairs(source.folder / "pairs", 3)
    (tmp_path / "secret").write_bytes(picture("red") if name.endswith("png") else b'"my secret"')
    link(pairs / name, tmp_path / "secret")
    code, said = source.preprocess(str(pairs))
    assert code == 1 and f"{name} is a link that leaves {pairs}; refused" in said
    assert not (source.out / "images" / "manifest.json").exists()


def test_a_link_within_a_folder_of_pictures_is_followed_and_a_linked_folder_is_not(
    source: Source, tmp_path: Path
) -> None:
    pairs = make_pairs(source.folder / "pairs", 3)
    link(pairs / "0001.txt", pairs / "0002.txt")
    make_pairs(tmp_path / "elsewhere", 5)
    link(pairs / "linked", tmp_path / "elsewhere")
    link(tmp_path / "by name", pairs)  # the folder itself may be named by a link
    assert source.preprocess(str(tmp_path / "by name"))[0] == 0
    shard = open_shard(source.out / "images" / "train-000000.tar")
    assert shard.keys == ["0000", "0001", "0002"]
    assert shard.read_text(1) == shard.read_text(2)


@pytest.mark.parametrize("place", [[-512, 10], [512, -1], [512, 1 << 40], [1 << 40, 1], "all", [1], None])
def test_an_index_cannot_point_out_of_its_tar(tmp_path: Path, place: Any) -> None:
    write_shard(tmp_path / "a.tar", [Sample("k", {"txt": b"text"})])
    index = json.loads((tmp_path / "a.json").read_text())
    index["samples"][0][1]["txt"] = place
    (tmp_path / "a.json").write_text(json.dumps(index))
    with pytest.raises(FolderError, match=r"a\.json, the index of a\.tar, cannot be read"):
        open_shard(tmp_path / "a.tar")
