"""Pictures of plans: the curve is the step's, and every format that is promised is written."""

from __future__ import annotations

import builtins
import re
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

import velora_fx
from tests.helpers.gradients import tightest
from tests.helpers.toys import rows, stack
from velora_fx.names import in_units
from velora_fx.simulate.timeline import CATEGORIES

pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def compressed() -> velora_fx.Plan:
    return tightest(stack(), (rows(),), optimizer="adamw")


@pytest.fixture(scope="module")
def untouched() -> velora_fx.Plan:
    return velora_fx.plan(stack(), 1, (rows(),))


def texts(path: Path) -> str:
    """The comments that matplotlib writes for each text of an SVG file."""
    parser = ElementTree.XMLParser(target=ElementTree.TreeBuilder(insert_comments=True))
    root = ElementTree.parse(path, parser).getroot()
    return "\n".join(str(node.text) for node in root.iter() if callable(node.tag))


def test_the_curve_reaches_the_peak_and_adds_up_there(compressed: velora_fx.Plan) -> None:
    for peak in (compressed.baseline, compressed.planned):
        assert peak.curve is not None and set(peak.curve.categories) == set(CATEGORIES)
        totals = [sum(values) for values in zip(*peak.curve.categories.values(), strict=True)]
        assert max(totals) == peak.peak_bytes - compressed.overhead_bytes
        assert min(totals) > 0
        at = totals.index(max(totals))
        assert {name: values[at] for name, values in peak.curve.categories.items()} == dict(peak.breakdown)


def test_the_curves_moments_are_those_of_the_step_in_order(compressed: velora_fx.Plan) -> None:
    assert compressed.planned.curve is not None
    starts, names = zip(*compressed.planned.curve.moments, strict=True)
    assert names == ("forward", "backward", "optimizer step")
    assert list(starts) == sorted(starts) and starts[0] == 0


def test_curves_survive_json(compressed: velora_fx.Plan) -> None:
    assert velora_fx.Plan.from_json(compressed.to_json()) == compressed


def test_a_plan_written_without_places_and_groups_still_loads(compressed: velora_fx.Plan) -> None:
    data = compressed.to_dict()
    for peak in (data["baseline"], data["planned"]):
        for name in ("place", "there", "largest"):
            del peak[name]
    loaded = velora_fx.Plan.from_dict(data)
    assert loaded.decisions == compressed.decisions
    assert f"at the {compressed.planned.moment}" in str(loaded) and "largest at the peak" not in str(loaded)


@pytest.mark.parametrize(("ending", "start"), [("svg", b"<?xml"), ("png", b"\x89PNG"), ("pdf", b"%PDF")])
def test_every_format_is_written(compressed: velora_fx.Plan, tmp_path: Path, ending: str, start: bytes) -> None:
    compressed.plot(tmp_path / f"plan.{ending}")
    assert (tmp_path / f"plan.{ending}").read_bytes().startswith(start)


def test_a_plan_that_compresses_shows_both_steps_and_the_budget(compressed: velora_fx.Plan, tmp_path: Path) -> None:
    compressed.plot(tmp_path / "plan.svg")
    shown = texts(tmp_path / "plan.svg")
    for text in ("untouched: peak", "planned: peak", "budget", "activations", "memory in use, KiB"):
        assert text in shown


def test_the_peak_is_marked_with_its_place_and_what_that_place_holds(
    compressed: velora_fx.Plan, tmp_path: Path
) -> None:
    compressed.plot(tmp_path / "plan.svg")
    shown = texts(tmp_path / "plan.svg")
    for peak in (compressed.baseline, compressed.planned):
        assert peak.place.startswith("backward of blocks.") and peak.there is not None
        assert peak.place in shown and f"{peak.there.label} {in_units(peak.there.num_bytes)}" in shown


def test_a_place_with_a_long_name_is_shortened_to_its_end(compressed: velora_fx.Plan, tmp_path: Path) -> None:
    name = ".".join(["transformer"] * 9)
    planned = replace(compressed.planned, place=f"backward of {name}.attention.output.dense")
    replace(compressed, planned=planned).plot(tmp_path / "plan.svg")
    (shown,) = re.findall(r"backward of \.\.\.\S+", texts(tmp_path / "plan.svg"))
    assert shown.endswith("transformer.attention.output.dense") and len(shown) <= 54


def test_a_budget_far_above_the_step_is_a_number_only(untouched: velora_fx.Plan, tmp_path: Path) -> None:
    untouched.plot(tmp_path / "plan.svg")
    shown = texts(tmp_path / "plan.svg")
    assert "1.00 GiB, \n far above" in shown and "memory in use, KiB" in shown
    near = replace(untouched, budget_bytes=int(1.1 * untouched.planned.peak_bytes))
    near.plot(tmp_path / "plan.svg")
    assert "far above" not in texts(tmp_path / "plan.svg")


def test_a_plan_that_compresses_nothing_shows_one_step(untouched: velora_fx.Plan, tmp_path: Path) -> None:
    untouched.plot(str(tmp_path / "plan.svg"))
    shown = texts(tmp_path / "plan.svg")
    assert "untouched: peak" in shown and "planned: peak" not in shown


def test_another_ending_is_refused(compressed: velora_fx.Plan, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\.svg, \.png or \.pdf file, got 'plan\.gif'"):
        compressed.plot("plan.gif")


def test_a_plan_without_curves_is_refused(compressed: velora_fx.Plan, tmp_path: Path) -> None:
    bare = replace(compressed, baseline=replace(compressed.baseline, curve=None))
    with pytest.raises(ValueError, match="no curves"):
        bare.plot(tmp_path / "plan.svg")


def test_without_matplotlib_the_error_tells_what_to_install(
    compressed: velora_fx.Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"velora-fx\[plot\]"):
        compressed.plot(tmp_path / "plan.svg")
