"""Captions: where they are found, and what cleaning does to them."""

import pytest

from data_pipeline.captions import clean, find_caption


@pytest.mark.parametrize(
    ("files", "caption"),
    [
        ({"txt": b"  a cat \n", "json": b'{"caption": "a dog"}'}, "a cat"),
        ({"json": b'{"caption": " a dog ", "width": 3}', "webp": b"x"}, "a dog"),
        ({"caption": b"a cat"}, "a cat"),
        ({"txt": "caf\u00e9 \u732b".encode()}, "caf\u00e9 \u732b"),
        ({"txt": b"caf\xe9"}, "caf\ufffd"),
        ({"txt": b" \n"}, ""),
        ({"json": b'{"caption": null}'}, ""),
        ({"json": b'{"caption": 7}'}, ""),
        ({"json": b'{"text": "a dog"}'}, ""),
        ({"json": b'["caption"]'}, ""),
        ({"json": b"{cut"}, ""),
        ({"json": b"\xff\xfe"}, ""),
        ({}, ""),
    ],
)
def test_a_text_member_wins_over_the_json_and_nothing_raises(files: dict[str, bytes], caption: str) -> None:
    assert find_caption(files, "caption") == caption


def test_the_json_field_can_be_named() -> None:
    assert find_caption({"json": b'{"TEXT": "a", "caption": "b"}'}, "TEXT") == "a"


@pytest.mark.parametrize(
    ("raw", "cleaned"),
    [
        ("  A\tCat\n\nON  a Mat ", "a cat on a mat"),
        ("\uff21\uff11 \u2460 \ufb01sh", "a1 1 fish"),
        ("Cafe\u0301", "caf\u00e9"),
        ("a\u00a0b\u3000c", "a b c"),
        ("\u041c\u041e\u0417\u0410\u0418\u041a\u0410", "\u043c\u043e\u0437\u0430\u0438\u043a\u0430"),
    ],
)
def test_cleaning_is_nfkc_lower_case_and_single_spaces(raw: str, cleaned: str) -> None:
    assert clean(raw) == cleaned
    assert clean(cleaned) == cleaned
