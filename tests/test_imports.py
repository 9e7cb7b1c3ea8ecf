"""The architecture's lock: who may import whom, what may be called at all, and how long a file may be.

Everything is read with ``ast``, imports inside functions included; the rules are first shown to catch what they forbid.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from loaders.families import FILES
from tests.small import built

ROOT = Path(__file__).resolve().parent.parent
HOUSE = ("loaders", "edge", "export")
SOURCES = sorted(path.relative_to(ROOT).as_posix() for top in HOUSE for path in (ROOT / top).rglob("*.py"))
MODULES = sorted(name.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for name in SOURCES)
MOST_LINES = 420

# Who may import what besides the standard library. What stands in LAZY is imported inside functions only.
EVERYWHERE = {
    "loaders": {"numpy", "loaders"},
    "edge": {"numpy", "psutil", "edge", "loaders"},
    "export": {"numpy", "onnx", "export", "loaders"},
}
LAZY = {
    "loaders/text/": {"tokenizers", "jinja2"},
    "edge/cli/": {"export"},
}
EXTRA = {
    "edge/cli/": {"click", "rich"},
    "edge/profile/report/": {"plotly"},
    # Runs in a Python that has nothing of edge.
    "edge/profile/peer_child.py": {"llama_cpp"},
}
ENGINES = {"torch", "onnxruntime", "triton"}


@dataclass(frozen=True)
class Import:
    """One imported module, and whether the import happens only when a function runs."""

    module: str
    line: int
    lazy: bool

    @property
    def top(self) -> str:
        return self.module.partition(".")[0]


def parsed(path: str) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"), path)


def imports(tree: ast.AST, path: str) -> Iterator[Import]:
    """Every import, relative ones resolved, ``import_module`` and ``__import__`` included."""
    package = path.split("/")[:-1]

    def walk(node: ast.AST, lazy: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno, lazy) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            yield Import(".".join([*base, *filter(None, [node.module])]), node.lineno, lazy)
        elif isinstance(node, ast.Call) and called(node) in ("import_module", "__import__"):
            yield Import(literal(node.args[0]), node.lineno, lazy)
        inside = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from walk(child, inside)

    yield from walk(tree, False)


def called(node: ast.Call) -> str:
    """The last name of what is called: ``load`` for ``torch.load(...)``."""
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


def literal(node: ast.expr) -> str:
    """The constant beginning of a string; a computed name is no name that a reader could check."""
    if isinstance(node, ast.JoinedStr) and node.values:
        node = node.values[0]
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else "?"


def arrows(tree: ast.AST, path: str) -> list[str]:
    """Every import of a file that the house does not allow it."""
    allowed = EVERYWHERE[path.partition("/")[0]] | {
        n for at, names in EXTRA.items() if path.startswith(at) for n in names
    }
    lazily = {n for at, names in LAZY.items() if path.startswith(at) for n in names}
    if path.rpartition("/")[0] == "edge/engine":
        allowed = allowed | ENGINES
    return [
        f"{path}:{found.line} imports {found.module}"
        for found in imports(tree, path)
        if not (found.top in sys.stdlib_module_names or found.top in allowed or (found.top in lazily and found.lazy))
    ]


FORBIDDEN_MODULES = {
    *("pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "code", "runpy"),
    *("socket", "urllib", "http", "ftplib", "requests", "httpx", "huggingface_hub", "transformers"),
}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "system", "popen"}


def dangers(tree: ast.AST, path: str) -> list[str]:
    """Ways to run code that a file brings along, or to fetch one."""
    found = [f"{path}:{i.line} imports {i.module}" for i in imports(tree, path) if i.top in FORBIDDEN_MODULES]
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        plain = isinstance(node.func, ast.Name) or name.startswith(("os.", "builtins."))
        if (plain and called(node) in FORBIDDEN_CALLS) or name in (
            "torch.load",
            "np.load",
            "numpy.load",
            "torch.hub.load",
        ):
            found.append(f"{path}:{node.lineno} calls {name}")
        for keyword in node.keywords:
            harmless = isinstance(keyword.value, ast.Constant) and not keyword.value.value
            if keyword.arg in ("allow_pickle", "trust_remote_code", "shell") and not harmless:
                found.append(f"{path}:{node.lineno} passes {keyword.arg}")
    return found


NAMES = frozenset(FILES) | {f"{name}_text" for name in FILES}


def names(tree: ast.AST, path: str) -> list[str]:
    """Places that ask which family a model is of, or spell one, outside the family files."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in NAMES:
            found.append(f"{path}:{node.lineno} spells {node.value!r}")
        sides = [node.left, *node.comparators] if isinstance(node, ast.Compare) else []
        sides += [node.subject] if isinstance(node, ast.Match) else []
        for side in sides:
            if isinstance(side, ast.Attribute) and side.attr in ("model_type", "family", "title", "architectures"):
                found.append(f"{path}:{node.lineno} compares {ast.unparse(side)}")
    return found


def environments(tree: ast.AST, path: str) -> list[str]:
    """Every construction of a Jinja environment or template, by the name that is called."""
    return [
        f"{path}:{called(node)}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and (called(node).endswith("Environment") or called(node) == "Template")
    ]


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("loaders/x.py", "import torch"),
        ("loaders/x.py", "def f():\n    import onnx"),
        ("loaders/x.py", "from edge.session import load"),
        ("loaders/x.py", "import tokenizers"),
        ("loaders/x.py", "def f():\n    import jinja2"),
        ("loaders/text/x.py", "import tokenizers"),
        ("loaders/text/x.py", "def f():\n    import torch"),
        ("loaders/x.py", "from importlib import import_module\nimport_module('edge.cli')"),
        ("loaders/x.py", "def f(name):\n    return __import__(name)"),
        ("loaders/network/x.py", "from ...edge import session"),
        ("edge/x.py", "def f():\n    import torch"),
        ("edge/store/x.py", "from torch import nn"),
        ("edge/engine/native/x.py", "import torch"),
        ("edge/budget/x.py", "import rich"),
        ("edge/session.py", "def f():\n    import export"),
        ("edge/cli/x.py", "import export.onnx"),
        ("edge/cli/x.py", "if TYPE_CHECKING:\n    import transformers"),
        ("export/x.py", "def f():\n    import edge"),
        ("export/x.py", "import torch"),
    ],
)
def test_the_lock_catches_a_forbidden_import(path: str, code: str) -> None:
    assert arrows(ast.parse(code), path)


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("loaders/text/x.py", "def f():\n    import tokenizers\n    from jinja2 import sandbox"),
        ("loaders/x.py", "import json\nimport numpy as np\nfrom loaders.network import spec\nfrom . import errors"),
        ("edge/engine/x.py", "import torch\nimport onnxruntime"),
        ("edge/cli/x.py", "import click\ndef f():\n    from export import onnx"),
        ("export/x.py", "import onnx\nfrom loaders.network import spec"),
    ],
)
def test_the_lock_lets_an_allowed_import_pass(path: str, code: str) -> None:
    assert arrows(ast.parse(code), path) == []


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "def f():\n    from urllib import request",
        "torch.load(path)",
        "torch.load(path, weights_only=True)",
        "np.load(path)",
        "read(path, allow_pickle=True)",
        "read(path, trust_remote_code=flag)",
        "eval(text)",
        "exec(text)",
        "os.system(text)",
        "run(text, shell=True)",
    ],
)
def test_the_lock_catches_a_way_to_run_foreign_code(code: str) -> None:
    assert dangers(ast.parse(code), "edge/x.py")


@pytest.mark.parametrize(
    "code",
    ["model.family == 'x'", "config.model_type in ('a', 'b')", "name = 'gemma3n'", "match m.family:\n    case 1: 0"],
)
def test_the_lock_catches_a_question_for_the_family(code: str) -> None:
    assert names(ast.parse(code), "edge/x.py")


def test_there_is_a_house_to_look_at() -> None:
    assert {path.partition("/")[0] for path in SOURCES} == set(HOUSE)
    assert len(SOURCES) > 40


@pytest.mark.parametrize("top", HOUSE)
def test_every_import_follows_the_arrows(top: str) -> None:
    assert [line for path in SOURCES if path.startswith(top) for line in arrows(parsed(path), path)] == []


def test_every_module_of_the_house_that_is_imported_exists() -> None:
    """A lazy import of a file that is not there fails only when a user gets to it."""
    missing = [
        f"{path}:{found.line} imports {found.module}"
        for path in SOURCES
        for found in imports(parsed(path), path)
        if found.top in HOUSE and not found.module.endswith(".") and found.module not in MODULES
    ]
    assert missing == []


def test_nothing_runs_code_from_a_file_or_reaches_for_the_network() -> None:
    assert [line for path in SOURCES for line in dangers(parsed(path), path)] == []


def test_family_names_stay_in_the_family_files() -> None:
    elsewhere = [path for path in SOURCES if not path.startswith("loaders/families/")]
    assert [line for path in elsewhere for line in names(parsed(path), path)] == []


def test_there_is_one_jinja_environment_and_it_is_sandboxed() -> None:
    made = [line for path in SOURCES for line in environments(parsed(path), path)]
    assert made == ["loaders/text/jinja.py:Environment"]
    classes = [node for node in ast.walk(parsed("loaders/text/jinja.py")) if isinstance(node, ast.ClassDef)]
    bases = {node.name: [ast.unparse(base) for base in node.bases] for node in classes}
    assert bases["Environment"] == ["sandbox.ImmutableSandboxedEnvironment"]


def test_no_file_is_longer_than_a_sitting() -> None:
    lines = {path: (ROOT / path).read_text(encoding="utf-8").count("\n") for path in SOURCES}
    assert {path: n for path, n in lines.items() if n > MOST_LINES} == {}


# Without torch and its like: all of loaders/, everything that is done before a run, and the help of every command.
HOOK = """
import sys
class No:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ABSENT:
            raise ModuleNotFoundError("not here: " + name, name=name)
ABSENT = {"torch", "onnx", "onnxruntime", "transformers", "triton"}
sys.meta_path.insert(0, No())
from importlib import import_module
import edge
assert "numpy" not in sys.modules, "import edge is not free"
from edge.cli.app import run_app
model, new = sys.argv[1:3]
assert run_app(["pack", model, "--precision", "int8", "-q"]) == 0  # compiles the vocabulary, with tokenizers
ABSENT.add("tokenizers")
for name in [name for name in sys.modules if name.partition(".")[0] == "tokenizers"]:
    del sys.modules[name]
from edge.budget import machine
machine.remember_floor("auto", "auto", machine.Known(machine.Floor(1 << 28), "torch", "cpu"))
machine.subprocess.run = None  # what is remembered is not measured again
for source in (model, new + "/pack"):
    assert run_app(["plan", source, "--budget", "64GB"]) == 0
    assert run_app(["plan", source, "--budget", "64GB", "--json"]) == 0
    assert run_app(["plan", source, "--budget", "1MB", "--json"]) == 80
    if source == model:
        assert run_app(["pack", source, "-q"]) == 0
        import glob, os, shutil
        shutil.copytree(*glob.glob(os.environ["EDGE_CACHE"] + "/packs/[!.]*"), new + "/pack")
assert run_app(["pack", new + "/pack", "--verify"]) == 0
assert run_app(["pack", "--list", "--json"]) == 0
assert run_app(["inspect", model, "--json"]) == 0
assert run_app(["synth", "--config", model, "-o", new + "/random"]) == 0
assert run_app(["pack", new + "/random", "-o", new + "/packed", "--precision", "int4"]) == 0
from pathlib import Path
from edge.session import open_source
from edge.store.text import open_tokenizer, text_folder
pack = open_source(Path(new + "/pack"))
assert len(open_tokenizer(pack, text_folder(pack), True).encode("once upon a time")) > 4
assert run_app(["--help"]) == 0
for command in ("run", "plan", "inspect", "pack", "slice", "synth"):
    assert run_app([command, "--help"]) == 0
for name in sys.argv[3].split():
    import_module(name)
assert not ABSENT & set(sys.modules)
try:
    import torch
except ModuleNotFoundError:
    print("THE END")
"""


def test_loaders_and_all_that_comes_before_a_run_work_where_no_engine_is_installed(tmp_path: Path) -> None:
    """Without the tokenizers library too, once a pack holds the vocabulary."""
    loaders = " ".join(name for name in MODULES if name.startswith("loaders"))
    command = [sys.executable, "-c", HOOK, str(built("gemma3n")), str(tmp_path), loaders]
    env = {**os.environ, "EDGE_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("THE END\n")
    assert done.stdout.count("Usage: edge") == 7
