"""Writes what follows from the rows: the planner's price table, the tables of docs/quality.md, and its picture."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from tools.quality.fit import fit, fit_text, shares_line
from tools.quality.picture import draw
from tools.quality.rows import Row
from tools.quality.table import grouped, rate_table, tables

ROOT = Path(__file__).resolve().parents[2]
PRICE, PAGE, PICTURE = ROOT / "velora_fx/choose/price.py", ROOT / "docs/quality.md", ROOT / "docs/quality.png"
SHARES = re.compile(r"^SHARES = \{.*\}$", re.MULTILINE)
BETWEEN = re.compile(r"(<!-- written by `python tools/quality --publish` -->\n).*(<!-- end -->)", re.DOTALL)


def publish(rows: Sequence[Row]) -> list[str]:
    """Writes the three files and returns a line on each. Raises ValueError where the rows do not make a price."""
    fitted = fit(rows)
    PRICE.write_text(SHARES.sub(shares_line(fitted), PRICE.read_text()))
    PAGE.write_text(with_tables(PAGE.read_text(), rows))
    draw(rows, fitted.group, PICTURE)
    return [f"{path.relative_to(ROOT)} is written" for path in (PRICE, PAGE, PICTURE)]


def with_tables(page: str, rows: Sequence[Row]) -> str:
    """The page with the tables of these rows between its marks, the rest as it was."""
    parts = [tables(rows)]
    for (task, _, corpus, steps), group in grouped(rows).items():
        parts.append(f"Loss at each learning rate, {task}, {steps} steps, text {corpus}:\n\n{rate_table(group)}")
    text = "\n\n".join([*parts, f"The price, by `python tools/quality --fit`:\n\n```\n{fit_text(fit(rows))}\n```"])
    whole, places = BETWEEN.subn(lambda found: f"{found[1]}\n{text}\n\n{found[2]}", page)
    if places != 1:
        raise ValueError(f"{PAGE.name} needs one place for the tables, between its two marks, and has {places}")
    return whole
