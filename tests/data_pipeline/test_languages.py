"""Foreign captions are told from English ones, with care where they are short."""

import pytest

from cluster.settings import SettingError
from data_pipeline import languages
from data_pipeline.languages import check_language, is_foreign, lead_of_another
from data_pipeline.shards import read_foreign
from data_pipeline.sources import EMBEDDED

ENGLISH = [
    "A brown dog is running through the snow", "two children on a beach at sunset", "A Red Paper Lantern At Night",
    "a glass of orange juice on a wooden table", "PORTRAIT OF A YOUNG WOMAN WITH A HAT", "man playing water polo",
    "the old stone bridge over the river", "view from the top of a snowy mountain, 1998",
]  # fmt: skip
FOREIGN = [
    "Ein brauner Hund rennt durch den Schnee", "Zwei Kinder am Strand bei Sonnenuntergang",
    "un chien brun court dans la neige", "deux enfants sur la plage au coucher du soleil",
    "un perro marr\xf3n corre por la nieve", "una casa con un tetto rosso e un giardino",
    "um copo de suco de laranja sobre a mesa", "een bruine hond rent door de sneeuw",
    "en brun hund springer genom sn\xf6n", "br\u0105zowy pies biegnie przez \u015bnieg",
    "EIN ALTES HAUS AUF DEM LAND", "kar\u0131n i\xe7inde ko\u015fan kahverengi bir k\xf6pek",
]  # fmt: skip
OTHER_LETTERS = [
    "\u043a\u0440\u0430\u0441\u043d\u0430\u044f \u043f\u0442\u0438\u0446\u0430", "\u732b", "\u3053\u306d\u3053",
    "\uac15\uc544\uc9c0", "\u03c3\u03ba\u03cd\u03bb\u03bf\u03c2", "\u05db\u05dc\u05d1", "\u0643\u0644\u0628",
    "\uff76\uff92",
]  # fmt: skip


def foreign(caption: str, language: str = "en", fewest_words: int = 4, margin: float = 3.0) -> bool:
    return is_foreign(caption, language, fewest_words, margin)


@pytest.mark.parametrize("caption", ENGLISH)
def test_an_english_caption_is_not_foreign(caption: str) -> None:
    assert not foreign(caption)


@pytest.mark.parametrize("caption", FOREIGN)
def test_a_caption_in_another_language_is_foreign(caption: str) -> None:
    assert foreign(caption)


@pytest.mark.parametrize("caption", OTHER_LETTERS)
def test_a_caption_in_another_script_is_foreign_however_short(caption: str) -> None:
    assert foreign(caption)


def test_a_short_caption_in_the_same_script_is_kept() -> None:
    assert lead_of_another("A penguin.", "en") > 0  # the identifier takes it for another language
    assert not foreign("A penguin.", margin=0.0)
    assert foreign("A penguin.", fewest_words=2, margin=0.0)


def test_most_letters_decide_on_the_script() -> None:
    assert not foreign("caf\xe9 \u732b sign")
    assert not foreign("\uff24\uff4f\uff47")  # full-width Latin
    assert foreign("\u732b\u732b\u732b cat"[:-1])


def test_a_caption_without_letters_is_in_no_language() -> None:
    assert not foreign("1984 - 2001 / 17 + 4 = 21")


def test_text_in_no_language_is_not_foreign() -> None:
    assert not foreign("a1 b2 c3 d4 e5")


def test_the_margin_is_what_another_language_must_be_likelier_by() -> None:
    caption = "Ein brauner Hund rennt durch den Schnee"
    lead = lead_of_another(caption, "en")
    assert foreign(caption, margin=lead - 0.01)
    assert not foreign(caption, margin=lead + 0.01)


def test_capitals_do_not_count() -> None:
    assert lead_of_another("A Red Paper Lantern", "en") == lead_of_another("a red paper lantern", "en")


def test_any_language_can_be_asked_for() -> None:
    assert not foreign("Ein brauner Hund rennt durch den Schnee", "de")
    assert foreign("A brown dog is running through the snow", "de")
    assert not foreign("\u043a\u0440\u0430\u0441\u043d\u0430\u044f \u043f\u0442\u0438\u0446\u0430", "ru")
    assert foreign("red bird", "ru")
    assert not foreign("\u3053\u306d\u3053", "ja")
    assert foreign("\u3053\u306d\u3053", "zh")


def test_few_english_captions_are_lost() -> None:
    """The embedded ones are hard, mere names of things; 0.3 % of them are taken for foreign."""
    captions = [sample.files["txt"].decode() for tar in EMBEDDED.glob("*.tar.gz") for sample in read_foreign(tar)]
    assert sum(map(foreign, captions)) < 0.005 * len(captions)


def test_a_language_that_is_not_known_is_refused() -> None:
    with pytest.raises(SettingError, match=r"filters\.language='xx' is not known; there are: .*\bde, .*\ben, "):
        check_language("xx")
    with pytest.raises(SettingError, match="not known"):
        check_language("zxx")  # the identifier's word for no language
    check_language("en")


def test_every_script_is_of_a_known_language() -> None:
    for code in languages.SCRIPTS:
        check_language(code)


def test_without_the_library_the_setting_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(languages, "langid", None)
    languages._identifier.cache_clear()
    with pytest.raises(SettingError, match=r"pip install 'smalti\[filters\]'"):
        check_language("en")
