"""The house rules: who may import whom, what `import lopt` pulls in, and registries that forget nothing."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = {"lopt", "tasks", "meta_train", "meta_test"}
ALLOWED = {
    "lopt": {"lopt"},
    "tasks": {"tasks"},
    "meta_train": {"meta_train", "lopt", "tasks"},
    "meta_test": {"meta_test", "lopt", "tasks"},
}
REGISTRIES = {
    "lopt/rules": ("lopt.rules", set()),
    "meta_train/estimators": ("meta_train.estimators", {"base", "unroll"}),
    "tasks": (
        "tasks",
        {"__main__", "adapters", "augment", "base", "certified", "checks", "faults", "held_out", "language", "layers"}
        | {"space", "sparse", "supervised"},
    ),
}


def imported(path: Path) -> set[str]:
    """Dotted names of the modules of ours that a file imports, wherever in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module or "")
    return {name for name in names if name.split(".")[0] in OURS}


def breaches(package: str, files: dict[str, set[str]]) -> list[str]:
    return [f"{f} imports {n}" for f, names in files.items() for n in names if n.split(".")[0] not in ALLOWED[package]]


@pytest.mark.parametrize("package", sorted(ALLOWED))
def test_import_directions(package):
    files = {str(path): imported(path) for path in (ROOT / package).rglob("*.py")}
    assert files
    assert not breaches(package, files)
    assert breaches(package, {"x.py": {next(iter(OURS - ALLOWED[package]))}})  # it would be seen


def test_estimators_know_neither_rules_nor_tasks():
    for path in (ROOT / "meta_train/estimators").glob("*.py"):
        assert imported(path) <= {"meta_train.inner", "meta_train.estimators", "meta_train.estimators.base"}, path


def test_only_inner_couples_rules_and_tasks():
    """A run's program builds both by name, validation of nowcasts runs networks on tasks; no other file knows both."""
    both = [
        path.name
        for path in (ROOT / "meta_train").rglob("*.py")
        if {"lopt", "tasks"} <= {name.split(".")[0] for name in imported(path)}
    ]
    assert sorted(both) == ["inner.py", "nowcast_validation.py", "program.py"]


@pytest.mark.parametrize("folder", sorted(REGISTRIES))
def test_registries_forget_no_module(folder):
    package, shared = REGISTRIES[folder]
    registry = importlib.import_module(package).REGISTRY
    modules = {path.stem for path in (ROOT / folder).glob("*.py")} - {"__init__"} - shared
    assert set(registry) == modules
    for name, module in registry.items():
        assert module == f"{package}.{name}"
        assert callable(getattr(importlib.import_module(module), name))


def test_import_lopt_is_light():
    heavy = "tasks meta_train meta_test flax haiku orbax tensorflow_datasets matplotlib tyro rich tensorboardX sklearn"
    code = "import lopt, sys; lopt.load, lopt.rules; print(*sorted({m.split('.')[0] for m in sys.modules}))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = set(run.stdout.split())
    assert "jax" in loaded  # the names above were resolved
    assert not loaded & set(heavy.split())
