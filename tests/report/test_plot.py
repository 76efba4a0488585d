"""Pictures of plans: what they show, and every format that is promised is written."""

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

pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def compressed() -> velora_fx.Plan:
    return tightest(stack(), (rows(),), optimizer="adamw")


@pytest.fixture(scope="module")
def untouched() -> velora_fx.Plan:
    return velora_fx.plan(stack(), 1, (rows(),))


def shown(plan: velora_fx.Plan, folder: Path) -> str:
    """The texts in the picture: the comments that matplotlib writes for each in an SVG file."""
    path = folder / "plan.svg"
    plan.plot(str(path))
    parser = ElementTree.XMLParser(target=ElementTree.TreeBuilder(insert_comments=True))
    root = ElementTree.parse(path, parser).getroot()
    return "\n".join(str(node.text) for node in root.iter() if callable(node.tag))


def test_the_curves_moments_are_those_of_the_step_in_order(compressed: velora_fx.Plan) -> None:
    assert compressed.planned.curve is not None
    starts, names = zip(*compressed.planned.curve.moments, strict=True)
    assert names == ("forward", "backward", "optimizer step")
    assert list(starts) == sorted(starts) and starts[0] == 0


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


def test_a_plan_that_compresses_shows_both_steps_the_budget_and_the_places_of_the_peaks_with_what_they_hold(
    compressed: velora_fx.Plan, tmp_path: Path
) -> None:
    texts = shown(compressed, tmp_path)
    for text in ("untouched: peak", "planned: peak", "budget", "activations", "memory in use, KiB"):
        assert text in texts
    for peak in (compressed.baseline, compressed.planned):
        assert peak.place.startswith("backward of blocks.") and peak.there is not None
        assert peak.place in texts and f"{peak.there.label} {in_units(peak.there.num_bytes)}" in texts


def test_a_place_with_a_long_name_is_shortened_to_its_end(compressed: velora_fx.Plan, tmp_path: Path) -> None:
    name = ".".join(["transformer"] * 9)
    planned = replace(compressed.planned, place=f"backward of {name}.attention.output.dense")
    (text,) = re.findall(r"backward of \.\.\.\S+", shown(replace(compressed, planned=planned), tmp_path))
    assert text.endswith("transformer.attention.output.dense") and len(text) <= 54


def test_a_budget_far_above_the_step_is_a_number_only(untouched: velora_fx.Plan, tmp_path: Path) -> None:
    texts = shown(untouched, tmp_path)
    assert "1.00 GiB, \n far above" in texts and "memory in use, KiB" in texts
    near = replace(untouched, budget_bytes=int(1.1 * untouched.planned.peak_bytes))
    assert "far above" not in shown(near, tmp_path)


def test_a_plan_that_compresses_nothing_shows_one_step(untouched: velora_fx.Plan, tmp_path: Path) -> None:
    texts = shown(untouched, tmp_path)
    assert "untouched: peak" in texts and "planned: peak" not in texts


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
