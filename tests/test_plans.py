"""Plans as data."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

import velora_fx
from tests.helpers.gradients import tightest
from tests.helpers.toys import rows, stack
from velora_fx.peaks import Measured


@pytest.fixture(scope="module")
def plan() -> velora_fx.Plan:
    return tightest(stack(), (rows(),))


@pytest.fixture
def measured_plan(plan: velora_fx.Plan) -> velora_fx.Plan:
    sizes = {"parameters": 300, "buffers": 0, "gradients": 0, "optimizer": 200, "activations and temporary": 500}
    return replace(plan, measured=Measured(1000, None, sizes))


def test_a_plan_survives_json(plan: velora_fx.Plan, measured_plan: velora_fx.Plan) -> None:
    assert plan.compressed and plan.measured is None and "comparison" not in plan.to_dict()
    for one in (plan, measured_plan):
        assert velora_fx.Plan.from_json(one.to_json()) == one


def test_json_has_predicted_beside_measured_with_the_difference(measured_plan: velora_fx.Plan) -> None:
    rows = {row["name"]: row for row in json.loads(measured_plan.to_json())["comparison"]}
    assert list(rows) == ["allocated", *measured_plan.measured.breakdown]  # type: ignore[union-attr]
    predicted = measured_plan.planned.peak_bytes
    difference = pytest.approx(100 * (predicted - 1000) / 1000)
    assert rows["allocated"] == {
        "name": "allocated", "predicted_bytes": predicted, "measured_bytes": 1000, "difference_percent": difference,
    }  # fmt: skip
    assert rows["buffers"]["difference_percent"] is None


@pytest.mark.parametrize("schema", [4, None, "5"])
def test_a_plan_of_another_schema_is_refused(plan: velora_fx.Plan, schema: object) -> None:
    with pytest.raises(ValueError, match=f"a plan of schema 6 is needed, got schema {schema!r}"):
        velora_fx.Plan.from_dict({**plan.to_dict(), "schema": schema})
