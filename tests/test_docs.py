"""Words are checked too: paths, commands, make targets and modules that the documents name are there."""

import ast
import importlib
import importlib.machinery
import re
import shlex
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from cluster.command import Command
from pretrain.cli import VERBS, split_verb

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("pretrain", "dvae", "data_pipeline", "kernels", "cluster")
FOLDERS = (*PACKAGES, "tests", "benchmarks", ".ci")
ENDINGS = (".py", ".md", ".toml", ".csv")
FOLDER_READMES = sorted(str(path.relative_to(ROOT)) for one in PACKAGES for path in (ROOT / one).rglob("README.md"))
DOCUMENTS = ["README.md", "CONTRIBUTING.md", *FOLDER_READMES]
MODULES = [str(path.relative_to(ROOT)) for one in PACKAGES for path in sorted((ROOT / one).rglob("*.py"))]

FENCE = re.compile(r"^```.*?\n(.*?)^```", re.M | re.S)
SPAN = re.compile(r"`([^`]+)`")
LINK = re.compile(r"\]\(([^)#\s]+)")
PROGRAM = re.compile(r"(?:\S*/)?(smalti|python3?|deepspeed|torchrun|make)")
PLACEHOLDER = re.compile(r"\.\.\.|[A-Z][A-Z0-9_]+(\.\w+)?")


@cache
def snippets(document: str) -> tuple[str, ...]:
    """Lines of fenced blocks (continued lines joined) and the texts between backticks."""
    text = (ROOT / document).read_text()
    blocks = [block.replace("\\\n", " ") for block in FENCE.findall(text)]
    lines = [line.strip() for block in blocks for line in block.splitlines()]
    return tuple(line for line in lines if line) + tuple(SPAN.findall(FENCE.sub("", text)))


def docstring_lines(module: str) -> list[str]:
    """Indented lines of a module's docstring; what stands three spaces to the right is a remark."""
    text = ast.get_docstring(ast.parse((ROOT / module).read_text())) or ""
    return [re.split(r"\s{2,}", line.strip())[0] for line in text.splitlines() if line.startswith("    ")]


def commands_in(lines: list[str] | tuple[str, ...]) -> Iterator[list[str]]:
    """The commands of ours among the lines, as lists of words from the program's name on."""
    for line in lines:
        for part in re.split(r"\s*(?:&&|\|\||[;|])\s+", line.removeprefix("$ ")):
            try:
                words = shlex.split(part, comments=True)
            except ValueError:
                continue
            while words and re.fullmatch(r"(\w+=\S*|srun|nohup|nice|time)", words[0]):
                words.pop(0)
            if words and (program := PROGRAM.fullmatch(words[0])):
                yield [program[1], *words[1:]]


@cache
def command_of(verb: str) -> Command:
    return importlib.import_module(VERBS[verb]).COMMAND


def problem_with_words(verb: str, words: list[str]) -> str | None:
    """What is wrong with the words given to a verb, or None. Placeholders and files of the reader's are passed over."""
    if verb not in VERBS:
        return f"no verb {verb}"
    kept = [word for word in words if word not in ("--help", "--show") and not PLACEHOLDER.fullmatch(word)]
    kept = [word for word in kept if not word.endswith(".toml") or word.startswith(FOLDERS) or "=" in word]
    try:
        command_of(verb).settings(kept)
    except Exception as error:  # whatever a reader would meet
        return str(error)
    return None


def problem_with(command: list[str]) -> str | None:
    """What is wrong with a command, or None."""
    program, words = command[0], command[1:]
    if program == "make":
        targets = [word for word in words if "=" not in word and not word.startswith("-")]
        return next((f"no target {target}" for target in targets if target not in make_targets()), None)
    if program == "smalti":
        usage = not words or words[0] == "VERB" or words[0].startswith("-")
        return None if usage else problem_with_words(*split_verb(words))
    flag = next((word for word in words if word in ("-m", "--module")), None)
    if flag is None or words[-1] == flag:
        return None
    module, rest = words[words.index(flag) + 1], words[words.index(flag) + 2 :]
    if PLACEHOLDER.fullmatch(module):
        return None
    verbs = [verb for verb, its_module in VERBS.items() if its_module == module]
    if verbs:
        return problem_with_words(verbs[0], rest)
    return None if module_exists(module) else f"no module {module}"


def module_exists(name: str) -> bool:
    """True if `python -m NAME` would find something; imports nothing."""
    where: list[str] | None = [str(ROOT), *sys.path]
    at = ""
    for part in name.split("."):
        at = f"{at}.{part}" if at else part
        spec = importlib.machinery.PathFinder.find_spec(at, where)
        if spec is None:
            return False
        where = list(spec.submodule_search_locations or [])
    return True


@cache
def make_targets() -> frozenset[str]:
    return frozenset(re.findall(r"^([A-Za-z][\w-]*)\s*:(?!=)", (ROOT / "Makefile").read_text(), re.M))


def paths_in(snippet: str) -> Iterator[str]:
    """Words of a snippet that look like files or folders of this repository."""
    for word in snippet.split():
        word = word.rpartition("=")[2].strip("`'\"()[],;:").rstrip(".")
        word = re.sub(r"(::\w+|:\d+)+$", "", word).removeprefix("./")
        first, slash, _ = word.partition("/")
        ours = first in FOLDERS if slash else word.endswith(ENDINGS) or word in ("Makefile", "LICENSE")
        placeholder = any(PLACEHOLDER.fullmatch(part) for part in word.split("/")) and not word.endswith(".md")
        if ours and not placeholder and re.fullmatch(r"[\w./*{},-]+", word):
            yield word


def path_exists(word: str) -> bool:
    """True if the word, which may hold {a,b} and *, names something here; a bare file name may lie anywhere."""
    braces = re.search(r"\{([^{}]*)\}", word)
    if braces:
        choices = (word[: braces.start()] + choice + word[braces.end() :] for choice in braces[1].split(","))
        return all(path_exists(choice) for choice in choices)
    if "/" in word:
        return any(ROOT.glob(word.rstrip("/")))
    return any(ROOT.glob(word)) or any(any((ROOT / folder).rglob(word)) for folder in FOLDERS)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_path_that_a_document_names_exists(document: str) -> None:
    assert not sorted({p for snippet in snippets(document) for p in paths_in(snippet) if not path_exists(p)})


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_link_to_a_file_leads_somewhere(document: str) -> None:
    targets = [target for target in LINK.findall((ROOT / document).read_text()) if "://" not in target]
    assert not [target for target in targets if not ((ROOT / document).parent / target).exists()]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_command_in_a_document_would_be_accepted(document: str) -> None:
    """Verbs, presets, keys and values as the program reads them; make targets; modules behind -m."""
    found = {shlex.join(command): problem_with(command) for command in commands_in(snippets(document))}
    assert not {command: problem for command, problem in found.items() if problem}


@pytest.mark.parametrize("module", MODULES)
def test_every_command_in_a_docstring_would_be_accepted(module: str) -> None:
    found = {shlex.join(command): problem_with(command) for command in commands_in(docstring_lines(module))}
    assert not {command: problem for command, problem in found.items() if problem}


def test_the_readme_shows_how_to_run_every_stage() -> None:
    """As `smalti VERB`, as its module, or as a make target of that name."""
    commands = list(commands_in(snippets("README.md")))
    words = {word for command in commands for word in (*command, " ".join(command[1:3]))}
    assert not [verb for verb, module in VERBS.items() if not {verb, module} & words]


@pytest.mark.parametrize("document", [*DOCUMENTS, "CHANGELOG.md"])
def test_no_blank_is_left_to_fill_in(document: str) -> None:
    assert not re.findall(r"@[A-Z_]+@|\b(?:TODO|TBD|FIXME|XXX)\b", (ROOT / document).read_text())


def test_the_emoji_readme_tells_the_size_of_every_file() -> None:
    folder = ROOT / "data_pipeline" / "emoji"
    text = (folder / "README.md").read_text()
    sizes = {path.name: path.stat().st_size for path in folder.glob("*.tar.gz")}
    assert sizes
    assert not [name for name, size in sizes.items() if f"`{name}`" not in text or f"{size:,}" not in text]


def test_the_checks_tell_wrong_words_from_right_ones() -> None:
    """The tests above, tested: each of these is a mistake that a document could hold."""
    wrong = [
        "smalti trian emoji", "smalti train emojy", "smalti train emoji n_stepps=3", "smalti sample --top-k many",
        "smalti dvae improt encoder.pkl decoder.pkl", "smalti dvae import a.pkl b.pkl c.pkl",
        "make tea", "python -m pretrain.tarin", "deepspeed --num_gpus 8 --module pretrain.train no-such-preset",
    ]  # fmt: skip
    right = [
        "smalti VERB --help", "smalti dvae import encoder.pkl decoder.pkl out=runs/dvae",
        "smalti train emoji --n_steps 3 zero_stage=2", "smalti dvae my.toml --show",
        "make test", "$ .venv/bin/smalti rerank samples=samples  # a remark", "python -m pytest -q",
        "deepspeed --num_gpus 8 --module pretrain.train emoji data.batch=256", "X=1 torchrun -m pretrain.train FILE",
    ]  # fmt: skip
    problems = [[problem_with(command) for command in commands_in([line])] for line in wrong]
    assert all(len(found) == 1 and found[0] for found in problems), dict(zip(wrong, problems, strict=True))
    problems = [[problem_with(command) for command in commands_in([line])] for line in right]
    assert problems == [[None]] * len(right), dict(zip(right, problems, strict=True))
    text = (
        "see `cluster/process.py`, pretrain/model.py:12 and dvae/{model,moddel}.py or data/images, KEY.json, FILE.toml"
    )
    assert list(paths_in(text)) == ["cluster/process.py", "pretrain/model.py", "dvae/{model,moddel}.py"]
    assert [path_exists(path) for path in paths_in(text)] == [True, True, False]
