"""Keep-or-drop rules for pairs: each gives None, or a short reason that the report counts."""

import hashlib
import math
import operator
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cluster.settings import SettingError, setting
from data_pipeline.boilerplate import boilerplate
from data_pipeline.languages import check_language, is_foreign

COMPARE: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt, "==": operator.eq, "!=": operator.ne,
}  # fmt: skip
THRESHOLD = re.compile(r"\s*([^\s<>=!,]+)\s*(>=|<=|==|!=|>|<)\s*([^\s<>=!,]+)\s*")
SHA256 = re.compile(r"[0-9a-fA-F]{64}")
URL = re.compile(r"(?:https?://)?([^/?#]*)([^#]*)", re.IGNORECASE)


@dataclass(frozen=True)
class FilterConfig:
    """Which pairs are dropped; every rule is off until it is set."""

    min_words: int = setting(0, "captions of fewer words are dropped; 0 is off")
    max_words: int = setting(0, "captions of more words are dropped; 0 is off")
    min_characters: int = setting(0, "captions of fewer characters are dropped; 0 is off")
    max_characters: int = setting(0, "captions of more characters are dropped; 0 is off")
    language: str = setting("", "captions judged to be in another language are dropped: en, de, ...; empty is off")
    language_words: int = setting(4, "captions of fewer words are judged by their letters alone: another script or not")
    language_margin: float = setting(3.0, "how much likelier another language must be, as a logarithm of the odds")
    boilerplate: bool = setting(False, "drop captions that are mostly dates, file names, stock phrases or addresses")
    max_aspect: float = setting(0.0, "pictures longer than this many times their shorter side are dropped; 0 is off")
    min_side: int = setting(0, "pictures with a shorter side below this many pixels are dropped; 0 is off")
    thresholds: str = setting("", "rules on fields of KEY.json: similarity>=0.28, punsafe<0.5, pwatermark<0.8")
    missing: Literal["keep", "drop"] = setting("keep", "pairs whose KEY.json lacks a number that thresholds names")
    blocklist: tuple[str, ...] = setting((), "files of lines, each a url or the sha256 of a picture file to drop")

    def __post_init__(self) -> None:
        for name in ("min_words", "max_words", "min_characters", "max_characters", "language_words", "min_side"):
            if getattr(self, name) < 0:
                raise SettingError(f"filters.{name}={getattr(self, name)} must be at least 0 (0 is off)")
        for low, high in (("min_words", "max_words"), ("min_characters", "max_characters")):
            if 0 < getattr(self, high) < getattr(self, low):
                raise SettingError(
                    f"filters.{high}={getattr(self, high)} is below filters.{low}={getattr(self, low)}: nothing is kept"
                )
        if self.max_aspect and not 1 <= self.max_aspect < math.inf:
            raise SettingError(
                f"filters.max_aspect={self.max_aspect} must be at least 1 (2: from 1/2 to 2), or 0 for off"
            )
        if not 0 <= self.language_margin < math.inf:
            raise SettingError(f"filters.language_margin={self.language_margin} must be at least 0")
        parse_thresholds(self.thresholds)


@dataclass(frozen=True)
class Threshold:
    """A field of KEY.json must compare so with a number."""

    field: str
    sign: str
    number: float

    def value(self, about: dict[str, Any]) -> float | None:
        """The field, if it is a finite number."""
        value = about.get(self.field)
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < math.inf:
            return None
        return value

    def reason(self, about: dict[str, Any], missing: str) -> str | None:
        """Why these fields fail it, or None. What is no finite number is `missing`: "keep" or "drop"."""
        value = self.value(about)
        if value is None:
            return f"{self.field} is missing" if missing == "drop" else None
        return None if COMPARE[self.sign](value, self.number) else f"not {self.field}{self.sign}{self.number:g}"


def parse_thresholds(text: str) -> tuple[Threshold, ...]:
    """Rules such as "similarity>=0.28, punsafe<0.5"; SettingError naming the one that is none."""
    rules = []
    for part in filter(str.strip, text.split(",")):
        match = THRESHOLD.fullmatch(part)
        try:
            number = float(match[3]) if match else math.nan
        except ValueError:
            number = math.nan
        if match is None or not math.isfinite(number):
            raise SettingError(
                f"filters.thresholds: {part.strip()!r} is not FIELD SIGN NUMBER with a sign of {' '.join(COMPARE)}"
            )
        rules.append(Threshold(match[1], match[2], number))
    return tuple(rules)


def length_reason(caption: str, config: FilterConfig) -> str | None:
    """Why a caption is too short or too long, or None. Words are what blanks separate; blanks count once."""
    words = caption.split()
    characters = len(" ".join(words))
    if len(words) < config.min_words or characters < config.min_characters:
        return "caption too short"
    if 0 < config.max_words < len(words) or 0 < config.max_characters < characters:
        return "caption too long"
    return None


def language_reason(caption: str, config: FilterConfig) -> str | None:
    """Why a caption is in another language than is wanted, or None."""
    foreign = is_foreign(caption, config.language, config.language_words, config.language_margin)
    return f"caption not in {config.language}" if foreign else None


def boilerplate_reason(caption: str) -> str | None:
    """Why a caption says nothing of its picture, or None."""
    rule = boilerplate(caption)
    return f"boilerplate caption: {rule}" if rule else None


def size_reason(width: int, height: int, config: FilterConfig) -> str | None:
    """Why a picture is too small or too long for a square crop to show what the caption tells of, or None."""
    shorter, longer = sorted((width, height))
    if shorter < config.min_side:
        return "picture too small"
    if config.max_aspect and longer > config.max_aspect * shorter:
        return "aspect ratio"
    return None


def plain_url(url: str) -> str:
    """What is compared of a url: http and https are one, so are cases of the host; the path's case counts."""
    match = URL.match(url.strip())
    host, path = (match[1], match[2]) if match else (url, "")
    return host.lower() + (path if path.startswith("/") else f"/{path}")


class Blocklist:
    """Urls and sha256 digests that must not be in a set, 8 bytes each: a list of 100 million fits in a worker."""

    def __init__(self, paths: tuple[str, ...]) -> None:
        """Reads files of one url or digest a line; blank lines and those that begin with # say nothing.

        SettingError if a file cannot be read or a line is neither.
        """
        marks = np.fromiter((_short(entry) for path in paths for entry in _entries(path)), np.uint64)
        self.marks = np.unique(marks)

    def holds(self, entry: str) -> bool:
        """True if this plain url, or digest in lower case, is listed."""
        at = int(np.searchsorted(self.marks, wanted := np.uint64(_short(entry))))
        return at < len(self.marks) and bool(self.marks[at] == wanted)

    def reason(self, about: dict[str, Any]) -> str | None:
        """Why a pair is listed by the url or the sha256 in its KEY.json, or None."""
        if not len(self.marks):
            return None
        url, digest = about.get("url"), about.get("sha256")
        if isinstance(url, str) and self.holds(plain_url(url)):
            return "blocklist: url"
        if isinstance(digest, str) and self.holds(digest.lower()):
            return "blocklist: sha256"
        return None


def _entries(path: str) -> Iterator[str]:
    try:
        with Path(path).open(encoding="utf-8", errors="replace") as file:
            for number, line in enumerate(file, 1):
                entry = line.strip()
                if SHA256.fullmatch(entry):
                    yield entry.lower()
                elif "://" in entry:
                    yield plain_url(entry)
                elif entry and not entry.startswith("#"):
                    raise SettingError(
                        f"filters.blocklist: line {number} of {path} is neither a url with http:// or https:// nor a "
                        f"sha256 of 64 hexadecimal digits: {entry[:60]!r}"
                    )
    except OSError as error:
        raise SettingError(f"filters.blocklist: {path} cannot be read: {error.strerror}") from None


def _short(entry: str) -> int:
    return int.from_bytes(hashlib.blake2b(entry.encode("utf-8", "surrogatepass"), digest_size=8).digest())


class Filters:
    """The rules of a FilterConfig. SettingError if its language is not known or a blocklist cannot be read."""

    def __init__(self, config: FilterConfig) -> None:
        self.config = config
        self.thresholds = parse_thresholds(config.thresholds)
        self.blocklist = Blocklist(config.blocklist)
        if config.language:
            check_language(config.language)

    def of_caption(self, caption: str, about: dict[str, Any]) -> str | None:
        """Why the pair is dropped for its caption or for what KEY.json (`about`) says of it, or None."""
        missing = self.config.missing
        reason = self.blocklist.reason(about) or length_reason(caption, self.config)
        if reason is None and self.config.boilerplate:
            reason = boilerplate_reason(caption)
        if reason is None and self.config.language:
            reason = language_reason(caption, self.config)
        return reason or next(filter(None, (rule.reason(about, missing) for rule in self.thresholds)), None)

    def unjudged(self, about: dict[str, Any]) -> set[str]:
        """Fields that thresholds name and these lack: what they say of the pair is not known."""
        return {rule.field for rule in self.thresholds if rule.value(about) is None}

    def of_size(self, width: int, height: int) -> str | None:
        """Why a picture that is `width` x `height` when upright, before it is shrunk, is dropped, or None."""
        return size_reason(width, height, self.config)

    def of_bytes(self, data: bytes) -> str | None:
        """Why a picture with these bytes in its file is dropped, or None."""
        if len(self.blocklist.marks) and self.blocklist.holds(hashlib.sha256(data).hexdigest()):
            return "blocklist: sha256"
        return None
