"""What is installed is what lies in the repository, under the names that are promised."""

from __future__ import annotations

from pathlib import Path

import velora_fx

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "velora_fx"


def setuptools_table() -> dict[str, dict[str, object]]:
    """The tables of pyproject.toml under [tool.setuptools]; Python 3.10 has no TOML parser of its own."""
    try:
        import tomllib
    except ModuleNotFoundError:
        import tomli as tomllib
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]


def packages_in_the_tree() -> dict[str, Path]:
    """Every importable folder by its dotted name: those of velora_fx, and passes through its link."""
    found = {}
    for root, name in ((PACKAGE, "velora_fx"), (ROOT / "passes", "velora_fx.passes")):
        for init in root.rglob("__init__.py"):
            inside = init.parent.relative_to(root).parts
            if name == "velora_fx" and inside[:1] == ("passes",):
                continue  # reached through the link: Python 3.13's rglob follows none, older ones may
            found[".".join((name, *inside))] = init.parent
    return found


def test_the_packages_are_the_folders_with_an_init():
    assert sorted(setuptools_table()["packages"]) == sorted(packages_in_the_tree())


def test_every_package_is_built_from_its_folder():
    folders = setuptools_table()["package-dir"]
    for name, folder in packages_in_the_tree().items():
        parent, rest = name, []
        while parent not in folders:
            parent, _, last = parent.rpartition(".")
            rest.insert(0, last)
        assert ROOT.joinpath(str(folders[parent]), *rest) == folder


def test_every_python_file_lies_in_a_package():
    folders = set(packages_in_the_tree().values())
    loose = [path for root in (PACKAGE, ROOT / "passes") for path in root.rglob("*.py") if path.parent not in folders]
    assert [path for path in loose if PACKAGE / "passes" not in path.parents] == []


def test_the_link_to_the_passes_resolves():
    link = PACKAGE / "passes"
    assert link.is_symlink()
    assert link.readlink() == Path("../passes")
    assert link.resolve() == (ROOT / "passes").resolve()


def test_the_public_names_are_the_promised_ones_and_described():
    assert sorted(velora_fx.__all__) == [
        "BudgetError", "Plan", "__version__", "apply", "load_state_dict", "measure", "optimize", "plan", "plan_of",
        "restore", "state_dict",
    ]  # fmt: skip
    assert all(getattr(velora_fx, name).__doc__ for name in velora_fx.__all__)


def test_the_version_is_that_of_the_package():
    from importlib.metadata import version

    assert velora_fx.__version__ == version("velora-fx")


def test_no_module_bears_the_name_of_a_public_function():
    """It would take the function's place as an attribute of the package once it is imported."""
    modules = {path.stem for path in PACKAGE.glob("*.py")} | {path.name for path in PACKAGE.iterdir() if path.is_dir()}
    assert modules.isdisjoint(velora_fx.__all__)


def test_type_checkers_are_told_that_the_package_is_typed():
    assert (PACKAGE / "py.typed").read_bytes() == b""
    assert "py.typed" in setuptools_table()["package-data"]["velora_fx"]
