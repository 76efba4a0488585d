"""Finds out everything about a training step of a model that planning needs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from types import FunctionType
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from velora_fx.arguments import named_tensors, parameter_names
from velora_fx.batch_watch import unwatch
from velora_fx.blocks import Block, find_recomputable
from velora_fx.candidates import Candidate, find_candidates, full_name
from velora_fx.checkpointing import Recompute, install_checkpointing
from velora_fx.compiled import ObserverOf, compiled_forward, unobserved
from velora_fx.devices import device_rates
from velora_fx.fake import Real, fake_copy, fake_mode
from velora_fx.inductor import Inductor
from velora_fx.installing import RegionPlan, install, region_plans
from velora_fx.kept import KeptTensors
from velora_fx.options import Options
from velora_fx.overhead import with_overhead
from velora_fx.plans import Input, Skipped
from velora_fx.probe import Findings, Use, probe
from velora_fx.regional import compile_blocks
from velora_fx.regions import child_regions, find_regions
from velora_fx.simulate import default_loss, make_tracker, optimizer_factory, simulate, simulate_forward
from velora_fx.stand_in import uninstall
from velora_fx.step_time import StepTimer
from velora_fx.timeline import Peak, Timeline
from velora_fx.tracker import Tracker

Sizes = Mapping[tuple[str, str], int]


@dataclass(frozen=True)
class Actions:
    """What is done about saved tensors: the sub-token size of each compressed candidate by its key, and what each
    block that is named recomputes in backward."""

    sizes: Sizes = field(default_factory=dict)
    recomputed: Mapping[str, Recompute] = field(default_factory=dict)


@dataclass(frozen=True)
class Analysis:
    """A model's step: its timeline, what can be compressed or recomputed, and what cannot.

    `timeline` is that of the trial step, whose events `findings` and `blocks` refer to. `simulate` gives the timeline
    with the given actions; with `compiler_recomputes` that of a compiler that is told to recompute what it can, with
    `is_whole=False` that of blocks that are compiled one by one (`block.compile()`).
    """

    findings: Findings
    candidates: tuple[Candidate, ...]
    blocks: tuple[Block, ...]
    skipped: tuple[Skipped, ...]
    baseline: Peak
    untouched: Timeline
    inputs: tuple[Input, ...]
    device: torch.device
    notes: tuple[str, ...]
    is_compiled: bool
    simulate: Callable[..., Timeline]

    @property
    def has_blocks(self) -> bool:
        """False for a model in which nothing repeats."""
        return set(self.findings.calls) != {""}

    def region_plans(self, sizes: Sizes) -> dict[str, RegionPlan]:
        """What to install for the given sub-token sizes."""
        return region_plans(self.findings, self.candidates, sizes)

    def peak(self, actions: Actions, **how: bool) -> Peak:
        """The simulated peak with the given actions, overhead included; `how` is as for `simulate`."""
        return with_overhead(self.simulate(actions, **how).peak, self.device)


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
    if not find_regions(model):
        raise ValueError(
            "the model has no trainable matrix product, so there is nothing to compress: "
            "check requires_grad of its parameters"
        )
    mode = fake_mode()
    make_optimizer = optimizer_factory(options.optimizer, model, device)
    replaced = [name for name, module in model.named_modules() if isinstance(vars(module).get("forward"), FunctionType)]
    timer = StepTimer(device_rates(device))
    is_compiled = options.target == "inductor"
    compilers = {told: Inductor(device, timer, told) for told in (False, True)} if is_compiled else {}

    def fake_model(is_whole: bool = is_compiled) -> torch.nn.Module:
        return _fake_model(model, mode, device, replaced, "none" if is_whole else "integers")

    def step(
        fake: torch.nn.Module,
        tracker: Tracker | None = None,
        observer_of: ObserverOf = unobserved,
        compiler_recomputes: bool = False,
        is_whole: bool = is_compiled,
    ) -> Timeline:
        trial = tracker is not None  # its figures are estimates, and what it finds has to belong to blocks
        tracker = tracker or make_tracker(fake, device)
        inputs = fake_copy((args, kwargs), mode, device, real="none" if is_whole else "all")
        if is_compiled and not is_whole:
            compile_blocks(fake, findings.graphs, compilers[compiler_recomputes])
        elif is_compiled:
            compiler = compilers[compiler_recomputes]
            fake.forward = compiled_forward(
                fake, *inputs, findings.graphs, compiler, observer_of, tracker.inside, by_blocks=trial
            )
        loss_fn = options.loss_fn or default_loss
        return simulate(
            fake, *inputs, input_names=parameter_names(model), make_optimizer=make_optimizer, loss_fn=loss_fn,
            device=device, timer=timer, accumulates=options.gradient_accumulation > 1, tracker=tracker,
        )  # fmt: skip

    def traced_forward(fake: torch.nn.Module) -> None:
        simulate_forward(fake, *fake_copy((args, kwargs), mode, device, real="none"), device)

    def simulate_actions(actions: Actions, compiler_recomputes: bool = False, is_whole: bool = is_compiled) -> Timeline:
        progress("planned step")
        fake = fake_model(is_whole)
        install(fake, region_plans(findings, candidates, actions.sizes), options.seed)
        install_checkpointing(fake, actions.recomputed)
        return step(fake, compiler_recomputes=compiler_recomputes, is_whole=is_whole)

    if is_compiled:
        findings = probe(fake_model(), None, traced_forward, Tracker(), progress, replaced)
        kept = KeptTensors(findings, Tracker())
        timeline = step(fake_model(), kept.tracker, kept.observer_of)
        findings = replace(findings, savings=tuple(kept.savings), last_uses=kept.last_uses, timeline=timeline)
    else:
        findings = probe(fake_model(), step, traced_forward, Tracker(), progress, replaced)
    progress("untouched step")
    untouched = step(fake_model())
    parameters = dict(model.named_parameters(remove_duplicate=False))
    candidates, skipped = find_candidates(
        findings,
        options.sub_token_sizes,
        lambda name: parameters[name].numel(),
        lambda use: exclusion(model, parameters, use, options),
    )
    _check_sizes(options, candidates, findings)
    return Analysis(
        findings, candidates, find_recomputable(model, findings, is_compiled),
        skipped + _without_products(fake_model(), findings), with_overhead(untouched.peak, device), untouched,
        _inputs(model, args, kwargs), device, _notes(model, replaced, options, device), is_compiled,
        simulate_actions,
    )  # fmt: skip


def _inputs(model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Input, ...]:
    tensors = named_tensors(parameter_names(model), args, kwargs)
    return tuple(Input(name, tuple(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in tensors)


def _fake_model(
    model: torch.nn.Module, mode: FakeTensorMode, device: torch.device, replaced: Collection[str], real: Real
) -> torch.nn.Module:
    """An untouched copy in training mode; modules in `replaced` get the forward of their class.

    A copy of a function would still call the module that it was made for.
    """
    fake = fake_copy(model, mode, device, real)
    for name in replaced:
        del fake.get_submodule(name).forward
    uninstall(fake)
    unwatch(fake)
    return fake if model.training else fake.train()


def _notes(
    model: torch.nn.Module, replaced: Collection[str], options: Options, device: torch.device
) -> tuple[str, ...]:
    notes = []
    if options.target == "inductor" and device.type == "cuda" and not torch.cuda.is_available():
        notes.append("for want of a GPU the compiler's code is that for the CPU; Triton's may fuse otherwise")
    if options.gradient_accumulation > 1:
        notes.append(
            f"gradients of {options.gradient_accumulation} batches are added up: they are there from the start"
        )
    if not model.training:
        notes.append("the model is in eval mode; the plan is for training mode")
    if "" in replaced:
        notes.append("the model's forward was replaced by a function; the plan is for the forward of its class")
    return tuple(notes)


def exclusion(
    model: torch.nn.Module, parameters: Mapping[str, torch.nn.Parameter], use: Use, options: Options
) -> str | None:
    """Why a product is left as it is by choice: what `filter_fn` says, or tied and vocabulary weights by default."""
    name = full_name(use.region, use.parameter)
    parameter = parameters[name]
    if options.filter_fn is not None:
        owner = name.rpartition(".")[0]
        return None if options.filter_fn(model.get_submodule(owner), owner) else "left out by filter_fn"
    embeddings = [module.weight for module in model.modules() if isinstance(module, torch.nn.Embedding)]
    if any(weight is parameter for weight in embeddings):
        return "its weight is tied to an embedding (filter_fn overrides)"
    is_outside_of_blocks = "" in (use.region, use.consumer)
    if is_outside_of_blocks and any(weight.shape == parameter.shape for weight in embeddings):
        return "it is the output head over a vocabulary (filter_fn overrides)"
    return None


def _without_products(model: torch.nn.Module, findings: Findings) -> tuple[Skipped, ...]:
    """The regions of which nothing is known: not called, or not captured and without parts to try instead."""
    skipped = [Skipped(name, "it was not called by the example inputs") for name, n in findings.calls.items() if not n]
    for name, reason in findings.failures.items():
        if not child_regions(model.get_submodule(name), name):
            skipped.append(Skipped(name, f"it could not be captured: {reason}"))
    parametrized = [
        name for name, module in model.named_modules() if torch.nn.utils.parametrize.is_parametrized(module)
    ]
    skipped += [
        Skipped(name, "its weight is parametrized, and so computed anew in each forward") for name in parametrized
    ]
    return tuple(skipped)


def _check_sizes(options: Options, candidates: tuple[Candidate, ...], findings: Findings) -> None:
    """Refuses sub-token sizes none of which divides the width of any input."""
    widths = sorted({saving.shape[-1] for saving in findings.savings if saving.consumer is not None})
    if options.sub_token_sizes is not None and not candidates and widths:
        raise ValueError(
            f"sub_token_sizes {tuple(options.sub_token_sizes)} divides none of the input widths "
            f"{', '.join(map(str, widths))}: choose divisors of them"
        )
