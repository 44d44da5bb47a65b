"""Imports between folders go one way, and no two modules import each other. Read from the syntax
trees, so that imports inside functions and type-only imports count.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import weightlift

ROOT = Path(weightlift.__file__).parent
# From the ground up. What stands on one line may not import what stands beside it.
FLOORS = [
    {"_native"},
    {"core"},
    {"checkpoint"},
    {"load"},
    {"module"},
    {"load_file", "safe_open", "save", "convert"},
    {"distributed"},
    {"load_into"},
    {"models"},
    {"flax"},
    {"backends"},
    {"bench"},
    {"cli"},
    {"", "__main__"},
]
FLOOR_OF = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
# Public calls that stand on one floor and use each other.
BESIDE = {("convert", "load_file"), ("safe_open", "load_file")}


def modules() -> dict[str, Path]:
    """Dotted name below the package -> file; ``""`` is the package itself."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        if path.parent.name == "startup":  # Python executes it at its start: no module of these
            continue
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imported(tree: ast.Module, package: str) -> Iterator[tuple[int, str]]:
    """(line, module) of every import of weightlift's own; ``package`` is where the module lies."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.partition(".")[0] == "weightlift":
                    yield node.lineno, alias.name.partition(".")[2]
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([node.module] if node.module else [])])
            elif node.module and node.module.partition(".")[0] == "weightlift":
                base = node.module.partition(".")[2]
            else:
                continue
            for alias in node.names:
                name = f"{base}.{alias.name}" if base else alias.name
                yield node.lineno, name if name in MODULES or name == "_native" else base


def imports_of(name: str) -> list[tuple[int, str]]:
    path = MODULES[name]
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    return list(imported(ast.parse(path.read_text(encoding="utf-8")), package))


def room(name: str) -> str:
    return name.partition(".")[0]


def climbs(name: str, imports: list[tuple[int, str]]) -> list[str]:
    own = FLOOR_OF[room(name)]
    return [
        f"{name or 'weightlift'}:{line} imports {other or 'weightlift'}"
        for line, other in imports
        if room(other) != room(name)
        and FLOOR_OF[room(other)] >= own
        and (room(name), room(other)) not in BESIDE
    ]


def test_every_module_has_a_floor() -> None:
    assert {room(name) for name in MODULES} <= FLOOR_OF.keys()
    assert len({room(name) for name in MODULES}) <= 20


@pytest.mark.parametrize("name", sorted(MODULES))
def test_no_import_climbs(name: str) -> None:
    assert climbs(name, imports_of(name)) == []


def test_no_modules_import_each_other() -> None:
    edges = {
        name: {other for _, other in imports_of(name) if other != name and other in MODULES}
        for name in MODULES
    }
    # A module that no remaining module imports is not in a cycle, and is removed.
    left = set(MODULES)
    while free := {name for name in left if not edges[name] & left}:
        left -= free
    assert left == set(), {name: edges[name] & left for name in left}


@pytest.mark.parametrize(
    ("name", "line", "climbing"),
    [
        ("core.errors", "import weightlift", True),
        ("core.errors", "from weightlift import load_file", True),
        ("core.errors", "from weightlift import _native", False),
        ("load.plans", "def f():\n    from weightlift.module.fill import fill", True),
        ("module.fill", "if TYPE_CHECKING:\n    from weightlift.models import loading", True),
        ("bench.contenders.files", "from .adapter import Job", False),
        ("models.loading", "from weightlift.distributed.collective import x", False),
    ],
)
def test_the_check_sees(name: str, line: str, climbing: bool) -> None:
    found = list(imported(ast.parse(line), name.rpartition(".")[0]))
    assert found
    assert bool(climbs(name, found)) is climbing


LONGEST_FUNCTION = 60


def test_a_function_fits_on_a_screen() -> None:
    """Its lines without the docstring."""
    long: list[str] = []
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.FunctionDef):
                continue
            has_docstring = ast.get_docstring(node) is not None
            first = (node.body[0].end_lineno or 0) if has_docstring else node.lineno
            if (node.end_lineno or 0) - first > LONGEST_FUNCTION:
                long.append(f"{name}.{node.name}")
    assert long == []
