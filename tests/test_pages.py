"""What the pages say of the repository is so: links, files, options, packages, and code that compiles."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

import velora_fx
from tests.test_layers import LAYERS
from velora_fx.cli.main import parser

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")])
CALLS = re.compile(r"velora_fx\.(optimize|plan|apply|measure|load_state_dict)\(([^()]*(?:\([^()]*\)[^()]*)*)\)")
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def prose_of(page: Path) -> str:
    """The text without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def python_blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def heading_anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings."""
    headings = re.findall(r"^#+ (.*)$", prose_of(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@every_page
def test_relative_links_lead_to_files_and_headings(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", prose_of(page)):
        if re.match(r"https?://", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), f"{page.name}: {link}"
        assert not anchor or anchor in heading_anchors(target), f"{page.name}: {link}"


@every_page
def test_files_that_are_named_are_there(page: Path) -> None:
    names = set(re.findall(r"`((?:[\w.-]+/)+[\w.-]*)`", prose_of(page)))
    missing = [name for name in names if not ((ROOT / name).exists() or (ROOT / "velora_fx" / name).exists())]
    assert missing == []


@every_page
def test_code_compiles(page: Path) -> None:
    for number, block in enumerate(python_blocks(page)):
        compile(block, f"{page.name}, block {number}", "exec")


def test_the_readme_shows_code() -> None:
    assert any("velora_fx.optimize(" in block for block in python_blocks(ROOT / "README.md"))


@every_page
def test_options_that_are_passed_exist(page: Path) -> None:
    for function, arguments in CALLS.findall(page.read_text()):
        allowed = inspect.signature(getattr(velora_fx, function)).parameters
        passed = set(re.findall(r"(\w+)=", arguments))
        assert passed <= set(allowed), f"{page.name}: {function}({arguments})"


@every_page
def test_options_of_the_command_line_exist(page: Path) -> None:
    known = {option for action in parser()._actions for option in action.option_strings}
    commands = re.findall(r"^\$ python tools/plan\.py.*$", page.read_text(), flags=re.MULTILINE)
    rows = re.findall(r"^\| `--.*?\|", page.read_text(), flags=re.MULTILINE) if page.name != "CONTRIBUTING.md" else []
    named = {option for text in (*commands, *rows) for option in re.findall(r"--[a-z-]+", text)}
    assert named <= known


def test_the_readme_names_every_option_and_function() -> None:
    readme = (ROOT / "README.md").read_text()
    own = ("model", "budget_gb", "example_inputs")
    options = [name for name in inspect.signature(velora_fx.optimize).parameters if name not in own]
    assert [name for name in options if f"`{name}`" not in readme] == []
    functions = [name for name in velora_fx.__all__ if name.islower() and name != "__version__"]
    assert [name for name in functions if f"`{name}(" not in readme] == []


def test_the_list_of_packages_is_that_of_the_layers() -> None:
    table = (ROOT / "docs" / "architecture.md").read_text().partition("## Packages")[2].partition("\n## ")[0]
    rows = [re.findall(r"`([\w.]+)`", row.split("|")[1]) for row in table.splitlines() if row.startswith("| `")]
    assert [sorted(row) for row in rows] == [sorted(layer) for layer in LAYERS]
