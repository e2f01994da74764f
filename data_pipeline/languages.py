"""Which language a caption is in: the door to py3langid.

py3langid is the smallest of the identifiers that do without a compiler and a download (4.6 MB, numpy alone, the same
answer each time, tens of thousands of captions a second). Like all of them it guesses at short captions: so a caption
of few words is judged by its letters alone, and a longer one counts as foreign only by a margin.
"""

import math
import unicodedata
from functools import cache
from typing import Any

from cluster.settings import SettingError

try:
    from py3langid import langid
except ImportError:  # it comes with the extra "filters"
    langid = None

NO_LANGUAGE = "zxx"  # the identifier's answer to text that is in none
# First words of Unicode's letter names; a language that is not listed is written in Latin letters.
SCRIPTS = {
    "am": ("ETHIOPIC",), "ar": ("ARABIC",), "ary": ("ARABIC",), "arz": ("ARABIC",), "as": ("BENGALI",),
    "ba": ("CYRILLIC",), "be": ("CYRILLIC",), "bg": ("CYRILLIC",), "bn": ("BENGALI",), "dz": ("TIBETAN",),
    "el": ("GREEK",), "fa": ("ARABIC",), "gom": ("DEVANAGARI",), "grc": ("GREEK",), "gu": ("GUJARATI",),
    "hbo": ("HEBREW",), "he": ("HEBREW",), "hi": ("DEVANAGARI",), "hy": ("ARMENIAN",),
    "ja": ("HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA", "CJK"), "ka": ("GEORGIAN",), "kk": ("CYRILLIC",),
    "km": ("KHMER",), "kn": ("KANNADA",), "ko": ("HANGUL", "CJK"), "ky": ("CYRILLIC",), "lo": ("LAO",),
    "mk": ("CYRILLIC",), "ml": ("MALAYALAM",), "mn": ("CYRILLIC",), "mr": ("DEVANAGARI",), "my": ("MYANMAR",),
    "ne": ("DEVANAGARI",), "or": ("ORIYA",), "pa": ("GURMUKHI",), "ps": ("ARABIC",), "ru": ("CYRILLIC",),
    "sa": ("DEVANAGARI",), "sdh": ("ARABIC",), "si": ("SINHALA",), "sr": ("CYRILLIC", "LATIN"), "ta": ("TAMIL",),
    "te": ("TELUGU",), "tg": ("CYRILLIC",), "th": ("THAI",), "tt": ("CYRILLIC",), "ug": ("ARABIC",),
    "uk": ("CYRILLIC",), "ur": ("ARABIC",), "uzs": ("CYRILLIC",), "wuu": ("CJK",), "yue": ("CJK",), "zh": ("CJK",),
}  # fmt: skip


def check_language(code: str) -> None:
    """SettingError if the identifier is not installed or does not know this language."""
    known = sorted({*_identifier().labels} - {NO_LANGUAGE})
    if code not in known:
        raise SettingError(f"filters.language={code!r} is not known; there are: {', '.join(known)}")


def is_foreign(caption: str, language: str, fewest_words: int, margin: float) -> bool:
    """True if the caption is in another language than `language`, as far as that can be told.

    Most letters of another script: yes. Else, below `fewest_words` words: no. Else yes if another language is likelier
    by more than `margin`, the logarithm of the odds as the identifier calibrates them for the text's length. A caption
    without letters is in no language, so not in another.
    """
    letters = [letter for letter in unicodedata.normalize("NFKC", caption) if letter.isalpha()]
    if not letters:
        return False
    scripts = SCRIPTS.get(language, ("LATIN",))
    if 2 * sum(_script(letter) in scripts for letter in letters) < len(letters):
        return True
    return len(caption.split()) >= fewest_words and lead_of_another(caption, language) > margin


def lead_of_another(caption: str, language: str) -> float:
    """Logarithm of how much likelier the likeliest other language is than `language`; below 0 if it is not.

    In lower case, as names and titles written With Capitals look German.
    """
    chances = dict(_identifier().rank(caption.lower()))
    best = max(chance for code, chance in chances.items() if code not in (language, NO_LANGUAGE))
    return math.log(max(best, 1e-30)) - math.log(max(chances[language], 1e-30))


def _script(letter: str) -> str:
    return unicodedata.name(letter, "").split(" ")[0]


@cache
def _identifier() -> Any:
    if langid is None:
        raise SettingError("filters.language needs py3langid: pip install 'smalti[filters]'")
    return langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE, norm_probs=True)
