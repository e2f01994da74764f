"""The house rules that a machine can check: who imports whom, how large things are, what an import does."""

import ast
import importlib.util
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
RUNG = {"pretrain": 3, "dvae": 2, "data_pipeline": 1, "kernels": 0, "cluster": 0}
BESIDE = {"tests", "benchmarks"}  # may import anything, imported by nobody
DOORS = {  # the files that may import a vendor: one file, or all below a folder
    "deepspeed": "pretrain/engine",
    "fsspec": "data_pipeline/remote.py",
    "py3langid": "data_pipeline/languages.py",
    "sentencepiece": "data_pipeline/bpe.py",
    "tensorboard": "cluster/metrics.py",
    "triton": "kernels/",
    "webdataset": "tests/",
}
# Triton is not installed everywhere: a kernel's door imports its Triton module at first use.
LAZY_DOORS = ("kernels/attention.py", "kernels/boundary.py", "kernels/low_bit.py", "kernels/relaxed_codes.py")
ENVIRONMENT_DOORS = {"cluster/process.py", "pretrain/engine_start.py"}  # the latter hands DeepSpeed the device's name
LAUNCHER_VARIABLES = re.compile(r"(LOCAL_|GROUP_|NODE_)?(RANK|WORLD_SIZE)|MASTER_(ADDR|PORT)")
BARRED_NAMES = {"utils", "util", "common", "misc", "base", "manager", "helpers"}
MAX_FILE_LINES, MAX_FUNCTION_LINES = 400, 60
MACHINE_PATH = re.compile(r"(?<![\w.}<])/(?:work|home|root|Users|tmp|mnt|scratch)/")

# Run in a fresh process: loads the vendors first, then tells what the import of our modules alone does.
WATCH_IMPORTS = """
import importlib, json, os, sys, tempfile, threading
vendors, modules, answer = json.loads(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3]
for name in vendors:
    importlib.import_module(name)
import torch
reads, started = [], []

class Watched(type(os.environ)):
    def __getitem__(self, key):
        reads.append(key)
        return super().__getitem__(key)

    def __iter__(self):
        reads.append("all of it")
        return super().__iter__()

real_start = threading.Thread.start
threading.Thread.start = lambda self: (started.append(self.name), real_start(self))[1]
caught = tempfile.TemporaryFile()
threads = threading.active_count()
sys.stdout.flush()
os.dup2(caught.fileno(), 1)
os.dup2(caught.fileno(), 2)
os.environ.__class__ = Watched
for name in modules:
    importlib.import_module(name)
sys.stdout.flush()
sys.stderr.flush()
caught.seek(0)
with open(answer, "w") as file:
    json.dump({
        "printed": caught.read().decode(), "reads": list(reads), "started": started,
        "threads": threading.active_count() - threads,
        "deepspeed": "deepspeed" in sys.modules,
        "cuda": torch.cuda.is_initialized(), "group": torch.distributed.is_initialized(),
    }, file)
"""


@cache
def project_files() -> tuple[Path, ...]:
    """Files of the checkout, relative to its root: what git has or would take; all but hidden ones without git."""
    words = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"]
    answer = subprocess.run(words, capture_output=True, text=True, check=False)
    if answer.returncode == 0:
        found = [Path(line) for line in answer.stdout.splitlines()]
    else:
        found = [path.relative_to(ROOT) for path in ROOT.rglob("*")]
        found = [path for path in found if not any(part.startswith(".") for part in path.parts)]
    return tuple(sorted(path for path in found if (ROOT / path).is_file()))


def python_files() -> list[Path]:
    return [path for path in project_files() if path.suffix == ".py"]


def source_files() -> list[Path]:
    """Python files of the packages, without tests and benchmarks."""
    return [path for path in python_files() if path.parts[0] not in BESIDE]


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text(), str(path))


def module_name(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def modules() -> dict[str, Path]:
    return {module_name(path): path for path in source_files()}


def imports_of(path: Path) -> Iterator[tuple[str, int]]:
    """(dotted name, line) of everything a file imports; `from package import module` names the module."""
    package = path.parent.parts
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = ".".join(package[: len(package) + 1 - node.level]) if node.level else ""
            name = ".".join(part for part in (above, node.module) if part)
            submodules = [f"{name}.{alias.name}" for alias in node.names if f"{name}.{alias.name}" in modules()]
            yield from ((found, node.lineno) for found in submodules or [name])
        elif isinstance(node, ast.Call) and is_dynamic_import(node) and isinstance(node.args[0], ast.Constant):
            yield str(node.args[0].value), node.lineno


def is_dynamic_import(node: ast.Call) -> bool:
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    return name in ("import_module", "__import__") and bool(node.args)


def functions_of(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(parsed(path)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def vendor_of(name: str) -> str:
    """The door's name of an imported module: torch.utils.tensorboard is tensorboard too."""
    return "tensorboard" if name.startswith("torch.utils.tensorboard") else name.split(".")[0]


def outside_modules() -> list[str]:
    """What the packages import at the top of their files from elsewhere, the standard library included."""
    top = [(path, node) for path in source_files() for node in parsed(path).body]
    names = {alias.name for _, node in top if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for _, node in top if isinstance(node, ast.ImportFrom) and node.module}
    return sorted(name for name in names if name.split(".")[0] not in RUNG)


def test_the_packages_are_the_five_of_the_ladder() -> None:
    folders = {path.parts[0] for path in python_files()}
    assert folders - {"benchmarks"} == {*RUNG, "tests"}
    assert all((ROOT / package / "__init__.py").is_file() for package in RUNG)
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]["include"]
    assert {pattern.removesuffix("*") for pattern in listed} == set(RUNG)


def test_an_import_goes_only_downward() -> None:
    upward = []
    for path in source_files():
        for name, line in imports_of(path):
            here, there = path.parts[0], name.split(".")[0]
            if there in BESIDE or (there in RUNG and there != here and RUNG[there] >= RUNG[here]):
                upward.append(f"{path}:{line} imports {name}")
    assert not upward


def test_there_is_no_circle_of_imports() -> None:
    graph = {
        name: {found for found, _ in imports_of(path) if found in modules() and found != name}
        for name, path in modules().items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"circle: {' <- '.join(error.args[1])}")


def test_a_vendor_has_one_door() -> None:
    strays = [
        f"{path}:{line} imports {name}, which only {DOORS[vendor_of(name)]} may"
        for path in source_files()
        for name, line in imports_of(path)
        if vendor_of(name) in DOORS and not str(path).startswith(DOORS[vendor_of(name)])
    ]
    assert not strays


def test_no_import_statement_stands_in_a_function() -> None:
    lines = [
        f"{path}:{inner.lineno} in {function.name}"
        for path in source_files()
        for function in functions_of(path)
        for inner in ast.walk(function)
        if isinstance(inner, ast.Import | ast.ImportFrom)
    ]
    assert not lines


def test_a_module_named_at_run_time_is_a_verb_or_deepspeed_or_holds_triton_kernels() -> None:
    dynamic = {
        str(path)
        for path in source_files()
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.Call) and is_dynamic_import(node)
    }
    assert dynamic <= {"pretrain/cli.py", "pretrain/engine_start.py", "data_pipeline/remote.py", *LAZY_DOORS}


def test_a_door_imports_its_triton_kernels_late_and_nothing_else() -> None:
    for path in LAZY_DOORS:
        at_top = [alias for node in parsed(Path(path)).body for alias in getattr(node, "names", [])]
        late = [
            ast.unparse(node.args[0])
            for node in ast.walk(parsed(Path(path)))
            if isinstance(node, ast.Call) and is_dynamic_import(node)
        ]
        assert late == [repr(f"{module_name(Path(path))}_triton")]
        assert not [alias.name for alias in at_top if "triton" in alias.name]


def test_only_one_file_reads_the_launchers_variables() -> None:
    strays = []
    for path in source_files():
        for node in ast.walk(parsed(path)):
            touches = isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv", "putenv")
            names = isinstance(node, ast.Constant) and LAUNCHER_VARIABLES.fullmatch(str(node.value))
            if touches and str(path) not in ENVIRONMENT_DOORS:
                strays.append(f"{path} touches the environment: {ast.unparse(node)}")
            if names and str(path) != "cluster/process.py":
                strays.append(f"{path} names {ast.unparse(node)}")
    assert not strays


def test_importing_does_nothing(tmp_path: Path) -> None:
    """No print, thread, environment read, device or process group; and DeepSpeed stays unloaded."""
    answer = tmp_path / "answer.json"
    vendors = [name for name in outside_modules() if importlib.util.find_spec(name.split(".")[0])]
    words = [json.dumps(vendors), json.dumps(sorted(modules())), str(answer)]
    done = subprocess.run(
        [sys.executable, "-c", WATCH_IMPORTS, *words], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert answer.is_file(), done.stderr
    assert json.loads(answer.read_text()) == {
        "printed": "", "reads": [], "started": [], "threads": 0, "deepspeed": False, "cuda": False, "group": False,
    }  # fmt: skip


def test_files_and_functions_keep_to_the_budget() -> None:
    lines = {str(path): len((ROOT / path).read_text().splitlines()) for path in python_files()}
    assert not {path: count for path, count in lines.items() if count > MAX_FILE_LINES}
    lines = {
        f"{path}:{function.lineno} {function.name}": (function.end_lineno or 0) - function.lineno + 1
        for path in python_files()
        for function in functions_of(path)
    }
    assert not {function: count for function, count in lines.items() if count > MAX_FUNCTION_LINES}


def test_every_file_says_why_it_exists() -> None:
    """An empty file needs no words."""
    assert not [str(path) for path in python_files() if parsed(path).body and not ast.get_docstring(parsed(path))]


def test_no_file_has_a_name_that_says_nothing() -> None:
    assert not [str(path) for path in python_files() if BARRED_NAMES & set(path.with_suffix("").parts)]


def test_no_file_names_a_path_of_one_machine() -> None:
    found = []
    for path in project_files():
        try:
            lines = (ROOT / path).read_text().splitlines()
        except UnicodeDecodeError:
            continue
        found += [f"{path}:{number} {line}" for number, line in enumerate(lines, 1) if MACHINE_PATH.search(line)]
    assert not found


def test_sources_are_ascii() -> None:
    assert not [str(path) for path in python_files() if not (ROOT / path).read_text().isascii()]
