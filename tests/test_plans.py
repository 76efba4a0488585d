"""Plans as data."""

from __future__ import annotations

import pytest

import velora_fx
from tests.toys import rows, stack


@pytest.fixture(scope="module")
def plan() -> velora_fx.Plan:
    return velora_fx.plan(stack(), 4, (rows(),))


def test_a_plan_survives_json(plan: velora_fx.Plan) -> None:
    assert velora_fx.Plan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize("schema", [2, None, "3"])
def test_a_plan_of_another_schema_is_refused(plan: velora_fx.Plan, schema: object) -> None:
    with pytest.raises(ValueError, match=f"a plan of schema 3 is needed, got schema {schema!r}"):
        velora_fx.Plan.from_dict({**plan.to_dict(), "schema": schema})
