"""Files of one JSON object a line, written by processes that may be killed in the middle of one."""

import json
from pathlib import Path
from typing import Any


def read_records(path: Path) -> list[dict[str, Any]]:
    """The objects of a file, oldest first, or [] if there is no file. What is no whole object is passed over.

    OSError if it cannot be read.
    """
    found = []
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else ():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        found += [record] if isinstance(record, dict) else []
    return found
