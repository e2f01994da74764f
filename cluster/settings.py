"""Settings: frozen dataclasses, changed by a TOML file, changed again by `section.key=value` words.

A component declares its settings beside itself:

    @dataclass(frozen=True)
    class ModelConfig:
        d_model: int = setting(256, "width of the residual stream")

and an entry point calls `load_settings(Config, words, presets=FOLDER)`. Order: defaults < file <
words. A key that does not exist, a value of the wrong type and a broken rule (`__post_init__`
raising SettingError) stop the program with one line that names the key.
"""

import dataclasses
import json
import tomllib
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


class UserError(Exception):
    """A mistake of the user's, or of his files: its text is the one line he is shown."""


class SettingError(UserError):
    """A setting that does not exist, has the wrong type, or breaks a rule."""


def setting(default: Any, meaning: str) -> Any:
    """A dataclass field with its one-line meaning, shown by `--help`."""
    return dataclasses.field(default=default, metadata={"meaning": meaning})


def section(kind: type) -> Any:
    """A dataclass field that holds another settings dataclass."""
    return dataclasses.field(default_factory=kind)


def require_at_least_one(config: Any, names: tuple[str, ...], section: str = "") -> None:
    """SettingError naming the first of these settings that is below 1; `section` as in "model."."""
    for name in names:
        if getattr(config, name) < 1:
            raise SettingError(f"{section}{name}={getattr(config, name)} must be at least 1")


def load_settings(kind: type[T], words: list[str], presets: Path, plain: tuple[str, ...] = ()) -> T:
    """Settings of `kind` from words: at most one preset name or TOML path, then `key=value` words.

    A flag is the same as a word: `--top-k 50` and `--top-k=50` mean `top_k=50`; a flag followed by
    no value means `=true`. Where `plain` names settings, words without `=` that are no TOML path are
    their values in that order, instead of a preset. Raises SettingError.
    """
    files, changes = split_words(words)
    if plain:
        values_of_plain = [word for word in files if not word.endswith(".toml")]
        if len(values_of_plain) > len(plain):
            raise SettingError(f"{' '.join(values_of_plain)}: there are more plain words than {', '.join(plain)}")
        files = [word for word in files if word.endswith(".toml")]
        changes = [*zip(plain, values_of_plain, strict=False), *changes]
    if len(files) > 1:
        raise SettingError(f"one settings file is allowed, got {len(files)}: {' '.join(files)}")
    values = _read_toml(_find_preset(files[0], presets)) if files else {}
    for key, text in changes:
        _put(values, key.split("."), _parse(kind, key, text), key)
    return from_dict(kind, values)


def split_words(words: list[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """Split command words into (file or preset names, [(key, text of the value)])."""
    files: list[str] = []
    changes: list[tuple[str, str]] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if word.startswith("--"):
            key, equals, text = word[2:].partition("=")
            if not equals:
                has_value = rest and not rest[0].startswith("--") and "=" not in rest[0].split("/")[0]
                text = rest.pop(0) if has_value else "true"
            changes.append((key.replace("-", "_"), text))
        elif "=" in word and not word.endswith(".toml"):
            key, _, text = word.partition("=")
            changes.append((key, text))
        else:
            files.append(word)
    return files, changes


def from_dict(kind: type[T], values: dict[str, Any], where: str = "") -> T:
    """Build settings of `kind` from nested dicts, refusing unknown keys and wrong types."""
    fields = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(kind)
    built: dict[str, Any] = {}
    for key, value in values.items():
        path = f"{where}{key}"
        if key not in fields:
            raise SettingError(f"setting {path!r} does not exist; {where or 'here'} has: {', '.join(fields)}")
        hint = hints[key]
        if dataclasses.is_dataclass(hint):
            if not isinstance(value, dict):
                raise SettingError(f"setting {path!r} is a section, not the value {value!r}")
            built[key] = from_dict(typing.cast(type, hint), value, f"{path}.")
        else:
            built[key] = _checked(hint, path, value)
    return kind(**built)


def to_dict(config: Any) -> dict[str, Any]:
    """The resolved settings as nested dicts of plain values (JSON-ready)."""
    return {
        key: list(value) if isinstance(value, tuple) else value for key, value in dataclasses.asdict(config).items()
    }


def to_toml(config: Any, prefix: str = "") -> str:
    """The resolved settings as TOML that `load_settings` reads back."""
    plain, sections = [], []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            sections.append(f"\n[{prefix}{field.name}]\n{to_toml(value, f'{prefix}{field.name}.')}")
        else:
            plain.append(f"{field.name} = {_toml_value(value)}\n")
    return "".join(plain + sections)


def describe(kind: type, prefix: str = "") -> str:
    """One line a setting, for `--help`: key, default, meaning."""
    lines = []
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        if dataclasses.is_dataclass(hints[field.name]):
            lines.append(describe(typing.cast(type, hints[field.name]), f"{prefix}{field.name}."))
        else:
            key = f"{prefix}{field.name}={_toml_value(field.default)}"
            lines.append(f"  {key:<36} {field.metadata['meaning']}")
    return "\n".join(lines)


def preset_names(presets: Path) -> list[str]:
    """Names of the presets in a folder, sorted."""
    return sorted(path.stem for path in presets.glob("*.toml"))


def _find_preset(name: str, presets: Path) -> Path:
    path = Path(name)
    if path.suffix == ".toml":
        if not path.is_file():
            raise SettingError(f"settings file {name} does not exist")
        return path
    path = presets / f"{name}.toml"
    if not path.is_file():
        known = ", ".join(preset_names(presets))
        raise SettingError(f"no preset is named {name!r}; there are: {known}; or give a path to a .toml file")
    return path


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingError(f"settings file {path} is not valid TOML: {error}") from None


def _parse(kind: type, key: str, text: str) -> Any:
    """Read a word's value by the type its key was declared with."""
    hint: Any = kind
    for part in key.split("."):
        hints = typing.get_type_hints(hint) if dataclasses.is_dataclass(hint) else {}
        if part not in hints:
            return text  # from_dict names the unknown key
        hint = hints[part]
    if _accepts_text(hint):
        return text
    if typing.get_origin(hint) is tuple and not text.startswith("["):
        if _accepts_text(typing.get_args(hint)[0]):
            return [part for part in text.split(",") if part]
        text = f"[{text}]"
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text  # from_dict names the wrong type


def _accepts_text(hint: Any) -> bool:
    options = typing.get_args(hint) if typing.get_origin(hint) is typing.Literal else ()
    return hint is str or any(isinstance(option, str) for option in options)


def _checked(hint: Any, path: str, value: Any) -> Any:
    """The value if it fits the declared type; an int is taken where a float is declared."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        if value not in args:
            raise SettingError(f"setting {path}={value!r} must be one of {', '.join(map(repr, args))}")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise SettingError(f"setting {path}={value!r} must be a list")
        return tuple(_checked(args[0], f"{path}[{i}]", item) for i, item in enumerate(value))
    if isinstance(hint, types.UnionType):
        raise TypeError(f"{path}: settings have one type, not {hint}")
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        raise SettingError(f"setting {path}={value!r} must be of type {hint.__name__}, not {type(value).__name__}")
    return value


def _put(values: dict[str, Any], parts: list[str], value: Any, key: str) -> None:
    for part in parts[:-1]:
        values = values.setdefault(part, {})
        if not isinstance(values, dict):
            raise SettingError(f"setting {key!r}: {part!r} is a value, not a section")
    values[parts[-1]] = value


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")  # TOML's escapes are JSON's
    if isinstance(value, tuple | list):
        return "[" + ", ".join(_toml_value(item) for item in value) + "]"
    return repr(value)
