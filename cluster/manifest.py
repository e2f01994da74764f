"""A stage's folder and the `manifest.json` that says what is in it and what it was made from.

The manifest is written last: a folder without one is unfinished. It carries the resolved settings,
versions, counts, the digest of each file, one fingerprint of the whole, and the fingerprints of the
folders it was made from, so that shards made with another tokenizer or dVAE are refused, not used.
"""

import glob
import hashlib
import importlib.metadata
import json
import os
import secrets
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cluster.settings import UserError

NAME = "manifest.json"
VERB_OF = {
    "images": "preprocess", "vocab": "preprocess", "dvae": "dvae", "tokens": "tokenise", "transformer": "train",
    "scorer": "scorer", "samples": "sample", "ranked": "rerank", "openai": "dvae export",
}  # fmt: skip
FORMAT = 1  # raise it when a reader of the old form would misread the new one
MARK_BYTES = 6  # a temporary file is NAME.MARK.part, with a mark of its own for each writer
MARK = "[0-9a-f]" * (2 * MARK_BYTES)


class FolderError(UserError):
    """A folder that is missing, unfinished, of another kind, damaged, or made from something else."""


@dataclass(frozen=True)
class Manifest:
    """What a finished folder says of itself."""

    kind: str
    settings: dict[str, Any]
    counts: dict[str, Any]
    files: dict[str, dict[str, Any]]
    made_from: dict[str, str] = field(default_factory=dict)
    fingerprint: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    format: int = FORMAT


def write_manifest(
    folder: Path,
    kind: str,
    settings: dict[str, Any],
    counts: dict[str, Any],
    files: list[str] | dict[str, dict[str, Any]],
    made_from: dict[str, str],
) -> Manifest:
    """Write the manifest of a finished folder; `files` are named relative to it.

    Given as a dict, each file comes with its record ("bytes", "sha256") and is not read again.
    """
    records = files if isinstance(files, dict) else {name: record_of(folder / name) for name in files}
    manifest = Manifest(kind, settings, counts, records, made_from, fingerprint_of(kind, records), installed_versions())
    write_json(folder / NAME, asdict(manifest))
    return manifest


def read_manifest(folder: Path, kind: str) -> Manifest:
    """The manifest of a finished folder of that kind; FolderError says what is wrong and what to do."""
    verb = VERB_OF[kind]
    if not folder.is_dir():
        raise FolderError(f"{kind} folder {folder} does not exist; make it with `smalti {verb}`")
    path = folder / NAME
    if not path.is_file():
        raise FolderError(
            f"{folder} has no {NAME}, so it is not a finished {kind} folder; run `smalti {verb}` (again) to finish it"
        )
    try:
        values = json.loads(path.read_text())
        manifest = Manifest(**values)
    except (ValueError, TypeError) as error:
        raise FolderError(f"{path} is damaged ({error}); remove the folder and run `smalti {verb}` again") from None
    if manifest.kind != kind:
        raise FolderError(f"{folder} holds {manifest.kind}, not {kind}")
    if manifest.format != FORMAT:
        raise FolderError(f"{path} has format {manifest.format}; this version of smalti reads format {FORMAT}")
    return manifest


def check_files(folder: Path, manifest: Manifest) -> None:
    """Compare the size of every file with the manifest; FolderError names the first that differs."""
    for name, record in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise FolderError(f"{path} is missing, though {folder / NAME} lists it")
        if path.stat().st_size != record["bytes"]:
            raise FolderError(
                f"{path} has {path.stat().st_size} bytes where {NAME} says {record['bytes']}: it was cut or changed"
            )


def is_done(
    folder: Path, kind: str, settings: dict[str, Any], made_from: dict[str, str], allowed: tuple[str, ...] = ()
) -> bool:
    """True if the folder was finished with just these settings and inputs; FolderError if with others.

    A difference in a setting named in `allowed` is no error: the folder is then not done.
    """
    if not (folder / NAME).is_file():
        return False
    manifest = read_manifest(folder, kind)
    refuse_difference(folder, "settings", manifest.settings, settings, allowed)
    if differences(manifest.settings, settings):
        return False
    refuse_difference(folder, "inputs", manifest.made_from, made_from)
    check_files(folder, manifest)
    return True


def differences(old: dict[str, Any], new: dict[str, Any]) -> dict[str, str]:
    """What differs between two nested dicts: "section.key" -> both values, in words."""
    flat_old, flat_new = flat(old), flat(new)
    return {
        key: f"{key}: {flat_old.get(key)!r} there, {flat_new.get(key)!r} here"
        for key in sorted(flat_old.keys() | flat_new.keys())
        if flat_old.get(key) != flat_new.get(key)
    }


def refuse_difference(
    folder: Path, what: str, old: dict[str, Any], new: dict[str, Any], allowed: tuple[str, ...] = ()
) -> None:
    """FolderError naming every key, but those allowed, in which the folder's values differ from the ones asked for."""
    changed = [words for key, words in differences(old, new).items() if key not in allowed]
    if changed:
        raise FolderError(
            f"{folder} was made with other {what} ({'; '.join(changed)}); use them, or another `out`, or remove it"
        )


def refuse_other_origin(folder: Path, manifest: Manifest, name: str, other: Path, fingerprint: str) -> None:
    """FolderError unless `folder` was made from the `name` (a dvae, a vocab) that stands at `other`."""
    if manifest.made_from.get(name) != fingerprint:
        raise FolderError(
            f"{folder} was made with another {name} (fingerprint {manifest.made_from.get(name, 'none')[:12]}) "
            f"than {other} ({fingerprint[:12]}); make it again with this one, or name the other"
        )


def fingerprint_of(kind: str, files: dict[str, dict[str, Any]]) -> str:
    """One digest over the kind and the digests of all files."""
    text = json.dumps([kind, sorted((name, record["sha256"]) for name, record in files.items())])
    return hashlib.sha256(text.encode()).hexdigest()


def record_of(path: Path) -> dict[str, Any]:
    """What a manifest says of a file."""
    return {"bytes": path.stat().st_size, "sha256": file_digest(path)}


def file_digest(path: Path) -> str:
    """sha256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file so that after a crash it is there whole or not at all, also when several write it at once."""
    named = False
    while not named:  # another writer of the file may sweep ours away
        part = temporary(path)
        try:
            with open(part, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except OSError:  # a full disk
            part.unlink(missing_ok=True)
            raise
        named = give_name(part, path)


def temporary(path: Path) -> Path:
    """A new name beside `path` to write it under, that no other process uses."""
    return path.with_name(f"{path.name}.{secrets.token_hex(MARK_BYTES)}.part")


def give_name(part: Path, path: Path) -> bool:
    """Move a finished temporary file to its place, and sweep away those that killed writers of it left.

    False if `part` is gone: another writer of the same file has swept it away, and put its own in place.
    """
    try:
        part.replace(path)
    except FileNotFoundError:
        return False
    sweep(path.parent, path.name)
    return True


def sweep(folder: Path, name: str = "") -> None:
    """Remove the temporary files of `name`, or of every file, in a folder."""
    for part in folder.glob(f"{glob.escape(name) or '*'}.{MARK}.part"):
        part.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """`write_bytes` of indented JSON."""
    write_bytes(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


def installed_versions() -> dict[str, str]:
    """Versions of smalti and of the libraries that decide its results."""
    names = ("smalti", "torch", "deepspeed", "numpy", "sentencepiece", "pillow")
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one, with keys "section.key"; tuples as the lists that JSON makes of them."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return found
