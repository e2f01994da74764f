"""Each rule keeps what it should, drops what it should, and says why."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from cluster.settings import SettingError
from data_pipeline.filters import FilterConfig, Filters, parse_thresholds, plain_url

PICTURE = b"bytes of a picture"
DIGEST = hashlib.sha256(PICTURE).hexdigest()


def of_caption(caption: str, about: dict[str, Any] | None = None, **settings: Any) -> str | None:
    return Filters(FilterConfig(**settings)).of_caption(caption, about or {})


def test_by_default_nothing_is_dropped() -> None:
    filters = Filters(FilterConfig())
    about = {"similarity": 0.0, "punsafe": 1.0, "url": "http://example.com/a.jpg", "sha256": DIGEST}
    for caption in ("", "IMG_1234.jpg", "ein Hund im Schnee und ein Haus", "word " * 1000):
        assert filters.of_caption(caption, about) is None
    assert filters.of_size(1, 1000) is None
    assert filters.of_bytes(PICTURE) is None


@pytest.mark.parametrize(
    ("settings", "caption", "reason"),
    [
        ({"min_words": 3}, "a dog", "caption too short"),
        ({"min_words": 3}, "a red dog", None),
        ({"max_words": 3}, "a red dog", None),
        ({"max_words": 3}, "a big red dog", "caption too long"),
        ({"min_characters": 5}, " a  dog ", None),  # blanks count once: "a dog"
        ({"min_characters": 6}, " a  dog ", "caption too short"),
        ({"max_characters": 5}, "a  dog", None),
        ({"max_characters": 4}, "a  dog", "caption too long"),
        ({"boilerplate": True}, "photographed on 12 May 2014", "boilerplate caption: date"),
        ({"boilerplate": True}, "harbour, photographed on 12 May 2014", None),
        ({"language": "en"}, "ein brauner Hund rennt durch den Schnee", "caption not in en"),
        ({"language": "de"}, "ein brauner Hund rennt durch den Schnee", None),
        ({"language": "en", "language_words": 8}, "ein brauner Hund rennt durch den Schnee", None),
        ({"language": "en", "language_margin": 1000.0}, "ein brauner Hund rennt durch den Schnee", None),
    ],
)
def test_a_caption_is_judged_by_the_rules_that_are_set(
    settings: dict[str, Any], caption: str, reason: str | None
) -> None:
    assert of_caption(caption, **settings) == reason


@pytest.mark.parametrize(
    ("width", "height", "reason"),
    [
        (200, 100, None),
        (100, 200, None),
        (201, 100, "aspect ratio"),
        (100, 201, "aspect ratio"),
        (64, 64, None),
        (63, 100, "picture too small"),
        (100, 63, "picture too small"),
    ],
)
def test_a_picture_is_judged_by_its_size(width: int, height: int, reason: str | None) -> None:
    assert Filters(FilterConfig(max_aspect=2.0, min_side=64)).of_size(width, height) == reason


@pytest.mark.parametrize(
    ("rule", "value", "reason"),
    [
        ("similarity>=0.28", 0.28, None),
        ("similarity>=0.28", 0.27, "not similarity>=0.28"),
        ("similarity>0.28", 0.28, "not similarity>0.28"),
        ("similarity <= 1", 1, None),
        ("similarity<1", 1, "not similarity<1"),
        ("similarity==1", 1, None),
        ("similarity!=1", 1, "not similarity!=1"),
        ("similarity<1", 10**400, "not similarity<1"),  # a number that no float holds
        ("similarity>=-1e-3", -0.01, "not similarity>=-0.001"),
    ],
)
def test_a_threshold_compares_a_field_with_a_number(rule: str, value: float, reason: str | None) -> None:
    assert of_caption("a dog", {"similarity": value}, thresholds=rule) == reason


@pytest.mark.parametrize("value", [None, "0.9", True, float("nan"), float("inf"), [1], {}])
def test_what_is_no_number_is_missing(value: Any) -> None:
    rule = "punsafe<0.5"
    assert of_caption("a dog", {"punsafe": value}, thresholds=rule) is None
    assert of_caption("a dog", {"punsafe": value}, thresholds=rule, missing="drop") == "punsafe is missing"
    assert of_caption("a dog", {}, thresholds=rule, missing="drop") == "punsafe is missing"


def test_all_thresholds_must_hold() -> None:
    rules = "similarity>=0.28, punsafe<0.5,pwatermark<0.8,"
    good = {"similarity": 0.3, "punsafe": 0.1, "pwatermark": 0.2}
    assert of_caption("a dog", good, thresholds=rules) is None
    assert of_caption("a dog", good | {"pwatermark": 0.8}, thresholds=rules) == "not pwatermark<0.8"


@pytest.mark.parametrize(
    "text", ["similarity", "similarity>=", ">=0.3", "a=0.3", "a>=x", "a>=nan", "a>=1 b<2", "0.1<a<0.2"]
)
def test_a_threshold_that_is_none_is_named(text: str) -> None:
    with pytest.raises(SettingError, match=r"filters\.thresholds: '.*' is not FIELD SIGN NUMBER"):
        FilterConfig(thresholds=f"ok<1, {text}")
    assert len(parse_thresholds("ok<1")) == 1


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"min_words": -1}, "filters.min_words=-1"),
        ({"min_side": -5}, "filters.min_side=-5"),
        ({"min_words": 5, "max_words": 4}, "filters.max_words=4 is below filters.min_words=5"),
        ({"min_characters": 5, "max_characters": 4}, "filters.max_characters=4 is below"),
        ({"max_aspect": 0.5}, "filters.max_aspect=0.5 must be at least 1"),
        ({"max_aspect": float("nan")}, "filters.max_aspect=nan"),
        ({"language_margin": -1.0}, "filters.language_margin=-1.0"),
    ],
)
def test_a_rule_that_makes_no_sense_is_refused_by_name(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingError, match=said.replace(".", r"\.")):
        FilterConfig(**settings)


def test_a_language_that_is_not_known_is_refused_at_the_start() -> None:
    with pytest.raises(SettingError, match=r"filters\.language='english' is not known"):
        Filters(FilterConfig(language="english"))


def listed(tmp_path: Path, *lines: str) -> FilterConfig:
    path = tmp_path / "list.txt"
    path.write_text("\r\n".join(lines))
    return FilterConfig(blocklist=(str(path),))


def test_a_blocklist_names_urls_and_digests(tmp_path: Path) -> None:
    filters = Filters(listed(tmp_path, "# removed", "", " https://Example.com/A.jpg?x=1#top ", DIGEST.upper()))
    assert filters.of_caption("a", {"url": "https://example.com/A.jpg?x=1"}) == "blocklist: url"
    assert filters.of_caption("a", {"url": "http://EXAMPLE.com/A.jpg?x=1\n"}) == "blocklist: url"
    assert filters.of_caption("a", {"url": "https://example.com/a.jpg?x=1"}) is None  # the path's case counts
    assert filters.of_caption("a", {"url": "https://example.com/A.jpg"}) is None
    assert filters.of_caption("a", {"url": None}) is None
    assert filters.of_caption("a", {"sha256": DIGEST}) == "blocklist: sha256"
    assert filters.of_caption("a", {"sha256": DIGEST[:-1] + "x"}) is None
    assert filters.of_bytes(PICTURE) == "blocklist: sha256"
    assert filters.of_bytes(PICTURE + b"0") is None


def test_several_blocklists_count_together(tmp_path: Path) -> None:
    paths = []
    for name in "ab":
        paths.append(str(tmp_path / name))
        Path(paths[-1]).write_text(f"http://example.com/{name}")
    filters = Filters(FilterConfig(blocklist=tuple(paths)))
    answers = [filters.of_caption("x", {"url": f"http://example.com/{name}"}) for name in "abc"]
    assert answers == ["blocklist: url", "blocklist: url", None]


def test_urls_that_mean_the_same_are_one() -> None:
    same = {plain_url(url) for url in ("http://Example.com", "https://example.com/", "HTTPS://EXAMPLE.COM/#x")}
    assert same == {"example.com/"}
    assert plain_url("s3://bucket/A") != plain_url("s3://bucket/a")


def test_a_line_that_is_neither_url_nor_digest_is_named(tmp_path: Path) -> None:
    for line in ("example.com/a.jpg", DIGEST[:32]):
        with pytest.raises(SettingError, match=r"filters\.blocklist: line 2 of .*list\.txt is neither"):
            Filters(listed(tmp_path, "# fine", line))


def test_a_blocklist_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"filters\.blocklist: .*nowhere cannot be read: No such file"):
        Filters(FilterConfig(blocklist=(str(tmp_path / "nowhere"),)))


def test_reasons_are_few_enough_to_count() -> None:
    """A reason holds nothing of the caption or of the values, or the report would have a row for each sample."""
    rule = {"thresholds": "similarity>=0.28", "missing": "drop", "min_words": 2, "boilerplate": True}
    about: list[dict[str, Any]] = [json.loads(f'{{"similarity": {n / 100}}}') for n in range(28)]
    assert {of_caption("a dog", each, **rule) for each in about} == {"not similarity>=0.28"}
    assert {of_caption(f"IMG_{n}.jpg", {"similarity": 1}, **rule | {"min_words": 0}) for n in range(100, 130)} == {
        "boilerplate caption: file name"
    }
