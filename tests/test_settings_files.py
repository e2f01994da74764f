"""Every preset loads, every setting has a meaning and a reader, and --help and --show tell the truth."""

import ast
import dataclasses
import importlib
import typing
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import pytest

from cluster.command import Command, run_command
from cluster.settings import load_settings, preset_names
from pretrain.cli import VERBS

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("pretrain", "dvae", "data_pipeline", "kernels", "cluster")
COMMANDS: dict[str, Command] = {verb: importlib.import_module(module).COMMAND for verb, module in VERBS.items()}
PRESETS = [(verb, name) for verb, command in COMMANDS.items() for name in preset_names(command.presets)]
MERGE = " merge"  # ends what tasks of another verb began, with the same words: its presets are that verb's
GENERIC = Path("cluster/run.py")  # reads the settings that all trainers have, whatever their class


def hints_of(kind: type) -> dict[str, type]:
    return typing.get_type_hints(kind)


def classes_in(kind: type) -> set[type]:
    """The settings class and the classes of its sections."""
    below = (classes_in(hint) for hint in hints_of(kind).values() if dataclasses.is_dataclass(hint))
    return {kind}.union(*below)


def names_of(kinds: Iterable[type]) -> set[str]:
    """Of settings classes and those that they extend: what knows either may read a setting."""
    return {one.__name__ for kind in kinds for one in kind.__mro__ if dataclasses.is_dataclass(one)}


def settings_of(kind: type, prefix: str = "") -> Iterator[tuple[str, str]]:
    """(section.key, meaning) of every setting of a command."""
    for field in dataclasses.fields(kind):
        hint = hints_of(kind)[field.name]
        if dataclasses.is_dataclass(hint):
            yield from settings_of(typing.cast(type, hint), f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", field.metadata.get("meaning", "")


CLASSES = sorted(set().union(*(classes_in(command.config) for command in COMMANDS.values())), key=lambda c: c.__name__)
SECTIONS = {name for kind in CLASSES for name, hint in hints_of(kind).items() if dataclasses.is_dataclass(hint)}


@cache
def parsed() -> dict[Path, ast.Module]:
    paths = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    return {path.relative_to(ROOT): ast.parse(path.read_text()) for path in paths}


@cache
def names_in(path: Path) -> frozenset[str]:
    """Every name that a file uses."""
    return frozenset(node.id for node in ast.walk(parsed()[path]) if isinstance(node, ast.Name)) | frozenset(
        node.name for node in ast.walk(parsed()[path]) if isinstance(node, ast.alias | ast.ClassDef)
    )


@cache
def settings_read_in(path: Path) -> frozenset[str]:
    """Attributes that a file takes from settings: `config.key`, `section.key`, `self.key` in a settings class.

    `__post_init__` does not count: a setting that is only checked does nothing. Nor does a call.
    """
    nodes = list(ast.walk(parsed()[path]))
    settings_classes = [n for n in nodes if isinstance(n, ast.ClassDef) and n.name in names_of(CLASSES)]
    inside = {id(inner) for n in settings_classes for inner in ast.walk(n)}
    checks = [n for n in nodes if isinstance(n, ast.FunctionDef) and n.name == "__post_init__"]
    passed_over = {id(inner) for n in checks for inner in ast.walk(n)}
    passed_over |= {id(n.func) for n in nodes if isinstance(n, ast.Call)}
    read = set()
    for node in nodes:
        if isinstance(node, ast.Attribute) and id(node) not in passed_over:
            owner = node.value.attr if isinstance(node.value, ast.Attribute) else getattr(node.value, "id", "")
            if owner.endswith("config") or owner in SECTIONS or (owner == "self" and id(node) in inside):
                read.add(node.attr)
    return frozenset(read)


def reached_from(path: Path, seen: frozenset[Path] = frozenset()) -> frozenset[Path]:
    """The file and all files of ours that it imports, and they in turn."""
    seen |= {path}
    for node in parsed()[path].body:
        below = (
            Path(f"{node.module.replace('.', '/')}.py") if isinstance(node, ast.ImportFrom) and node.module else path
        )
        if below in parsed() and below not in seen:
            seen = reached_from(below, seen)
    return seen


def unread(verb: str) -> list[str]:
    """Settings of a verb that no file which it reaches, and which knows their class, reads."""
    reached = reached_from(Path(f"{VERBS[verb].replace('.', '/')}.py"))
    missing = []
    for kind in classes_in(COMMANDS[verb].config):
        holders = names_of(one for one in CLASSES if kind in classes_in(one))
        files = [path for path in reached if path == GENERIC or names_in(path) & holders]
        read = frozenset().union(*(settings_read_in(path) for path in files))
        missing += [f"{kind.__name__}.{name}" for name in hints_of(kind) if name not in read]
    return sorted(missing)


@pytest.mark.parametrize(("verb", "name"), PRESETS)
def test_every_preset_that_help_offers_loads(verb: str, name: str) -> None:
    assert load_settings(COMMANDS[verb].config, [name], COMMANDS[verb].presets)


def test_every_settings_file_is_a_preset_of_one_command() -> None:
    found = sorted(path for path in ROOT.glob("*/configs/**/*.toml") if path.relative_to(ROOT).parts[0] in PACKAGES)
    assert found
    verbs = {verb: command for verb, command in COMMANDS.items() if not verb.endswith(MERGE)}
    owners = {path: [verb for verb, command in verbs.items() if command.presets == path.parent] for path in found}
    assert not {str(path.relative_to(ROOT)): verbs for path, verbs in owners.items() if len(verbs) != 1}


@pytest.mark.parametrize(("verb", "name"), PRESETS)
def test_a_preset_opens_with_its_command(verb: str, name: str) -> None:
    lines = (COMMANDS[verb].presets / f"{name}.toml").read_text().splitlines()
    opening = [line for number, line in enumerate(lines) if all(above.startswith("#") for above in lines[: number + 1])]
    assert f"smalti {verb.removesuffix(MERGE)} {name}" in " ".join(line.lstrip("# ") for line in opening)


@pytest.mark.parametrize("verb", COMMANDS)
def test_every_setting_has_a_meaning(verb: str) -> None:
    assert not [key for key, meaning in settings_of(COMMANDS[verb].config) if not meaning.strip()]


@pytest.mark.parametrize("verb", COMMANDS)
def test_every_setting_is_read(verb: str) -> None:
    assert not unread(verb)


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_settings_are_frozen(kind: type) -> None:
    assert kind.__dataclass_params__.frozen  # type: ignore[attr-defined]


@pytest.mark.parametrize("verb", COMMANDS)
def test_help_names_every_setting_and_preset(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(COMMANDS[verb], ["--help"]) == 0
    told = capsys.readouterr().out
    words = set(told.replace("=", " ").split())
    assert not [key for key, _ in settings_of(COMMANDS[verb].config) if key not in words]
    assert all(name in told for name in preset_names(COMMANDS[verb].presets))


@pytest.mark.parametrize(("verb", "name"), [(verb, "") for verb in COMMANDS] + PRESETS)
def test_what_show_prints_loads_as_the_same_settings(
    verb: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command, words = COMMANDS[verb], [name] if name else []
    assert run_command(command, [*words, "--show"]) == 0
    path = tmp_path / "shown.toml"
    path.write_text(capsys.readouterr().out)
    assert load_settings(command.config, [str(path)], command.presets) == load_settings(
        command.config, words, command.presets
    )


def test_a_verb_is_its_commands_name() -> None:
    assert {verb: command.verb for verb, command in COMMANDS.items()} == {verb: verb for verb in COMMANDS}
