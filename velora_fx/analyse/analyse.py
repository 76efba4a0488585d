"""Finds out everything about a training step of a model that planning needs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from velora_fx.analyse.actions import Actions
from velora_fx.analyse.candidates import Candidate, find_candidates
from velora_fx.analyse.distributed_models import check_unwrapped
from velora_fx.analyse.factorable import not_factorable
from velora_fx.analyse.plan_checks import inputs_of
from velora_fx.analyse.recomputable import Block, find_recomputable
from velora_fx.analyse.simulator import Simulator
from velora_fx.analyse.trial import Findings, KeptTensors, Rehearsal, Use, full_name, lengthen_findings, probe
from velora_fx.capture import (
    UnequalError,
    child_regions,
    find_blocks,
    find_regions,
    has_trainable_matrix,
    undisturbed,
)
from velora_fx.devices import with_overhead
from velora_fx.options import Options
from velora_fx.peaks import Peak
from velora_fx.plans import UNCOUNTED, Input, Skipped
from velora_fx.runtime import (
    CHECKPOINTED,
    optimizer_factory,
)
from velora_fx.simulate import Timeline
from velora_fx.simulate.equal_blocks import WHOLE, BlockTracker, Shortened, ShownStep, shorten

KERNELS: Mapping[type, str] = {torch.nn.LSTM: "LSTM layers", torch.nn.modules.conv._ConvNd: "convolutions"}

NARROW = 16  # an adapter's second matrix, whose input is as wide as its rank, learns worst from sub-tokens


@dataclass(frozen=True)
class Analysis:
    """A model's step: its timeline, what can be compressed or recomputed, and what cannot.

    `sharing` are candidates whose input is kept anyway. `timeline` is that of the trial step, whose events `findings`
    and `blocks` refer to. `simulate` gives the timeline with the given actions. Under torch.compile(model) each block
    is compiled apart, one of a kind, which is soon done but a few per cent off; with `joined` as few as can be are.
    `untouched` is not joined, `baseline` is.
    """

    findings: Findings
    candidates: tuple[Candidate, ...]
    sharing: tuple[Candidate, ...]
    blocks: tuple[Block, ...]
    skipped: tuple[Skipped, ...]
    baseline: Peak
    untouched: Timeline
    inputs: tuple[Input, ...]
    device: torch.device
    notes: tuple[str, ...]
    is_compiled: bool
    is_factored: bool
    simulate: Simulator

    @property
    def compressible(self) -> tuple[Candidate, ...]:
        """All that can be compressed, whether that frees memory or saves time alone."""
        return *self.candidates, *self.sharing

    def peak(self, actions: Actions) -> Peak:
        """The simulated peak with the given actions, overhead included."""
        return with_overhead(self.simulate(actions, joined=True).peak, self.device)

    def estimate(self, actions: Actions) -> Peak:
        """The same with each block of a compiled model apart."""
        return with_overhead(self.simulate(actions).peak, self.device)


@undisturbed()
def analyse(
    model: torch.nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    options: Options,
    device: torch.device,
    progress: Callable[[str], None],
) -> Analysis:
    """Simulates a step of the untouched model, captures its regions and finds what can be compressed.

    The model is not touched: everything happens on copies without memory. What the model's own forward raises is
    raised as it is; ValueError if it has no trainable matrix product.
    """
    _check_can_be_planned_for(model, options, device)
    rehearsal = Rehearsal(model, args, kwargs, options, device)
    findings = _findings(rehearsal, progress)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    embeddings = [module.weight for module in model.modules() if isinstance(module, torch.nn.Embedding)]

    def is_dense(use: Use) -> str | None:
        if options.is_factored:
            return not_factorable(parameters, findings.uses.values(), use)
        return CHECKPOINTED if use.is_recomputed else None

    candidates, sharing, skipped = find_candidates(
        findings,
        options.sub_token_sizes,
        lambda name: parameters[name].numel(),
        lambda use: exclusion(model, parameters, embeddings, use, options) or is_dense(use),
        options.is_factored,
    )
    if options.is_factored:  # the gradient and its optimizer state shrink whatever else keeps the input
        candidates, sharing = (*candidates, *sharing), ()
    _check_sizes(options, findings)
    simulator = Simulator(rehearsal, findings, (*candidates, *sharing), progress)
    progress("untouched step")
    untouched = simulator(Actions())

    return Analysis(
        findings=findings,
        candidates=candidates,
        sharing=sharing,
        blocks=find_recomputable(model, findings, rehearsal.is_compiled, rehearsal.passed_by),
        skipped=skipped + _without_products(rehearsal.untouched, findings, rehearsal.passed_by),
        baseline=with_overhead(simulator(Actions(), joined=True).peak, device),
        untouched=untouched,
        inputs=inputs_of(model, args, kwargs),
        device=device,
        notes=_notes(rehearsal, findings),
        is_compiled=rehearsal.is_compiled,
        is_factored=options.is_factored,
        simulate=simulator,
    )


def _check_can_be_planned_for(model: torch.nn.Module, options: Options, device: torch.device) -> None:
    """Refuses, before anything is run, a model without products, wrapped or without blocks, and some optimizers."""
    if not find_regions(model):
        raise ValueError(
            "the model has no trainable matrix product, so there is nothing to compress: "
            "check requires_grad of its parameters"
        )
    check_unwrapped(model, options.is_factored)  # it may have been wrapped since it was optimised
    if options.compiled == "blocks" and "" in find_blocks(model):
        raise ValueError(
            "compiled='blocks' is for a model whose repeated blocks are compiled one by one, and this one has no "
            "repeated blocks: use compiled=True for torch.compile(model)"
        )
    optimizer_factory(options.optimizer, model, device)  # refuses what cannot be planned for


def _findings(rehearsal: Rehearsal, progress: Callable[[str], None]) -> Findings:
    """The products, saved tensors and graphs of a trial step; of one with few of the equal blocks if that tells all."""
    shortened = shorten(rehearsal.rows, lambda name: None)
    if shortened.left_out:
        with contextlib.suppress(UnequalError):
            return lengthen_findings(*_trial(rehearsal, shortened, progress), shortened)
    return _trial(rehearsal, WHOLE, progress)[0]


def _trial(rehearsal: Rehearsal, shortened: Shortened, progress: Callable[[str], None]) -> tuple[Findings, ShownStep]:
    """What a trial step of a model with these blocks finds, and the step."""
    fake = rehearsal.fake_model(rehearsal.is_compiled, shortened)
    tracker = rehearsal.block_tracker(fake, shortened, rounding_bytes=1)
    steps: list[ShownStep] = []

    def run_step(fake: torch.nn.Module, tracker: BlockTracker) -> Timeline:
        steps.append(rehearsal.shown_step(fake, shortened, tracker))
        return steps[0].timeline

    def run_traced(fake: torch.nn.Module, _: BlockTracker) -> None:
        rehearsal.traced_forward(fake)

    run = run_traced if rehearsal.is_compiled else run_step
    findings = probe(fake, run, tracker, progress, rehearsal.passed_by)
    findings = _called(rehearsal, findings)
    if not rehearsal.is_compiled:
        return findings, steps[0]
    fake = rehearsal.fake_model(True, shortened)
    kept = KeptTensors(findings, rehearsal.block_tracker(fake, shortened, rounding_bytes=1))
    step = rehearsal.observed_step(fake, findings.graphs, kept.tracker, kept.observer_of)
    found = replace(findings, savings=tuple(kept.savings), last_uses=kept.last_uses, timeline=step.timeline)
    return found, step


def _called(rehearsal: Rehearsal, findings: Findings) -> Findings:
    """The findings; ValueError if none of the model's regions is called: then nothing is known of it."""
    if any(findings.calls.values()):
        return findings
    names = ", ".join(list(findings.calls)[:3])
    forward = vars(rehearsal.model).get("forward")
    replaced = f", in whose place is {getattr(forward, '__qualname__', forward)}," if forward is not None else ""
    raise ValueError(
        f"the forward of {type(rehearsal.model).__name__}{replaced} calls none of its modules that have weights to "
        f"train by a matrix product ({names}{', ...' if len(findings.calls) > 3 else ''}): pass example_inputs that "
        "make it call them, and leave a forward in place that calls the modules of the model that it is an attribute of"
    )


def _notes(rehearsal: Rehearsal, findings: Findings) -> tuple[str, ...]:
    notes = []
    options = rehearsal.options
    if rehearsal.is_compiled and rehearsal.device.type == "cuda" and not torch.cuda.is_available():
        notes.append("for want of a GPU the compiler's code is that for the CPU; Triton's may fuse otherwise")
    if options.gradient_accumulation > 1:
        notes.append(
            f"gradients of {options.gradient_accumulation} batches are added up: they are there from the start"
        )
    if not options.is_factored and any(use.is_recomputed for use in findings.uses.values()):
        notes.append(
            "blocks with gradient checkpointing keep nothing to compress; gradients='factored' makes the gradients and "
            "the optimizer state of their weights smaller all the same"
        )
    if not rehearsal.model.training:
        notes.append("the model is in eval mode; the plan is for training mode")
    if rehearsal.checks:
        broken = ", which is where torch.compile splits it into graphs that may keep more" * rehearsal.is_compiled
        places = "; ".join(sorted(rehearsal.checks))
        notes.append(f"where the model asks whether values are finite, they are taken to be{broken}: {places}")
    kinds = {name for m in rehearsal.model.modules() for kind, name in KERNELS.items() if isinstance(m, kind)}
    if kinds:
        notes.append(f"{UNCOUNTED}: those of {' and '.join(sorted(kinds))} may take more than the plan says")
    return tuple(notes)


def exclusion(
    model: torch.nn.Module,
    parameters: Mapping[str, torch.nn.Parameter],
    embeddings: Sequence[torch.Tensor],
    use: Use,
    options: Options,
) -> str | None:
    """Why a product is left as it is by choice: what `filter_fn` says, or by default that its weight is one of the
    embeddings, or the size of one as an output head's is, or that its input is narrow."""
    name = full_name(use.region, use.parameter)
    parameter = parameters[name]
    if options.filter_fn is not None:
        owner = name.rpartition(".")[0]
        return None if options.filter_fn(model.get_submodule(owner), owner) else "left out by filter_fn"
    if any(weight is parameter for weight in embeddings):
        return "its weight is tied to an embedding (filter_fn overrides)"
    is_outside_of_blocks = "" in (use.region, use.consumer)
    if is_outside_of_blocks and any(weight.shape == parameter.shape for weight in embeddings):
        return "it is the output head over a vocabulary (filter_fn overrides)"
    width = parameter.shape[use.input_dim] if use.input_dim is not None else NARROW
    if width < NARROW:
        return f"its input is only {width} wide, of which sub-tokens cost more than they free (filter_fn overrides)"
    return None


def _without_products(model: torch.nn.Module, findings: Findings, passed_by: Collection[str]) -> tuple[Skipped, ...]:
    """The modules of whose own matrices nothing is known: not called, or not captured and without parts to try."""
    skipped = [Skipped(name, "it was not called by the example inputs") for name, n in findings.calls.items() if not n]
    skipped += [
        Skipped(name, "its forward is not called, while its parts are")
        for name in sorted(passed_by)
        if has_trainable_matrix(model.get_submodule(name), recurse=False)
    ]
    for name, reason in findings.failures.items():
        module = model.get_submodule(name)
        if has_trainable_matrix(module, recurse=False) or not child_regions(module, name):
            skipped.append(Skipped(name, f"it could not be captured: {reason}"))
    parametrized = [
        name for name, module in model.named_modules() if torch.nn.utils.parametrize.is_parametrized(module)
    ]
    skipped += [
        Skipped(name, "its weight is parametrized, and so computed anew in each forward") for name in parametrized
    ]
    return tuple(skipped)


def _check_sizes(options: Options, findings: Findings) -> None:
    """Refuses sub-token sizes none of which divides the width of any input."""
    inputs = (*findings.savings, *findings.inputs.values())
    widths = sorted({saving.shape[-1] for saving in inputs if saving.consumer is not None})
    sizes = options.sub_token_sizes
    if sizes is not None and widths and all(width % size for width in widths for size in sizes):
        raise ValueError(
            f"sub_token_sizes {tuple(sizes)} divides none of the input widths "
            f"{', '.join(map(str, widths))}: choose divisors of them"
        )
