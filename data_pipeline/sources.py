"""Where raw pairs come from: tars here or by URL, img2dataset folders, or loose pictures with captions beside them.

The input is cut into parts (one tar, or so many loose files), the unit of work that is done whole
or done again.
"""

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cluster.command import shown
from cluster.manifest import FolderError
from data_pipeline.images import IMAGE_ENDINGS
from data_pipeline.remote import CacheConfig, find_tars, is_remote, is_tar, plain
from data_pipeline.remote_cache import RemoteFile
from data_pipeline.shards import SAMPLE_BYTES, TAR_ENDINGS, TEXT_BYTES, TEXT_ENDINGS, Sample, read_foreign

EMBEDDED = Path(__file__).parent / "emoji"


@dataclass(frozen=True)
class Part:
    """One tar, or a run of loose pictures, bound for shard `number` of its split."""

    split: str
    number: int
    paths: tuple[Path, ...]
    root: Path  # loose pictures are named by their path from here
    remote: RemoteFile | None = None  # a tar that is not on this machine; `paths` is then empty
    ahead: RemoteFile | None = None  # the next part's, fetched while this one is read


def find_parts(source: str, samples_per_part: int, split: str, cache: CacheConfig | None = None) -> list[Part]:
    """Parts of a source in a fixed order; FolderError if there is nothing to read.

    `source` is a folder, a tar, a brace pattern `x{000..041}.tar`, the same as a URL (http://, s3://,
    ...; its tars are fetched into `cache` when they are read), or `emoji:train` / `emoji:heldout`.
    """
    files = remote_tars(source, cache or CacheConfig())
    if files:
        follower = [*files[1:], None]
        return [Part(split, n, (), Path(), file, follower[n]) for n, file in enumerate(files)]
    tars, loose = find_files(source)
    groups: list[tuple[Path, ...]] = [(tar,) for tar in tars]
    groups += [tuple(loose[i : i + samples_per_part]) for i in range(0, len(loose), samples_per_part)]
    if not groups:
        raise FolderError(f"{shown(source)} holds no tar and no picture ({', '.join(IMAGE_ENDINGS)})")
    root = Path(source) if Path(source).is_dir() else Path(source).parent
    return [Part(split, number, paths, root) for number, paths in enumerate(groups)]


def read_part(part: Part) -> Iterator[Sample]:
    """Samples of a part in file order. ShardError at damage; RemoteError if a tar cannot be fetched now."""
    if part.remote:
        with part.remote.open() as file:  # while it is open the cache keeps it
            if part.ahead:
                part.ahead.prefetch()
            yield from read_foreign(Path(file.name), plain(part.remote.url))
    for path in part.paths:
        if path.name.endswith(TAR_ENDINGS):
            yield from read_foreign(path)
        else:
            beside = {ending: path.with_suffix(f".{ending}") for ending in TEXT_ENDINGS}
            files = {ending: _read_loose(file, part.root) for ending, file in beside.items() if file.is_file()}
            yield Sample(
                str(path.relative_to(part.root).with_suffix("")),
                {path.suffix[1:].lower(): _read_loose(path, part.root)} | files,
            )


def fraction_of(key: str) -> float:
    """A number in [0, 1) that depends on the key alone."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8]) / 2**64


def remote_tars(source: str, cache: CacheConfig) -> list[RemoteFile]:
    """The tars of a source that is a URL, in order; none for a source on this machine."""
    if not is_remote(source):
        return []
    urls = expand(source)
    if not is_tar(urls[0]):
        urls = find_tars(source, cache)
    return [RemoteFile(url, cache) for url in urls]


def find_files(source: str) -> tuple[list[Path], list[Path]]:
    """(tars, loose pictures) of a source on this machine; a folder with tars gives only its tars."""
    if source.startswith("emoji:"):
        tars = sorted(EMBEDDED.glob(f"{source.partition(':')[2]}-*.tar.gz"))
        if not tars:
            raise FolderError(f"{shown(source)} is not embedded; there are emoji:train and emoji:heldout")
        return tars, []
    paths = [Path(name) for name in expand(source)]
    missing = [path for path in paths if not path.exists()]
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise FolderError(f"source {shown(missing[0])} does not exist{more}")
    if not paths[0].is_dir():
        return paths, []
    files = sorted(
        path for path in paths[0].rglob("*") if path.is_file() and "_tmp" not in path.relative_to(paths[0]).parts
    )
    tars = [path for path in files if path.name.endswith(TAR_ENDINGS)]
    loose = [path for path in files if path.suffix[1:].lower() in IMAGE_ENDINGS]
    return (tars, []) if tars else ([], loose)


def _read_loose(path: Path, root: Path) -> bytes:
    """A loose file's bytes; FolderError if it is a link out of the folder, or too large for a picture or a text."""
    if path.is_symlink() and not path.resolve().is_relative_to(root.resolve()):
        raise FolderError(
            f"{shown(path)} is a link that leaves {shown(root)}; refused: put the file itself there, or remove the link"
        )
    n_bytes = path.stat().st_size
    limit = TEXT_BYTES if path.suffix[1:].lower() in TEXT_ENDINGS else SAMPLE_BYTES
    if n_bytes > limit:
        raise FolderError(f"{shown(path)} has {n_bytes} bytes, more than {limit}; remove it from {shown(root)}")
    return path.read_bytes()


def expand(pattern: str) -> list[str]:
    """`a{08..10}b` -> a08b a09b a10b; other text as it is."""
    match = re.fullmatch(r"(.*)\{(\d+)\.\.(\d+)\}(.*)", pattern)
    if not match:
        return [pattern]
    head, first, last, tail = match.groups()
    return [f"{head}{number:0{len(first)}d}{tail}" for number in range(int(first), int(last) + 1)]
