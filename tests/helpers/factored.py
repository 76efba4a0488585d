"""Small models with factored gradients, and what they are compared with: the same plan with dense ones."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

import velora_fx
from tests.helpers.gradients import tightest
from tests.helpers.toys import rows, stack
from tests.helpers.zoo import ZOO, loss_of

CASES = {case.name: case for case in ZOO}


@dataclass(frozen=True)
class Pair:
    """A model with factored and one with dense gradients, and its batch of a number."""

    factored: nn.Module
    dense: nn.Module
    batch: Callable[[int], Any]

    def copies(self) -> tuple[nn.Module, nn.Module]:
        """Copies to train."""
        return copy.deepcopy(self.factored), copy.deepcopy(self.dense)


@cache
def pair(name: str, target: str = "eager") -> Pair:
    """In float64 and without dropout: a `Stack`, or a model of the zoo."""
    if name == "stack":
        model: nn.Module = stack().double()

        def batch(number: int) -> dict[str, Tensor]:
            return {"x": rows().double() + number}
    else:
        case = CASES[name]
        model = case.build().double()
        if hasattr(model, "config"):
            model.config.use_cache = False

        def batch(number: int) -> dict[str, Tensor]:
            inputs = case.batch(*case.shapes[0], seed=number)
            return {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}

    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    loss = (lambda loss: loss) if name == "stack" else loss_of
    plan = tightest(model, batch(0), gradients="factored", compiled=target == "inductor", loss_fn=loss)
    factored, dense = (
        velora_fx.apply(copy.deepcopy(model), made, batch(0)) for made in (plan, replace(plan, gradients="dense"))
    )
    return Pair(factored, dense, batch)


def loss_value(output: Any) -> Tensor:
    """The scalar of a `Stack` or of a model of the zoo."""
    return output if isinstance(output, Tensor) and output.dim() == 0 else loss_of(output)


def carriers(model: nn.Module) -> dict[str, nn.Parameter]:
    """The carriers by name."""
    return {name: parameter for name, parameter in model.named_parameters() if name.endswith("_carrier")}


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3, closure: bool = False) -> None:
    """Steps on the batches of `pair("stack")`; with `closure`, which makes the gradients, by position and by name."""
    for number in range(steps):

        def gradients(number: int = number) -> Tensor:
            optimizer.zero_grad()
            loss = loss_value(model(**pair("stack").batch(number)))
            loss.backward()
            return loss

        if closure:
            loss = optimizer.step(gradients) if number % 2 else optimizer.step(closure=gradients)  # type: ignore[arg-type]
            assert loss.isfinite()
        else:
            gradients()
            optimizer.step()


def assert_trained_alike(train_one: Callable[[nn.Module], None]) -> nn.Module:
    """Trains copies of both of `pair("stack")`, whose weights are the same then; returns the one with carriers."""
    ours, reference = pair("stack").copies()
    for model in (ours, reference):
        train_one(model)
    assert_same_weights(ours, reference, pair("stack").dense)
    assert not any(carrier.any() for carrier in carriers(ours).values())
    return ours


def assert_same_weights(ours: nn.Module, reference: nn.Module, start: nn.Module, tolerance: float = 1e-9) -> None:
    """||a - b|| <= tolerance * max(||b||, 1e-3 ||all of the model||), all finite, compressed weights changed."""
    expected, before = reference.state_dict(), start.state_dict()
    found = ours.state_dict()
    assert list(found) == list(expected)
    total = torch.stack([value.double().norm() for value in expected.values()]).norm()
    for name, value in found.items():
        assert value.isfinite().all(), name
        error = (value.double() - expected[name].double()).norm()
        assert error <= tolerance * max(expected[name].double().norm(), 1e-3 * total), f"{name}: {error:.3g}"
    for name in carriers(ours):
        weight = name.removesuffix("_carrier")
        assert not torch.equal(found[weight], before[weight]), f"{weight} was not trained"
