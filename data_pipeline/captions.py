"""Captions: found in a sample's files, and cleaned the same way everywhere."""

import json
import unicodedata

CAPTION_ENDINGS = ("txt", "caption", "cap")


def find_caption(files: dict[str, bytes], json_field: str) -> str:
    """The sample's caption ("" if it has none): a text member first, else a field of its json."""
    for ending in CAPTION_ENDINGS:
        if ending in files:
            return files[ending].decode("utf-8", errors="replace").strip()
    try:
        value = json.loads(files.get("json", b"{}")).get(json_field)
    except (ValueError, AttributeError, RecursionError):
        return ""
    return value.strip() if isinstance(value, str) else ""


def clean(caption: str) -> str:
    """NFKC, lower case, single spaces: what the vocabulary is learnt from and applied to."""
    return " ".join(unicodedata.normalize("NFKC", caption).lower().split())
