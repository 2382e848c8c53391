"""The layers of the package: which room may import which, lazy imports included; and tests stand alone."""

from __future__ import annotations

import ast
import functools
from pathlib import Path

import pytest

import cptv_ao

ROOT = Path(cptv_ao.__file__).parent
#: from the bottom up; a package may import itself and what stands below its line
LAYERS = [
    {"core"},
    {"fx"},
    {"backends"},
    {"simulation"},
    {"evaluation", "transforms"},
    {"search", "diagnosis"},
    {"reporting"},
    {"verbs"},
    {"callbacks", "plot"},
    {""},
    {"__main__"},
]
MODULES = sorted(ROOT.rglob("*.py"))
TESTS = Path(__file__).parent


def package_of(module: str) -> str:
    """The room of the top plan that a module lies in; "" is the package itself."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def module_of(path: Path) -> str:
    parts = ["cptv_ao", *path.relative_to(ROOT).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@functools.cache
def imports(path: Path) -> list[tuple[str, bool]]:
    """Modules that a file imports, and whether only for its annotations."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typed = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, id(node) in typed) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative imports hide where they lead"
            found += [(f"{node.module}.{alias.name}", id(node) in typed) for alias in node.names]
    return found


def resolved(name: str) -> str:
    """The module of ours that an imported name is of."""
    while name != "cptv_ao" and not _is_module(name):
        name = name.rpartition(".")[0]
    return name


def _is_module(name: str) -> bool:
    path = ROOT.parent / Path(*name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def ours(path: Path) -> set[str]:
    return {resolved(name) for name, typed in imports(path) if name.split(".")[0] == "cptv_ao" and not typed}


def level(package: str) -> int:
    return next(index for index, packages in enumerate(LAYERS) if package in packages)


def test_every_room_has_its_place() -> None:
    assert {package_of(module_of(path)) for path in MODULES} <= set().union(*LAYERS)


@pytest.mark.parametrize("path", MODULES, ids=module_of)
def test_imports_point_down(path: Path) -> None:
    package = package_of(module_of(path))
    wrong = [name for name in ours(path) if package_of(name) != package and level(package_of(name)) >= level(package)]
    assert not wrong, f"{module_of(path)} is of a lower or the same layer as {wrong}"


def test_there_is_no_circle() -> None:
    graph = {module_of(path): ours(path) - {module_of(path)} for path in MODULES if path.name != "__init__.py"}
    seen: dict[str, bool] = {}  # whether the walk through a module is over

    def walk(module: str, way: tuple[str, ...]) -> None:
        assert seen.get(module, True), f"a circle: {' -> '.join((*way, module))}"
        if module not in seen:
            seen[module] = False
            for name in sorted(graph.get(module, ())):
                walk(name, (*way, module))
            seen[module] = True

    for module in graph:
        walk(module, ())


@pytest.mark.parametrize("path", sorted((ROOT / "core").rglob("*.py")), ids=module_of)
def test_the_core_knows_no_graph(path: Path) -> None:
    assert not [name for name, typed in imports(path) if name.startswith(("torch.fx", "torch.ao")) and not typed]


@pytest.mark.parametrize("path", sorted((ROOT / "search" / "strategies").rglob("*.py")), ids=module_of)
def test_strategies_see_vectors_only(path: Path) -> None:
    allowed = ("cptv_ao.search.strategies", "cptv_ao.core.sites")
    assert not [name for name, _ in imports(path) if name.split(".")[0] == "torch"]
    assert all(name.startswith(allowed) for name in ours(path))


def test_no_test_imports_another() -> None:
    """What several tests need is in tests/helpers."""
    paths = sorted(TESTS.rglob("*.py"))
    names = [path.stem for path in paths if path.stem.startswith("test_")]
    assert len(names) > 50 and len(set(names)) == len(names), "pytest imports them by their bare names"
    wrong = {
        path.name: found
        for path in paths
        if (found := {part for name, _ in imports(path) for part in name.split(".")} & {*names, "conftest"})
    }
    assert not wrong
