"""The report of a plan, on plans made by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import pytest
from expecttest import assert_expected_inline

from velora_fx.names import collapse, compact
from velora_fx.peaks import Group, Peak
from velora_fx.plans import Decision, Input, Plan, Skipped

GIB, MIB = 2**30, 2**20
PLACE = "start of backward, in the loss"
CATEGORIES = ("parameters", "buffers", "gradients", "optimizer", "activations", "temporary")


def peak(*sizes: int, overhead: int = 0, moment: str = "backward") -> Peak:
    breakdown = dict(zip(CATEGORIES, sizes, strict=True))
    named = {"CUDA context": overhead, "fragmentation": sum(sizes) // 32} if overhead else {}
    return Peak(sum(sizes) + sum(named.values()), breakdown, moment, overhead=named)


def decision(region: str, *consumers: str, size: int | None = None, width: int = 4096) -> Decision:
    names = tuple(f"{region}.{name}" if region and name else region or name for name in consumers)
    before = 16 * width * 2
    after = before if size is None else before // size
    action: Literal["keep", "compress"] = "keep" if size is None else "compress"
    return Decision(region, f"{consumers[0]}.input", names, (2, 8, width), "bfloat16", action, size, before, after)


def plan(*decisions: Decision, skipped: tuple[Skipped, ...] = (), **fields: Any) -> Plan:
    step = {"compiled": False, "device": "cpu", "optimizer": "sgd", "budget_bytes": 3 * GIB, "inputs": ()}
    peaks = {"baseline": peak(GIB, 0, 0, 0, 3 * GIB, 512), "planned": peak(GIB, 0, 0, 0, GIB, 512)}
    found = {"decisions": decisions, "recomputed": (), "exact": None, "skipped": skipped, "notes": ()}
    return replace(Plan(model="net", rates="CPU", projection="signs", seed=7, **step, **peaks, **found), **fields)


def table(made: Plan) -> str:
    """The lines of the decisions."""
    return next(part for part in str(made).split("\n\n") if part.startswith("where"))


def test_the_report_shows_memory_before_and_after_decisions_and_what_is_skipped() -> None:
    layers = [f"model.layers.{i}" for i in range(32)]
    qkv = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    made = plan(
        *(d for name in layers for d in (decision(name, *qkv, size=4), decision(name, "mlp.fc2", width=16384))),
        skipped=(
            *(Skipped(f"{name}.self_attn.o_proj", "input also saved by attention") for name in layers),
            Skipped("lm_head", "it is the output head over a vocabulary"),
        ),
        baseline=replace(peak(GIB, 0, 0, 0, 3 * GIB, 512, overhead=704 * MIB), place=PLACE, step_seconds=2.0),
        planned=replace(
            peak(GIB, 0, 0, 0, GIB, 512, overhead=704 * MIB),
            place=PLACE,
            step_seconds=1.8,
            there=Group("[16, 32000] float32", 3, 12 * MIB),
            largest=(
                Group("model.layers.0-31.mlp: linear [2, 8, 4096] bfloat16", 64, 8 * MIB),
                Group("loss: log_softmax [16, 32000] float32", 1, 4 * MIB),
            ),
        ),
        notes=("something to know",),
    )
    assert_expected_inline(
        str(made),
        """\
model           net
step            eager on cpu, optimizer sgd
budget          3.00 GiB
predicted peak  4.81 GiB -> 2.75 GiB, at the start of backward, in the loss: 3 x [16, 32000] float32 12.00 MiB
verdict         fits, 256.00 MiB to spare
step time       x0.90 of the untouched, on CPU rates
approximate     gradients of 96 weights (projection signs, seed 7)

at the peak        before       after
-------------  ----------  ----------
parameters       1.00 GiB    1.00 GiB
buffers               0 B         0 B
gradients             0 B         0 B
optimizer             0 B         0 B
activations      3.00 GiB    1.00 GiB
temporary           512 B       512 B
CUDA context   704.00 MiB  704.00 MiB
fragmentation  128.00 MiB   64.00 MiB
total            4.81 GiB    2.75 GiB

largest at the peak, besides parameters                     bytes
-------------------------------------------------------  --------
model.layers.0-31.mlp: linear [2, 8, 4096] bfloat16 x64  8.00 MiB
loss: log_softmax [16, 32000] float32                    4.00 MiB

where                  input of                shape          dtype     action          saved before      after
---------------------  ----------------------  -------------  --------  ------------  --------------  ---------
model.layers.0-31 x32  self_attn.{q,k,v}_proj  2 x 8 x 4096   bfloat16  compress M=4        4.00 MiB   1.00 MiB
model.layers.0-31 x32  mlp.fc2                 2 x 8 x 16384  bfloat16  keep               16.00 MiB  16.00 MiB

compressed 96 of 161 matmul inputs; skipped:
  model.layers.0-31.self_attn.o_proj x32: input also saved by attention
  lm_head: it is the output head over a vocabulary
note: something to know""",
    )


def test_without_a_budget_the_report_shows_the_step_as_it_is() -> None:
    untouched = peak(GIB, 0, 0, 0, 3 * GIB, 512)
    made = plan(decision("layers.0", "fc1"), budget_bytes=None, planned=untouched)
    assert_expected_inline(
        str(made),
        """\
model           net
step            eager on cpu, optimizer sgd
budget          none given
predicted peak  4.00 GiB, at the backward

at the peak       bytes
-------------  --------
parameters     1.00 GiB
buffers             0 B
gradients           0 B
optimizer           0 B
activations    3.00 GiB
temporary         512 B
total          4.00 GiB

where     input of    shape         dtype     action      saved before       after
--------  ----------  ------------  --------  --------  --------------  ----------
layers.0  fc1         2 x 8 x 4096  bfloat16  keep          128.00 KiB  128.00 KiB

compressed 0 of 1 matmul inputs; skipped: none""",
    )


def test_the_largest_batch_is_named() -> None:
    ids, scale = Input("input_ids", (8, 256), "int64"), Input("scale", (), "float32")
    made = plan(inputs=(ids, replace(ids, name="labels"), replace(ids, name="mask", dtype="bool"), scale))
    line = next(line for line in str(made).splitlines() if line.startswith("planned for"))
    assert line.split("  ")[-1].strip() == "input_ids, labels 8 x 256 int64; mask 8 x 256 bool; scale float32"


def test_a_plan_that_does_not_fit_says_so_with_the_smallest_peak() -> None:
    assert "DOES NOT FIT: the smallest reachable peak is 2.00 GiB, 1.00 GiB over the budget" in str(
        plan(decision("layers.0", "fc1", size=4), budget_bytes=GIB + 512)
    )


def test_peaks_at_different_moments_are_both_named() -> None:
    made = plan(decision("h.0", "fc1", size=4), planned=peak(GIB, 0, 0, 0, 0, 0, moment="optimizer step"))
    assert "4.00 GiB, at the backward, -> 1.00 GiB, at the optimizer step" in str(made)


def test_one_tensor_at_the_place_of_the_peak_is_not_counted() -> None:
    planned = replace(peak(GIB, 0, 0, 0, 0, 0), place="forward of head", there=Group("[8] float32", 1, 32))
    assert "1.00 GiB, at the forward of head: [8] float32 32 B" in str(plan(planned=planned))


def test_a_plan_without_anything_to_compress_has_no_table_of_decisions() -> None:
    assert "where" not in str(plan(skipped=(Skipped("fc", "no reason"),)))


def test_layers_with_different_actions_have_lines_of_their_own_next_to_each_other() -> None:
    sizes = [8, 8, None, 8]
    made = plan(
        *(d for i, m in enumerate(sizes) for d in (decision(f"h.{i}", "fc1", size=m), decision(f"h.{i}", "fc2")))
    )
    assert_expected_inline(
        table(made),
        """\
where       input of    shape         dtype     action          saved before       after
----------  ----------  ------------  --------  ------------  --------------  ----------
h.0-1,3 x3  fc1         2 x 8 x 4096  bfloat16  compress M=8      384.00 KiB   48.00 KiB
h.2         fc1         2 x 8 x 4096  bfloat16  keep              128.00 KiB  128.00 KiB
h.0-3 x4    fc2         2 x 8 x 4096  bfloat16  keep              512.00 KiB  512.00 KiB""",
    )


def test_consumers_in_several_regions_are_shown_by_what_they_share() -> None:
    names = tuple(f"decoder.block.{i}.cross.{leaf}" for i in range(3) for leaf in "kv")
    shared = replace(decision("decoder.block.0", "cross.k", size=4), consumers=names)
    assert_expected_inline(
        table(plan(shared)),
        """\
where              input of     shape         dtype     action          saved before      after
-----------------  -----------  ------------  --------  ------------  --------------  ---------
decoder.block.0-2  cross.{k,v}  2 x 8 x 4096  bfloat16  compress M=4      128.00 KiB  32.00 KiB""",
    )


def test_a_region_that_is_a_linear_is_shown_as_itself_and_the_whole_model_as_the_model() -> None:
    assert_expected_inline(
        table(plan(decision("classifier", ""), decision("", "0"))),
        """\
where       input of    shape         dtype     action      saved before       after
----------  ----------  ------------  --------  --------  --------------  ----------
classifier  itself      2 x 8 x 4096  bfloat16  keep          128.00 KiB  128.00 KiB
the model   0           2 x 8 x 4096  bfloat16  keep          128.00 KiB  128.00 KiB""",
    )


def test_skipped_modules_with_one_reason_share_a_line() -> None:
    reason = "input also saved by {}.gate, which stays as it is"
    skipped = [Skipped(f"h.{i}.mlp.{leaf}", reason.format(f"h.{i}.mlp")) for i in range(4) for leaf in ("up", "down")]
    assert_expected_inline(
        str(plan(skipped=tuple(skipped))).split("\n\n")[-1],
        """\
compressed 0 of 8 matmul inputs; skipped:
  h.0-3.mlp.{up,down} x8: input also saved by mlp.gate, which stays as it is""",
    )


def test_notes_that_differ_only_in_the_layer_share_a_line() -> None:
    made = plan(notes=tuple(f"h.{i} was not called by the example inputs" for i in (0, 1, 3)))
    assert str(made).endswith("note: h.0-1,3 was not called by the example inputs")


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["a.b", "a.c"], [("a.b", 1), ("a.c", 1)]),
        (["h.0.fc", "h.1.fc", "h.2.fc"], [("h.0-2.fc", 3)]),
        (["h.10.fc", "h.9.fc", "h.2.fc"], [("h.2,9-10.fc", 3)]),
        (["h.0.fc", "g.0.fc", "h.1.fc"], [("h.0-1.fc", 2), ("g.0.fc", 1)]),
        (["s.0.b.0", "s.0.b.1", "s.1.b.0", "s.1.b.1"], [("s.0-1.b.0-1", 4)]),
        (["s.0.b.0", "s.1.b.0", "s.1.b.1"], [("s.0.b.0", 1), ("s.1.b.0-1", 2)]),
        (["h.0: see h.0.x", "h.1: see h.1.x"], [("h.0-1: see h.0-1.x", 2)]),
        (["0.5 GiB", "0.6 GiB"], [("0.5 GiB", 1), ("0.6 GiB", 1)]),
        ([], []),
    ],
)
def test_texts_that_differ_in_layer_numbers_are_merged(texts: list[str], expected: list[tuple[str, int]]) -> None:
    assert collapse(texts) == expected


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["mlp.down_proj"], "mlp.down_proj"),
        (["attn.q_proj", "attn.k_proj", "attn.v_proj"], "attn.{q,k,v}_proj"),
        (["self.query", "self.key"], "self.{query,key}"),
        (["a.q", "b.q"], "a.q, b.q"),
        (["experts.0.w1", "experts.1.w1", "experts.0.w3", "experts.1.w3"], "experts.0-1.{w1,w3}"),
        (["a.x_proj", "a._proj"], "a.{x_proj,_proj}"),
        (["q", "k"], "{q,k}"),
    ],
)
def test_names_with_one_parent_are_put_in_braces(names: list[str], expected: str) -> None:
    assert compact(names) == expected
