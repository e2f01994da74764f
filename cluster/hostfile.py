"""DeepSpeed's hostfile: which hosts, how many processes on each, and which of them are meant."""

import re
from pathlib import Path

from cluster.settings import SettingError

LINE = re.compile(r"(\S+)\s+slots=([1-9]\d*)\s*(#.*)?")
NAME = re.compile(r"[A-Za-z0-9_][\w.:@-]*")  # never a flag for ssh, never words for a shell


def read_hostfile(path: Path) -> dict[str, int]:
    """Slots of each host, in the file's order. SettingError naming file and line where it is not `HOST slots=8`."""
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingError(f"hostfile={str(path)!r} cannot be read: {error}") from None
    hosts: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        found = LINE.fullmatch(text)
        if not found or not NAME.fullmatch(found[1]):
            raise SettingError(f"{path}, line {number}: {text!r} must be a host and its processes, as `node1 slots=8`")
        if found[1] in hosts:
            raise SettingError(f"{path}, line {number}: {found[1]} stands in the file twice")
        hosts[found[1]] = int(found[2])
    if not hosts:
        raise SettingError(f"{path} names no host; a line is `node1 slots=8`")
    return hosts


def chosen_slots(hosts: dict[str, int], include: str = "", exclude: str = "") -> dict[str, list[int]]:
    """Slots of each host that are meant, in the hostfile's order.

    include, exclude: DeepSpeed's words, as "node1@node2:0,2": hosts with @ between, each with some of its slots, or
    with all. SettingError for both, for what is not in the hostfile, and if nothing is left.
    """
    if include and exclude:
        raise SettingError(f"include={include!r} and exclude={exclude!r} cannot be given together")
    everything = {host: list(range(slots)) for host, slots in hosts.items()}
    if include:
        named = _read_choice("include", include, everything)
        left = {host: named.get(host, []) for host in hosts}
    else:
        named = _read_choice("exclude", exclude, everything) if exclude else {}
        left = {host: [slot for slot in slots if slot not in named.get(host, [])] for host, slots in everything.items()}
    left = {host: slots for host, slots in left.items() if slots}
    if not left:
        raise SettingError(f"include={include!r} exclude={exclude!r} leaves no process of {', '.join(hosts)}")
    return left


def _read_choice(name: str, text: str, everything: dict[str, list[int]]) -> dict[str, list[int]]:
    chosen: dict[str, list[int]] = {}
    for part in text.split("@"):
        host, colon, numbers = part.partition(":")
        if host not in everything:
            raise SettingError(f"{name}={text!r}: host {host!r} is not in the hostfile: {', '.join(everything)}")
        if colon and not re.fullmatch(r"\d+(,\d+)*", numbers):
            raise SettingError(f"{name}={text!r}: {part!r} must be a host, or a host and its slots, as node2:0,2")
        slots = [int(number) for number in numbers.split(",")] if colon else everything[host]
        if unknown := sorted(set(slots) - set(everything[host])):
            raise SettingError(
                f"{name}={text!r}: {host} has no slot {unknown[0]}, only 0 to {len(everything[host]) - 1}"
            )
        chosen[host] = sorted(set(chosen.get(host, []) + slots))
    return chosen
