"""The report of a real step, on plans made by hand."""

from __future__ import annotations

from dataclasses import replace

from expecttest import assert_expected_inline

from tests.report.test_text import GIB, plan
from velora_fx.peaks import Measured
from velora_fx.plans import UNCOUNTED, Input
from velora_fx.report.measured import mismatch_text


def real_step(optimizer: int = 0) -> Measured:
    sizes = {"parameters": GIB, "buffers": 0, "gradients": 0, "optimizer": optimizer}
    sizes["activations and temporary"] = GIB + 2**29
    return Measured(sum(sizes.values()), None, sizes)


def test_a_real_step_is_shown_beside_the_predicted_one() -> None:
    made = plan(measured=real_step())
    assert_expected_inline(
        str(made).split("\n\n")[2],
        """\
a real step                  predicted    measured    predicted over measured
-------------------------  -----------  ----------  -------------------------
allocated                     2.00 GiB    2.50 GiB                    -20.00%
parameters                    1.00 GiB    1.00 GiB                     +0.00%
buffers                            0 B         0 B
gradients                          0 B         0 B
optimizer                          0 B         0 B
activations and temporary     1.00 GiB    1.50 GiB                    -33.33%""",
    )
    assert "a real step" not in str(plan())


def test_a_plan_above_a_smaller_step_is_no_news_and_one_below_it_is() -> None:
    ids = Input("input_ids", (8, 256), "int64")
    for shape, optimizer, is_told in (((4, 256), 0, False), ((8, 256), 0, True), ((4, 256), 4 * GIB, True)):
        found = replace(real_step(optimizer=optimizer), inputs={"input_ids": shape})
        if not optimizer:
            found = replace(found, allocated_bytes=GIB)
        assert (mismatch_text(plan(inputs=(ids,), measured=found)) is not None) == is_told
        line = "that step was smaller than planned for: input_ids 4 x 256"
        assert (line in str(plan(inputs=(ids,), measured=found))) == (shape == (4, 256))


def test_a_real_step_that_is_far_off_is_told_with_the_category() -> None:
    assert mismatch_text(plan()) is None
    assert mismatch_text(plan(measured=replace(real_step(), allocated_bytes=2 * GIB))) is None
    assert mismatch_text(plan(measured=real_step(optimizer=2 * GIB))) == (
        "the plan is -55.56% off the peak of allocated memory (predicted 2.00 GiB, measured 4.50 GiB), most of it in "
        "optimizer (predicted 0 B, measured 2.00 GiB): plan with the batch, loss and optimizer of the real step"
    )


def test_where_kernels_are_not_all_counted_a_plan_that_is_off_says_so() -> None:
    found = plan(measured=real_step(optimizer=2 * GIB), notes=(f"{UNCOUNTED}: those of convolutions",))
    assert (mismatch_text(found) or "").endswith(f"of the real step; {UNCOUNTED}")
