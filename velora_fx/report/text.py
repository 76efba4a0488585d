"""The plan as text for people."""

from __future__ import annotations

import re
from collections.abc import Sequence

from tabulate import tabulate

from velora_fx.names import LAYER, collapse, compact, in_units, shared_start
from velora_fx.peaks import Group, Peak
from velora_fx.plans import Decision, Plan
from velora_fx.report.measured import render_measured

RANGES = re.compile(r"\d+[,-][\d,-]+")
LAYERS = re.compile(r"(?<=[A-Za-z_]\.)[\d,-]+( x\d+)?")


def render(plan: Plan) -> str:
    """The report of a plan: memory before and after, what is compressed, what is skipped and why."""
    sections = [
        _header(plan),
        _memory(plan),
        render_measured(plan),
        _largest(plan),
        _decisions(plan),
        _recomputed(plan),
        _summary(plan),
    ]
    return "\n\n".join(section for section in sections if section)


def _header(plan: Plan) -> str:
    is_changed = plan.compressed or plan.recomputed
    of = plan.in_effect
    lines = [
        ("model", plan.model),
        ("step", f"{step_name(plan)} on {plan.device}, optimizer {plan.optimizer}"),
        ("planned for", inputs_text(plan)),
        ("budget", "none given" if plan.budget_bytes is None else in_units(plan.budget_bytes)),
        ("predicted peak", _peaks(plan)),
        ("verdict", _verdict(plan)),
        (
            "step time",
            f"{time_ratio(plan, plan.planned.step_seconds)} of the untouched, on {plan.rates} rates"
            if is_changed
            else "",
        ),
        ("approximate", _approximate(plan)),
        ("objective", "speed: compressed wherever the predicted step gets faster" if plan.objective == "speed" else ""),
        ("in effect", f"{of.blocks} of {of.all_blocks} blocks, {of.calls} of {of.all_calls} calls" if of else ""),
        ("exactly", _exactly(plan)),
    ]
    return tabulate([line for line in lines if line[1]], tablefmt="plain", disable_numparse=True)


def _peaks(plan: Plan) -> str:
    there = plan.planned.there
    after = (
        f"{in_units(plan.planned.peak_bytes)}, at the {place_of(plan.planned)}{f': {in_use(there)}' if there else ''}"
    )
    if not (plan.compressed or plan.recomputed):
        return after
    place = place_of(plan.baseline)
    elsewhere = f", at the {place}," if place != place_of(plan.planned) else ""
    return f"{in_units(plan.baseline.peak_bytes)}{elsewhere} -> {after}"


def _verdict(plan: Plan) -> str:
    if plan.budget_bytes is None:
        return ""
    margin = in_units(abs(plan.budget_bytes - plan.planned.peak_bytes))
    if plan.fits:
        return f"fits, {margin} to spare{', but for kernels (see the note)' * plan.has_uncounted}"
    smallest = in_units(plan.planned.peak_bytes)
    return f"DOES NOT FIT: the smallest reachable peak is {smallest}, {margin} over the budget"


def _approximate(plan: Plan) -> str:
    if not plan.compressed:
        return ""
    count = len({name.partition("#")[0] for decision in plan.compressed for name in decision.consumers})
    text = f"gradients of {count} weights (projection {plan.projection}, seed {plan.seed})"
    smaller = ", factored: they, the optimizer's state and all-reduce are M times smaller"
    return text + smaller if plan.is_factored else text


def step_name(plan: Plan) -> str:
    """How the step runs."""
    return {True: "compiled", "blocks": "compiled block by block", False: "eager"}[plan.compiled]


def inputs_text(plan: Plan) -> str:
    """The largest batch: "input_ids, labels 8 x 256 int64, scale float32"."""
    names: dict[str, list[str]] = {}
    for item in plan.inputs:
        names.setdefault(" ".join([" x ".join(map(str, item.shape)), item.dtype]).strip(), []).append(item.name)
    return "; ".join(f"{', '.join(own)} {shape}" for shape, own in names.items())


def _exactly(plan: Plan) -> str:
    """What can be done exactly at the same budget."""
    exact = plan.exact
    if exact is None:
        return ""
    if exact.means == "untouched":
        return "the budget is also met by the step as it is"
    if not exact.fits:
        return f"not reachable by recompute alone: {in_units(exact.peak_bytes)} at the least"
    ratio = time_ratio(plan, exact.step_seconds)
    return f"this budget is also reachable exactly, step time {ratio} (method='exact' recomputes in backward)"


def time_ratio(plan: Plan, seconds: float) -> str:
    """A step's predicted time against that of the untouched step: "x1.06"."""
    return f"x{seconds / plan.baseline.step_seconds:.2f}" if plan.baseline.step_seconds else "x?"


def place_of(peak: Peak) -> str:
    """Where in the step a peak is, as exactly as the plan tells."""
    return peak.place or peak.moment


def in_use(group: Group) -> str:
    """A group of tensors as text: "3 x [8192, 32000] float32 2.93 GiB"."""
    return f"{f'{group.count} x ' if group.count > 1 else ''}{group.label} {in_units(group.num_bytes)}"


def _memory(plan: Plan) -> str:
    before, after = plan.baseline, plan.planned
    rows = [(name, size, after.breakdown.get(name, 0)) for name, size in before.breakdown.items()]
    rows += [(name, size, after.overhead.get(name, 0)) for name, size in before.overhead.items()]
    rows.append(("total", before.peak_bytes, after.peak_bytes))
    is_changed = plan.compressed or plan.recomputed
    columns = 3 if is_changed else 2
    headers = ("at the peak", "before", "after") if is_changed else ("at the peak", "bytes")
    cells = [(name, in_units(old), in_units(new))[:columns] for name, old, new in rows]
    return tabulate(cells, headers, colalign=("left", "right", "right")[:columns], disable_numparse=True)


def _largest(plan: Plan) -> str:
    groups = plan.planned.largest
    rows = [(f"{group.label} x{group.count}" if group.count > 1 else group.label, group) for group in groups]
    cells = [(name, in_units(group.num_bytes)) for name, group in rows]
    headers = ("largest at the peak, besides parameters", "bytes")
    return tabulate(cells, headers, colalign=("left", "right"), disable_numparse=True) if cells else ""


def _decisions(plan: Plan) -> str:
    """One line for each group of equal decisions; layers that are treated differently get lines of their own."""
    headers = ["where", "input of", "shape", "dtype", "action", "saved before", "after"]
    headers += ["gradient, state before", "after"] if plan.is_factored else []
    rows: list[tuple[str, ...]] = []
    for text, count in collapse("\t".join(_cells(decision)) for decision in plan.decisions):
        cells, sizes = text.split("\t")[:-4], text.split("\t")[-4:]
        cells[0] = cells[0] if count == 1 else f"{cells[0]} x{count}"
        rows.append((*cells, *(in_units(int(size) * count) for size in sizes[: len(headers) - len(cells)])))
    tensors = [(LAYERS.sub("", where), *same[:3]) for where, *same in rows]
    rows = [row for tensor in dict.fromkeys(tensors) for row, own in zip(rows, tensors, strict=True) if own == tensor]
    align = ("left",) * 5 + ("right",) * (len(headers) - 5)
    return tabulate(rows, headers, colalign=align, disable_numparse=True) if rows else ""


def _cells(decision: Decision) -> tuple[str, ...]:
    where, consumers = _place(decision.region, decision.consumers)
    shape = " x ".join(map(str, decision.shape))
    action = "keep" if decision.sub_token_size is None else f"compress M={decision.sub_token_size}"
    sizes = (
        decision.bytes_before, decision.bytes_after, decision.update_bytes_before, decision.update_bytes_after,
    )  # fmt: skip
    return where, consumers, shape, decision.dtype, action, *map(str, sizes)


def _place(region: str, consumers: Sequence[str]) -> tuple[str, str]:
    """The region and the names of the consumers in it; for consumers in several regions what those have in common."""
    if not region:
        return "the model", compact(consumers)
    if all(name == region or name.startswith(f"{region}.") for name in consumers):
        return region, compact([name[len(region) + 1 :] or "itself" for name in consumers])
    names = [text for text, _ in collapse(consumers)]
    shared = shared_start([name.split(".")[:-1] for name in names])
    layers = [place for place, part in enumerate(shared) if RANGES.fullmatch(part)]
    where = ".".join(shared[: layers[-1] + 1] if layers else shared)
    return where or "the model", compact([name[len(where) + 1 :] if where else name for name in names])


def _recomputed(plan: Plan) -> str:
    kept = {"pointwise": "all but matrix products and attention", "all": "everything"}
    texts = collapse(f"{block.region or 'the model'}\t{kept[block.recompute]}" for block in plan.recomputed)
    rows = [(f"{where} x{n}" if n > 1 else where, what) for text, n in texts for where, what in [text.split("\t")]]
    return tabulate(rows, ("where", "recomputed in backward, exactly"), disable_numparse=True) if rows else ""


def _summary(plan: Plan) -> str:
    compressed = sum(len(decision.consumers) for decision in plan.compressed)
    total = sum(len(decision.consumers) for decision in plan.decisions) + len(plan.skipped)
    lines = [f"compressed {compressed} of {total} matmul inputs; skipped:{'' if plan.skipped else ' none'}"]
    texts = (f"{skipped.module}\t{_relative(skipped.reason, skipped.module)}" for skipped in plan.skipped)
    places: dict[tuple[str, str], list[tuple[str, int]]] = {}
    for text, count in collapse(texts):
        module, reason = text.split("\t")
        places.setdefault((module.rpartition(".")[0], reason), []).append((module, count))
    for (_, reason), modules in places.items():
        count = sum(size for _, size in modules)
        where = compact([module for module, _ in modules]) or "the model"
        lines.append(f"  {where}{f' x{count}' if count > 1 else ''}: {reason}")
    lines += [f"note: {text}" for text, _ in collapse(plan.notes)]
    return "\n".join(lines)


def _relative(reason: str, module: str) -> str:
    """The reason with the names of the module's own layer made relative to the layer."""
    layer = LAYER.split(module)
    return reason.replace(module[: len(module) - len(layer[-1])] + ".", "") if len(layer) > 1 else reason
