"""What the three launches share: their words hold the words of another verb, which are checked before all else."""

import dataclasses
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from cluster.command import Command
from cluster.launch import LaunchConfig, Program
from cluster.settings import SettingError, split_words, to_toml
from pretrain.cli import VERBS, command_of, split_verb

TOGETHER = ("preprocess", "dvae", "tokenise", "train", "sample", "doctor")  # verbs whose processes share one work
PRESETS = Path(__file__).parent / "configs" / "launch"


class LaunchCommand(Command):
    """A verb whose words end with another verb and its words."""

    def settings(self, words: list[str]) -> Any:
        own, command = split_at_verb(words, self.config)
        if unknown := [word for word in split_words(own)[0] if not word.endswith(".toml")]:
            raise SettingError(f"{unknown[0]!r} is no verb; there are: {', '.join(launchable())}")
        config: LaunchConfig = super().settings(own)
        config = replace(config, command=tuple(command)) if command else config
        if config.command:
            program_of(config.command)
        return config

    def help(self) -> str:
        usage, _, rest = super().help().partition("\n")
        return usage.replace("[PRESET | FILE.toml]", "[FILE.toml]") + " VERB words...\n" + rest


def launched_by(start: Callable[[Any, Program], int]) -> Callable[[Any], None]:
    """What a launch runs: `start` on its settings and the program, whose exit code becomes the launch's."""

    def run(config: LaunchConfig) -> None:
        if not config.command:
            raise SettingError(f"no verb was given; it comes last: {', '.join(launchable())}")
        if code := start(config, program_of(config.command)):
            sys.exit(code)

    return run


def launchable() -> list[str]:
    """All verbs but the launches."""
    return [verb for verb in VERBS if not verb.startswith("launch ")]


def split_at_verb(words: list[str], config: type) -> tuple[list[str], list[str]]:
    """The words of the launch, and from the first that names a verb on the words of that.

    The value behind a flag names none: the word after `--partition` is its value, that after `--dry-run` is not.
    """
    kinds = {field.name: field.type for field in dataclasses.fields(config)}
    at = 0
    while at < len(words) and split_verb(words[at:])[0] not in VERBS:
        flag, equals, _ = words[at].partition("=")
        takes_value = flag.startswith("--") and not equals and kinds.get(flag[2:].replace("-", "_")) is not bool
        at += 2 if takes_value else 1
    return words[:at], words[at:]


def program_of(words: tuple[str, ...]) -> Program:
    """The verb and its words as a program. SettingError if they are wrong."""
    verb, rest = split_verb(list(words))
    if verb not in launchable():
        raise SettingError(f"{verb!r} is no verb that can be launched; there are: {', '.join(launchable())}")
    try:
        config = command_of(verb).settings(rest)
    except SettingError as error:
        raise SettingError(f"{verb}: {error}") from None
    folder = getattr(config, "out", "")
    return Program(verb, VERBS[verb], tuple(rest), Path(folder) if folder else None, to_toml(config), verb in TOGETHER)
