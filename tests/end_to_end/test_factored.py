"""Training with factored gradients is training with dense ones."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from tests.helpers.factored import assert_same_weights, carriers, loss_value, pair

STEPS = 50
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "AdamW": torch.optim.AdamW,
    "AdamW amsgrad": partial(torch.optim.AdamW, amsgrad=True, maximize=True),
    "AdamW foreach": partial(torch.optim.AdamW, weight_decay=0.3, foreach=True),
    "AdamW fused": partial(torch.optim.AdamW, weight_decay=0.3, fused=True),
    "AdamW rate tensor": lambda ps: torch.optim.AdamW(ps, lr=torch.tensor(1e-3, dtype=torch.float64), weight_decay=0.3),
    "Adam": torch.optim.Adam,
    "Adam decoupled": partial(torch.optim.Adam, weight_decay=0.3, decoupled_weight_decay=True),
    "NAdam": torch.optim.NAdam,
    "NAdam decoupled": partial(torch.optim.NAdam, weight_decay=0.3, decoupled_weight_decay=True),
    "RAdam": torch.optim.RAdam,
    "RAdam decoupled": partial(torch.optim.RAdam, weight_decay=0.3, decoupled_weight_decay=True),
    "Adamax": torch.optim.Adamax,
    # At its default rate of 0.01 the loss rises, and every last bit with it.
    "RMSprop": partial(torch.optim.RMSprop, lr=1e-4),
    "RMSprop centered": partial(torch.optim.RMSprop, centered=True, momentum=0.9, lr=1e-5),
    "Adagrad": torch.optim.Adagrad,
    "Adadelta": torch.optim.Adadelta,
    "Rprop": torch.optim.Rprop,
    "SGD": partial(torch.optim.SGD, lr=1e-2),
    "SGD momentum": partial(torch.optim.SGD, lr=1e-2, momentum=0.9, nesterov=True),
}


def train(
    model: nn.Module,
    batch: Callable[[int], Any],
    make: Callable[[Any], torch.optim.Optimizer],
    steps: int = STEPS,
    accumulation: int = 1,
    run: Callable[..., Any] | None = None,
) -> None:
    """Steps with a learning rate that changes, gradients clipped by their norm."""
    optimizer = make(model.parameters())
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step / 20))
    for step in range(steps):
        for part in range(accumulation):
            torch.manual_seed(accumulation * step + part)  # of dropout in functions and of dropped paths
            loss_value((model if run is None else run)(**batch(accumulation * step + part))).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        assert not any(carrier.any() for carrier in carriers(model).values())


@pytest.mark.parametrize("name", ["llama", pytest.param("vit", marks=pytest.mark.slow)])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_elementwise_optimizer_steps_as_with_dense_gradients(name, optimizer):
    both = pair(name)
    ours, reference = both.copies()
    for model in (ours, reference):
        train(model, both.batch, OPTIMIZERS[optimizer])
    assert_same_weights(ours, reference, both.dense)


@pytest.mark.parametrize("name", [pytest.param("llama", marks=pytest.mark.slow), "gpt2"])
def test_gradients_of_several_batches_add_up_as_dense_ones_do(name):
    both = pair(name)
    ours, reference = both.copies()
    for model in (ours, reference):
        train(model, both.batch, torch.optim.AdamW, steps=10, accumulation=3)
    assert_same_weights(ours, reference, both.dense)


@pytest.mark.parametrize(
    "name",
    [
        "stack",
        "gpt2",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("t5", "mixtral", "swin", "bert", "llama_lora")),
    ],
)
def test_all_kinds_of_models_train_as_with_dense_gradients(name):
    both = pair(name)
    ours, reference = both.copies()
    assert carriers(ours)
    for model in (ours, reference):
        train(model, both.batch, torch.optim.AdamW, steps=5)
    assert_same_weights(ours, reference, both.dense)


@pytest.mark.slow
def test_compiled_in_one_graph_it_trains_as_compiled_with_dense_gradients():
    both = pair("llama")
    ours, reference = both.copies()
    for model in (ours, reference):
        torch._dynamo.reset()
        train(model, both.batch, torch.optim.AdamW, run=torch.compile(model, fullgraph=True))
    assert_same_weights(ours, reference, both.dense)


def test_the_norm_of_all_gradients_is_that_of_dense_ones():
    both = pair("llama")
    norms = []
    for model in both.copies():
        loss_value(model(**both.batch(3))).backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), 1.0))
    torch.testing.assert_close(*norms, rtol=1e-12, atol=0)


def test_a_gradient_is_what_it_was_once_the_step_is_over():
    model, _ = pair("stack").copies()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(**pair("stack").batch(0)).backward()
    before = {name: carrier.grad.clone() for name, carrier in carriers(model).items()}
    optimizer.step()
    for name, carrier in carriers(model).items():
        torch.testing.assert_close(carrier.grad, before[name], rtol=1e-14, atol=0)
