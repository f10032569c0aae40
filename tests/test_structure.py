"""The rules that keep the code readable: who may import whom, what stays light, how long is long.

The rules are read off the source with `ast`, so a violation is found in code that no test runs.
Each checker is itself tried on a snippet that breaks its rule.
"""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("block_manager", "model_executor", "helm_engine", "router")
BESIDE = ("examples", "benchmarks", "tests")

MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 80

BLOCK_MANAGER_THIRD_PARTY = {"numpy", "numba", "msgspec"}
NETWORK_MODULES = {"socket", "socketserver", "ssl", "http", "urllib"}
WEB_FRAMEWORKS = {"fastapi", "starlette", "uvicorn"}

# Calls that run code hidden in the file they read.
UNSAFE_LOADERS = {
    "pickle.load",
    "pickle.loads",
    "pickle.Unpickler",
    "dill.load",
    "dill.loads",
    "cloudpickle.load",
    "cloudpickle.loads",
    "joblib.load",
    "shelve.open",
    "marshal.load",
    "marshal.loads",
    "pandas.read_pickle",
    "torch.hub.load",
}
# The one file that may derive from one of them: its unpickler looks up no name of the file.
RESTRICTED_UNPICKLER = ROOT / "model_executor" / "converters" / "restricted_pickle.py"
# Calls that are safe with one keyword only: the keyword, and the value it must have.
LOADERS_WITH_A_SWITCH = {"torch.load": ("weights_only", True)}
# Calls that are unsafe with one keyword: the keyword, and the value it must have where given.
LOADERS_SAFE_BY_DEFAULT = {"numpy.load": ("allow_pickle", False)}


class Found(NamedTuple):
    """Something found in a source file: a dotted name or a message, and the line it stands on."""

    line: int
    text: str


def python_files(*directories: str) -> list[Path]:
    """Return the Python files under the directories that exist, in a stable order."""
    return sorted(path for name in directories for path in (ROOT / name).rglob("*.py"))


def project_files() -> list[Path]:
    return [*sorted(ROOT.glob("*.py")), *python_files(*PACKAGES, *BESIDE)]


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def report(path: Path, found: list[Found]) -> list[str]:
    return [f"{path.relative_to(ROOT)}:{item.line}: {item.text}" for item in found]


# ---------------------------------------------------------------- imports


def imported_names(tree: ast.Module, package: str) -> Iterator[Found]:
    """Yield every absolute dotted name that a module imports, also inside functions.

    Imports under TYPE_CHECKING count too: a type is knowledge of the other package. So do
    `importlib.import_module` and `__import__` with a literal name.

    Args:
        tree: The module.
        package: Dotted name of the package that relative imports start from.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Found(node.lineno, alias.name)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            for alias in node.names:
                yield Found(node.lineno, f"{base}.{alias.name}")
        elif isinstance(node, ast.Call) and node.args:
            called = getattr(node.func, "attr", None) or getattr(node.func, "id", None)
            first = node.args[0]
            if (
                called in {"import_module", "__import__"}
                and isinstance(first, ast.Constant)
                and isinstance(first.value, str)
            ):
                yield Found(node.lineno, first.value)


def is_within(name: str, *allowed: str) -> bool:
    """Whether a dotted name is one of the allowed modules or lies inside one."""
    return any(name == module or name.startswith(f"{module}.") for module in allowed)


def block_manager_may_import(name: str) -> bool:
    top = name.partition(".")[0]
    if top in NETWORK_MODULES:
        return False
    return (
        top == "block_manager" or top in sys.stdlib_module_names or top in BLOCK_MANAGER_THIRD_PARTY
    )


def model_executor_may_import(name: str) -> bool:
    return not is_within(name, "helm_engine", "router", *WEB_FRAMEWORKS, *BESIDE)


def router_may_import(name: str) -> bool:
    if is_within(name, "helm_engine"):
        return is_within(name, "helm_engine.protocol")
    return not is_within(name, "torch", "model_executor", *BESIDE)


def helm_engine_may_import(name: str) -> bool:
    return not is_within(name, *BESIDE)


IMPORT_RULES = {
    "block_manager": (
        block_manager_may_import,
        "block_manager imports only the standard library (no sockets), numpy, numba and msgspec",
    ),
    "model_executor": (
        model_executor_may_import,
        "model_executor imports no helm_engine, no router, no web framework",
    ),
    "router": (
        router_may_import,
        "router imports no torch, and of ours only block_manager and helm_engine.protocol",
    ),
    "helm_engine": (
        helm_engine_may_import,
        "helm_engine does not import what is not shipped (examples, benchmarks, tests)",
    ),
}


def forbidden_imports(package: str, tree: ast.Module, inside: str) -> list[Found]:
    allowed, _ = IMPORT_RULES[package]
    return [
        Found(item.line, f"imports {item.text}")
        for item in imported_names(tree, inside)
        if not allowed(item.text)
    ]


@pytest.mark.parametrize("package", PACKAGES)
def test_package_imports_only_what_it_may(package: str) -> None:
    files = python_files(package)
    assert files, f"{package}/ holds no Python file"
    broken: list[str] = []
    for path in files:
        inside = module_name(path)
        if path.name != "__init__.py":
            inside = inside.rpartition(".")[0]
        broken += report(path, forbidden_imports(package, parsed(path), inside))
    assert not broken, "\n".join([IMPORT_RULES[package][1], *broken])


@pytest.mark.parametrize(
    ("package", "source"),
    [
        ("block_manager", "import torch"),
        ("block_manager", "import socket"),
        ("block_manager", "def f():\n    from helm_engine.config import EngineConfig"),
        ("block_manager", "import importlib\nimportlib.import_module('torch.nn')"),
        ("block_manager", "from ..model_executor import step"),
        ("model_executor", "from helm_engine.protocol import Request"),
        ("model_executor", "import router"),
        ("model_executor", "from fastapi import FastAPI"),
        ("router", "import torch.nn as nn"),
        ("router", "from helm_engine import Recommender"),
        ("router", "from helm_engine.protocols import x"),
        ("router", "if TYPE_CHECKING:\n    from model_executor.step import ModelOutput"),
        ("helm_engine", "from tests.golden import case"),
    ],
)
def test_import_rule_catches(package: str, source: str) -> None:
    assert forbidden_imports(package, ast.parse(source), package)


@pytest.mark.parametrize(
    ("package", "source"),
    [
        ("block_manager", "import numpy as np\nfrom . import block\nfrom .block import Block"),
        ("block_manager", "from collections.abc import Iterator"),
        ("model_executor", "import torch\nfrom block_manager.block import Block"),
        ("router", "from helm_engine import protocol\nfrom helm_engine.protocol import Request"),
        ("helm_engine", "import torch\nfrom router import x\nfrom model_executor import step"),
    ],
)
def test_import_rule_lets_pass(package: str, source: str) -> None:
    assert forbidden_imports(package, ast.parse(source), package) == []


# ---------------------------------------------------------------- what an import loads

FAIL_ON_HEAVY_MODULE = """
import importlib, sys
heavy = sys.argv[1].split(",")
for name in sys.argv[2:]:
    importlib.import_module(name)
    loaded = [module for module in heavy if module in sys.modules]
    if loaded:
        sys.exit(f"importing {name} loads {', '.join(loaded)}")
"""


def import_afresh(modules: list[str], heavy: set[str]) -> subprocess.CompletedProcess[str]:
    """Import modules in a new interpreter, which fails as soon as a heavy module is loaded."""
    return subprocess.run(
        [sys.executable, "-c", FAIL_ON_HEAVY_MODULE, ",".join(sorted(heavy)), *modules],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("helm_engine.protocol", {"torch", "fastapi", "numba"}),
        ("helm_engine.client", {"torch", "fastapi", "numba"}),
        ("model_executor.step", {"torch", "fastapi"}),
        ("helm_engine.entrypoints.cli", {"torch", "fastapi", "numba", "aiohttp", "matplotlib"}),
        ("helm_engine.bench.plan", {"torch", "fastapi", "matplotlib"}),
    ],
)
def test_importing_a_light_module_loads_nothing_heavy(module: str, heavy: set[str]) -> None:
    done = import_afresh([module], heavy)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("package", ["block_manager", "router"])
def test_importing_a_whole_package_does_not_load_torch(package: str) -> None:
    done = import_afresh([module_name(path) for path in python_files(package)], {"torch"})
    assert done.returncode == 0, done.stderr


def test_light_import_check_catches_a_heavy_module() -> None:
    done = import_afresh(["json"], {"json.decoder"})
    assert done.returncode != 0
    assert "importing json loads json.decoder" in done.stderr


# ---------------------------------------------------------------- sizes


def long_functions(tree: ast.Module, limit: int) -> list[Found]:
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > limit:
                found.append(Found(node.lineno, f"{node.name} has {lines} lines, limit {limit}"))
    return found


def test_no_file_is_too_long() -> None:
    broken = []
    for path in project_files():
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > MAX_FILE_LINES:
            broken.append(
                f"{path.relative_to(ROOT)}:{lines}: {lines} lines, limit {MAX_FILE_LINES}"
            )
    assert not broken, "\n".join(["split these files by what they own", *broken])


def test_no_function_is_too_long() -> None:
    broken: list[str] = []
    for path in project_files():
        if path.is_relative_to(ROOT / "tests"):
            continue
        broken += report(path, long_functions(parsed(path), MAX_FUNCTION_LINES))
    assert not broken, "\n".join(["split these functions", *broken])


def test_function_size_check_catches_a_long_function() -> None:
    body = "\n".join("    x = 1" for _ in range(3))
    tree = ast.parse(f"class C:\n  async def f():\n{body}")
    assert long_functions(tree, 4) == []
    assert long_functions(tree, 3) == [Found(2, "f has 4 lines, limit 3")]


# ---------------------------------------------------------------- unsafe loading


def import_aliases(tree: ast.Module) -> dict[str, str]:
    """Map each name that an import binds to the dotted name it stands for."""
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                top = alias.name.partition(".")[0]
                names[alias.asname or top] = alias.name if alias.asname else top
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    return names


def dotted_name(node: ast.expr, aliases: dict[str, str]) -> str:
    """Return the imported name that an expression such as `np.lib.x` refers to, or ''."""
    if isinstance(node, ast.Name):
        return aliases.get(node.id, "")
    if isinstance(node, ast.Attribute):
        base = dotted_name(node.value, aliases)
        return f"{base}.{node.attr}" if base else ""
    return ""


def unsafe_loads(tree: ast.Module) -> list[Found]:
    """Find calls that could run code from the file they read, and classes that could."""
    aliases = import_aliases(tree)
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            bases = [dotted_name(base, aliases) for base in node.bases]
            unsafe = [name for name in bases if name in UNSAFE_LOADERS]
            found += [Found(node.lineno, f"{node.name} derives from {name}") for name in unsafe]
        if not isinstance(node, ast.Call):
            continue
        name = dotted_name(node.func, aliases)
        given = {
            keyword.arg: keyword.value.value if isinstance(keyword.value, ast.Constant) else None
            for keyword in node.keywords
        }
        if name in UNSAFE_LOADERS:
            found.append(Found(node.lineno, f"{name} runs code from the file it reads"))
        elif name in LOADERS_WITH_A_SWITCH:
            keyword_name, value = LOADERS_WITH_A_SWITCH[name]
            if given.get(keyword_name) is not value:
                found.append(Found(node.lineno, f"{name} needs {keyword_name}={value}"))
        elif name in LOADERS_SAFE_BY_DEFAULT:
            keyword_name, value = LOADERS_SAFE_BY_DEFAULT[name]
            if given.get(keyword_name, value) is not value:
                found.append(Found(node.lineno, f"{name} needs {keyword_name}={value}"))
    return found


def test_no_file_is_loaded_unsafely() -> None:
    broken: list[str] = []
    for path in project_files():
        if path != RESTRICTED_UNPICKLER:
            broken += report(path, unsafe_loads(parsed(path)))
    assert not broken, "\n".join(["use safetensors or JSON, or the safe switch", *broken])


def test_the_restricted_unpickler_looks_up_nothing() -> None:
    tree = parsed(RESTRICTED_UNPICKLER)
    (unpickler,) = unsafe_loads(tree)
    assert unpickler.text.endswith("derives from pickle.Unpickler")
    (find_class,) = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.name == "find_class"
    ]
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert not names & {"super", "getattr", "eval", "exec", "__import__", "importlib", "sys"}
    called = {node.func for node in ast.walk(find_class) if isinstance(node, ast.Call)}
    assert [ast.unparse(function) for function in called] == ["CheckpointError"]


@pytest.mark.parametrize(
    "source",
    [
        "import pickle\npickle.load(f)",
        "import pickle as p\np.loads(b)",
        "from pickle import Unpickler as U\nU(f).load()",
        "import pickle\nclass U(pickle.Unpickler): pass",
        "import pickle as p\nclass U(Mixin, p.Unpickler): pass",
        "import torch\ntorch.load(f)",
        "import torch\ntorch.load(f, weights_only=False)",
        "from torch import load\nload(f, weights_only=flag)",
        "import numpy as np\nnp.load(f, allow_pickle=True)",
    ],
)
def test_unsafe_load_check_catches(source: str) -> None:
    assert [item.line for item in unsafe_loads(ast.parse(source))] == [2]


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.load(f, weights_only=True)",
        "import numpy as np\nnp.load(f)",
        "import json\njson.load(f)",
        "import pickle\npickle.dumps(x)",
    ],
)
def test_unsafe_load_check_lets_pass(source: str) -> None:
    assert unsafe_loads(ast.parse(source)) == []
