"""Imports go one way: a package imports only packages above it in this list, which is the map of the library."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1] / "velora_fx"

LAYERS = (
    ("options", "names", "peaks", "progress"),
    ("plans", "devices"),
    ("ops.kernels",),
    ("ops",),
    ("passes",),
    ("capture",),
    ("runtime",),
    ("simulate",),
    ("simulate.equal_blocks",),
    ("simulate.compiled",),
    ("report",),
    ("analyse.trial",),
    ("analyse",),
    ("choose",),
    ("capture_ahead", "first_forward"),
    ("session",),
    ("api",),
    ("__init__",),
    ("cli",),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
# A plan prints and draws itself.
UPWARDS = {("plans", "report")}


def place_of(module: str) -> str:
    """The entry of LAYERS that a module belongs to."""
    parts = module.split(".")[1:] or ["__init__"]
    return next(".".join(parts[:n]) for n in (2, 1) if ".".join(parts[:n]) in LEVEL)


def imports() -> Iterator[tuple[str, str]]:
    """The modules of the library, each with one that it imports, wherever in the file, for types also."""
    for path in sorted([*ROOT.rglob("*.py"), *(ROOT / "passes").glob("*.py")]):
        module = ".".join(("velora_fx", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "velora_fx":
                yield module, node.module
            elif isinstance(node, ast.Import):
                yield from ((module, alias.name) for alias in node.names if alias.name.split(".")[0] == "velora_fx")


def test_a_package_imports_only_packages_above_it():
    upwards = {
        (module, other)
        for module, other in imports()
        if LEVEL[place_of(other)] > LEVEL[place_of(module)]
        or (LEVEL[place_of(other)] == LEVEL[place_of(module)] and place_of(other) != place_of(module))
    }
    assert {(place_of(a), place_of(b)) for a, b in upwards} == UPWARDS, sorted(upwards)


def test_modules_of_a_package_import_one_another_in_no_circle():
    found = list(imports())
    known = dict.fromkeys(a for a, _ in found)
    edges = {a: {b for c, b in found if c == a and b in known and place_of(b) == place_of(a)} for a in known}
    while edges:
        free = {a for a, others in edges.items() if not others}
        assert free, f"imports go in circles among {sorted(edges)}"
        edges = {a: others - free for a, others in edges.items() if a not in free}
