"""Captions that say nothing of the picture: dates, camera names, addresses, stock phrases, leftovers of HTML.

Each rule names one kind and matches the part of a caption that is of it. What all rules leave over decides: "harbour at
dusk, photographed on 12 May 2014" keeps its caption, "photographed on 12 May 2014" does not (Ramesh et al. 2021,
appendix C: captions that are mostly boilerplate).
"""

import re
import unicodedata

JUDGED = 1000  # characters; a longer caption says something
FEWEST_LETTERS = 2  # in words that are no glue
GLUE = frozenset(
    {"a", "an", "the", "and", "or", "of", "on", "in", "at", "by", "to", "from", "for", "with", "via", "my"}
)
GLUE |= {"me", "is", "was", "its", "no", "as"}

MONTH = (
    r"(?:jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?|sept?(?:ember)?|oct(?:ober)?"
    r"|nov(?:ember)?|dec(?:ember)?)\b\.?"
)
DAY = r"(?:0?[1-9]|[12]\d|3[01])(?:st|nd|rd|th)?\b"
YEAR = r"(?:'\d\d|\d{4})\b"
WEEKDAY = r"(?:\b(?:mon|tue(?:s)?|wed(?:nes)?|thu(?:r|rs)?|fri|sat(?:ur)?|sun)(?:day)?\b[.,]?\s+)?"
TIME = r"(?:[\s,]*(?:at\s+|T)?\d{1,2}[:.h]\d{2}(?:[:.]\d{2})?(?:\s*[ap]\.?m\b\.?)?(?:\s*(?:utc|gmt|z)\b)?)?"
DATE = (
    rf"{WEEKDAY}\b(?:"
    r"(?:1[89]|20)\d\d(?P<a>[-/.:])(?:0?[1-9]|1[0-2])(?P=a)(?:0?[1-9]|[12]\d|3[01])(?!\d)"  # 2014-05-12
    r"|(?:0?[1-9]|[12]\d|3[01])(?P<b>[-/.])(?:0?[1-9]|[12]\d|3[01])(?P=b)(?:\d{4}|\d{2})\b"  # 12.5.14, 5/12/2014
    r"|(?:19|20)\d\d(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])(?:[-_T]?\d{6})?\b"  # 20140512
    rf"|{DAY}[\s/-]*(?:of\s+)?{MONTH}(?:[\s,/-]+{YEAR})?"  # 12 May 2014
    rf"|{MONTH}[\s-]+{DAY}(?:[\s,-]+{YEAR})?"  # May 12, 2014
    rf"|{MONTH}[\s,-]+{YEAR}"  # May 2014
    rf"|(?:1[89]|20)\d\d[\s-]+{MONTH}(?:[\s-]+{DAY})?"  # 2014 May 12
    rf"|(?:c\.|ca\.?|circa)\s*\d{{4}}s?\b|(?:1[89]|20)\d\ds?\b"  # circa 1920, 2014
    rf"){TIME}"
)
DONE = (
    r"(?:photo(?:graph(?:ed)?|s)?|pictured?|image|snapshot|captured|shot|taken|scanned|recorded|created|made|posted"
    r"|published|uploaded|updated|modified|added|dated?|date|filed)"
)
PICTURE = r"(?:photo(?:graph)?|picture|pic|image|img|illustration|vector|clip\s?art|footage|video)s?"
NO_NAME = r"(?:an?|the|this|that|these|those|i|me|my|you|your|he|him|his|she|her|it|its|we|us|our|they|them|their)"
ENDING = r"\.(?:jpe?g|png|gif|webp|bmp|tiff?|heic|svg|psd|raw|cr2|nef|arw|dng|mp4|mov)\b"
CAMERA = (
    r"img|imag|_?dsc[nf]?|_?mg|pict|pxl|mvi|gopr|dji|cimg|hpim|kic|vid|wp|p|scan|screen\s?shot|whatsapp image|fb_img"
    r"|snapchat|photo|image|picture|untitled|file"
)


# In this order: what an earlier rule takes is gone for the later ones.
PATTERNS: dict[str, tuple[str, ...]] = {
    "html": (
        r"<[^<>]*>",
        r"&(?:[a-z]{2,8}|#x?[0-9a-f]{1,6});",
        r"\{\{[^{}]*\}\}",
        r"\[/?(?:b|i|u|img|url|caption|gallery)(?:[\s=][^\[\]]*)?\]",
    ),
    "e-mail": (r"\b[\w.+-]+@[\w-]+(?:\.[\w-]+)+",),
    "address": (
        r"\b(?:https?|ftp)://\S+",
        r"\bwww\.\S+",
        r"\b[\w-]+(?:\.[\w-]+)*\.(?:com|net|org|info|biz)\b(?:/\S*)?",
    ),
    "file name": (
        rf"\b(?:{CAMERA})[\s_-]*\d[\d\s_()-]*(?:{ENDING}|\b|(?<=\)))",  # IMG_1234.jpg, DSC 0012 (3)
        rf"\b[0-9a-f]*\d[0-9a-f]{{7,}}\b(?:{ENDING})?",  # 3f2a99c01b.png
        rf"\b\w{{0,3}}\d[\d_x-]{{4,}}(?:{ENDING})",  # 12345_800x600.jpg
        ENDING,  # what is before it may be words: red-fox.jpg
    ),
    "date": (rf"(?:\b(?:{DONE}\W+(?:(?:was|were)\W+)?)+(?:(?:on|in|at|by|circa)\W+)?)?(?:the\W+)?{DATE}",),
    # A name differs from "photo by candlelight" by its capitals only, and titles have them too: "By Candlelight" and
    # "Photo By The Lake" are none. Without the possessive "*+" a long word would be cut in four in every way.
    "credit": (
        rf"\A\W*(?:{PICTURE}\s+(?:by|via)\W+(?!{NO_NAME}(?![\w.'-]))|(?:{PICTURE}\s+)?(?:\xa9|\(c\)|copyright)\W+)"
        r"(?-i:[A-Z][\w.'-]*+\W*+){1,4}\Z",
    ),
    "stock": (
        r"\b(?:getty\s?images?|i?stock\s?photos?|istock|shutterstock|alamy|dreamstime|depositphotos|123rf)\b",
        r"\b(?:adobe\s?stock|fotolia|bigstock|afp|reuters|handout|file\s+photo|editorial use only)\b",
        r"\b(?:royalty[\s-]free|rights[\s-]managed|all rights reserved|creative commons|public domain)\b",
        rf"\bstock(?:\s+{PICTURE})?\b",
        rf"\b(?:{PICTURE}\W+)?(?:credits?|courtesy)(?:\W+(?:of|to))?\b",
        r"\bcopyright\b|\xa9|\(c\)",
    ),
    "web page": (
        rf"\bclick(?:\s+(?:here|on|to|for|the|a|see|view|enlarge|zoom|open|full|size|larger|version|more|{PICTURE}))+\b",
        r"\b(?:read|view|see|show|load)\s+(?:more|full(?:\s?size)?|larger)\b",
        r"\b(?:full[\s-]?size|enlarge|zoom(?:\s+in)?|loading|coming soon|advertisements?|sponsored)\b",
        r"\b(?:share(?:\s+(?:this|on\s+\w+))?|pin\s+it|tweet)\b",
        rf"\bembedded {PICTURE} permalink\b|\b(?:{PICTURE}\s+)?may contain\b|\b{PICTURE} results? for\b",
    ),
    "placeholder": (
        rf"\b(?:{PICTURE}|screen\s?shots?|thumbnail|thumb|preview|attachment|file|gallery|slide\s?show|slide)\b",
        r"\b(?:untitled|unnamed|not? (?:title|name|caption|description|available)|available|alt\s?text|alt|title)\b",
        r"\b(?:caption|description|default|featured|placeholder|null|none|nan|undefined|unknown|n/a|test)\b",
    ),
}
RULES = tuple((name, re.compile("|".join(patterns), re.IGNORECASE)) for name, patterns in PATTERNS.items())


def boilerplate(caption: str) -> str | None:
    """The rule that takes most of the caption away, if hardly a letter is left; "no letters" if there was none."""
    if len(caption) > JUDGED:
        return None
    text = unicodedata.normalize("NFKC", caption)
    taken: dict[str, int] = {}
    for name, pattern in RULES:
        shorter = pattern.sub(" ", text)
        taken[name] = sum(map(str.isalnum, text)) - sum(map(str.isalnum, shorter))
        text = shorter
    words = [word for word in re.findall(r"\w+", text.lower()) if word not in GLUE]
    if sum(map(str.isalpha, "".join(words))) >= FEWEST_LETTERS:
        return None
    name = max(taken, key=lambda name: taken[name])
    if taken[name]:
        return name
    return None if any(map(str.isalpha, caption)) else "no letters"
