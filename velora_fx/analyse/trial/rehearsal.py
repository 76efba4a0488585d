"""Training steps of a model, run on copies of it that hold no memory."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from velora_fx.capture import LeftOut, RegionGraph, UnequalError, parameter_names
from velora_fx.devices import device_rates
from velora_fx.options import Options
from velora_fx.runtime import optimizer_factory, remove_carriers, uninstall, unwatch
from velora_fx.simulate import (
    StepTimer,
    Timeline,
    Tracker,
    default_loss,
    fake_copy,
    fake_mode,
    make_tracker,
    simulate,
    simulate_forward,
)
from velora_fx.simulate.compiled import (
    Apart,
    Inductor,
    ObserverOf,
    Trace,
    all_calls,
    compile_blocks,
    compiled_forward,
    unobserved,
)
from velora_fx.simulate.equal_blocks import (
    WHOLE,
    BlockTracker,
    Shortened,
    ShownStep,
    find_rows,
    make_block_tracker,
    note_all,
    shorten,
    stand_ins,
)

Graphs = Mapping[str, Sequence[RegionGraph]]


@dataclass(frozen=True)
class Rehearsal:
    """What the steps of one model for one batch have in common; the model itself is never touched.

    `checks` are the places in its code that have asked whether values are finite.
    """

    model: torch.nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    options: Options
    device: torch.device
    mode: FakeTensorMode = field(default_factory=fake_mode)
    checks: set[str] = field(default_factory=set)

    @property
    def is_compiled(self) -> bool:
        """True where blocks, or all of the model, run as under torch.compile."""
        return bool(self.options.compiled)

    @property
    def is_traced(self) -> bool:
        """True where the model is compiled as a whole."""
        return self.options.compiled is True

    def fake_model(self, traced: bool, shortened: Shortened = WHOLE) -> torch.nn.Module:
        """An untouched copy in training mode, with real integers unless it is to be traced, and with few of its equal
        blocks where it is `shortened`."""
        places, noting = stand_ins(self.model, shortened)
        fake = fake_copy(self.model, self.mode, self.device, "none" if traced else "integers", places)
        uninstall(fake)
        remove_carriers(fake)
        unwatch(fake)
        note_all(fake, noting)
        return fake if self.model.training else fake.train()

    @cached_property
    def rows(self) -> tuple[tuple[str, ...], ...]:
        """The rows of equal blocks, by their names."""
        blocks = {block for row in self._rows for block in row}
        if any(name == block or block.startswith(f"{name}.") for name in self.passed_by for block in blocks):
            return find_rows(self.untouched, self.passed_by)
        return self._rows

    @cached_property
    def _rows(self) -> tuple[tuple[str, ...], ...]:
        """The same where the forward of every block is called."""
        return find_rows(self.untouched)

    @cached_property
    def untouched(self) -> torch.nn.Module:
        """A copy to look at."""
        return self.fake_model(self.is_compiled)

    @cached_property
    def passed_by(self) -> frozenset[str]:
        """The modules whose forward is not called by the model's, while that of a part of theirs is."""
        shortened = shorten(self._rows, lambda name: None)
        try:
            called = self._called(shortened)
        except UnequalError:
            called = self._called(WHOLE)
        within = {name[:dot] for name in called for dot, sign in enumerate(name) if sign == "."}
        return frozenset(within - called)

    def _called(self, shortened: Shortened) -> set[str]:
        """The modules whose forward is called."""
        fake, called = self.fake_model(self.is_compiled, shortened), set[str]()
        for name, module in fake.named_modules():
            if not isinstance(module, LeftOut):
                module.forward = _noting(module.forward, partial(called.add, name))
        self.forward(fake)
        for name, shown in shortened.left_out:
            own = [part for part in called if part == shown or part.startswith(f"{shown}.")]
            called |= {name + part[len(shown) :] for part in own}
        return called

    def eager_step(self, fake: torch.nn.Module) -> Timeline:
        """A step of a fake model as it is."""
        return self._step(fake, self._inputs("all"), make_tracker(fake, self.device))

    def block_tracker(
        self, fake: torch.nn.Module, shortened: Shortened, rounding_bytes: int | None = None
    ) -> BlockTracker:
        """The tracker of a step of a fake model that is shortened."""
        return make_block_tracker(fake, self.device, shortened.shown, self._timer, rounding_bytes)

    def shown_step(self, fake: torch.nn.Module, shortened: Shortened, tracker: BlockTracker | None = None) -> ShownStep:
        """An eager step of a fake model that is shortened, also of one whose blocks are compiled one by one."""
        tracker = tracker or self.block_tracker(fake, shortened)
        return tracker.step(self._step(fake, self._inputs("all"), tracker))

    def shown_compiled_step(
        self, fake: torch.nn.Module, shortened: Shortened, graphs: Graphs, apart: Apart
    ) -> ShownStep:
        """A step of `torch.compile(model)` that is shortened."""
        tracker = self.block_tracker(fake, shortened)
        return tracker.step(self._compiled_step(fake, graphs, tracker, unobserved, apart))

    def compiled_step(self, fake: torch.nn.Module, graphs: Graphs, apart: Apart) -> Timeline:
        """A step of `torch.compile(model)`; `graphs` are those of untouched blocks."""
        return self._compiled_step(fake, graphs, make_tracker(fake, self.device), unobserved, apart)

    def observed_step(
        self, fake: torch.nn.Module, graphs: Graphs, tracker: BlockTracker, observer_of: ObserverOf
    ) -> ShownStep:
        """The same with each block compiled apart, so that what is observed belongs to one; its figures are estimates.

        `observer_of` makes the observer of a graph, given the parameter behind each of its inputs.
        """
        return tracker.step(self._compiled_step(fake, graphs, tracker, observer_of, all_calls))

    def compile_blocks(self, fake: torch.nn.Module, graphs: Graphs) -> None:
        """Has the blocks of a fake model run as after `block.compile()`: its step is an eager one from then on."""
        compile_blocks(fake, graphs, self._compiler, self.passed_by)

    def forward(self, fake: torch.nn.Module) -> None:
        """The forward alone, as it runs or, of compiled steps, as a compiler traces it."""
        simulate_forward(fake, *self._inputs("none" if self.is_compiled else "all"), self.device, self.is_compiled)

    def traced_forward(self, fake: torch.nn.Module) -> None:
        """The forward alone, as a compiler traces it."""
        simulate_forward(fake, *self._inputs("none"), self.device, True, self.checks)

    def _compiled_step(
        self, fake: torch.nn.Module, graphs: Graphs, tracker: Tracker, observer_of: ObserverOf, apart: Apart
    ) -> Timeline:
        inputs = self._inputs("none")
        fake.forward = compiled_forward(
            fake, *inputs, graphs, self._compiler, observer_of, tracker.inside, apart, self.passed_by, self._traces
        )
        return self._step(fake, inputs, tracker)

    def _step(self, fake: torch.nn.Module, inputs: tuple[Any, Any], tracker: Tracker) -> Timeline:
        return simulate(
            fake,
            *inputs,
            input_names=parameter_names(self.model),
            make_optimizer=optimizer_factory(self.options.optimizer, self.model, self.device),
            loss_fn=self.options.loss_fn or default_loss,
            device=self.device,
            timer=self._timer,
            accumulates=self.options.gradient_accumulation > 1,
            tracker=tracker,
            checks=self.checks,
        )

    def _inputs(self, real: Any) -> tuple[Any, Any]:
        args, kwargs = fake_copy((self.args, self.kwargs), self.mode, self.device, real)
        return args, kwargs

    @cached_property
    def _timer(self) -> StepTimer:
        return StepTimer(device_rates(self.device))

    @cached_property
    def _traces(self) -> dict[Hashable, Trace]:
        return {}

    @cached_property
    def _compiler(self) -> Inductor:
        return Inductor(self.device, self._timer)


def _noting(forward: Callable[..., Any], note: Callable[[], None]) -> Callable[..., Any]:
    """The forward, which notes that it is called."""

    def noted(*args: Any, **kwargs: Any) -> Any:
        note()
        return forward(*args, **kwargs)

    return noted
