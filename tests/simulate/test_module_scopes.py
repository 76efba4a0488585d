"""Which module a storage is of: the one whose forward made it, in forward and in backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import velora_fx
from tests.helpers.gradients import tightest
from tests.helpers.toys import Of, rows, stack
from velora_fx.devices import device_rates
from velora_fx.runtime import optimizer_factory
from velora_fx.simulate import StepTimer, Timeline, default_loss, fake_copy, fake_mode, make_tracker, simulate
from velora_fx.simulate.module_scopes import Scopes

CPU = torch.device("cpu")


class Widths(nn.Module):
    """Linears of widths that no two share, so that the shape of a weight's gradient tells the module."""

    def __init__(self, recompute: bool = False) -> None:
        super().__init__()
        self.first = nn.Linear(3, 5, bias=False)
        self.inner = nn.Sequential(nn.Linear(5, 7, bias=False), nn.Tanh(), nn.Linear(7, 11, bias=False))
        self.head = nn.Linear(11, 2, bias=False)
        self.recompute = recompute

    def forward(self, x: Tensor) -> Tensor:
        h = torch.sigmoid(self.first(x))
        h = checkpoint(self.inner, h, use_reentrant=False) if self.recompute else self.inner(h)  # type: ignore[assignment]
        return self.head(h)  # type: ignore[no-any-return]


def timeline_of(model: nn.Module, *args: Any, optimizer: str = "sgd", **options: Any) -> Timeline:
    """The timeline of a step of a fake copy."""
    mode = fake_mode()
    fake = fake_copy(model, mode)
    options = {"loss_fn": default_loss, "make_optimizer": optimizer_factory(optimizer, model, CPU), **options}
    return simulate(
        fake, fake_copy(args, mode), {}, input_names=("x",), device=CPU, tracker=make_tracker(fake, CPU),
        timer=StepTimer(device_rates(CPU)), **options,
    )  # fmt: skip


def labels(timeline: Timeline) -> list[str]:
    return [str(label) for label in timeline.labels]


def test_every_storage_of_a_step_has_a_label() -> None:
    assert labels(timeline_of(Widths(), torch.zeros(4, 3), optimizer="adamw"))[:17] == [
        *(
            f"{state} of {weight}.weight"
            for weight in ("first", "inner.0", "inner.2", "head")
            for state in ("step", "exp_avg", "exp_avg_sq")
        ),
        *(f"{weight}.weight" for weight in ("first", "inner.0", "inner.2", "head")),
        "x",
    ]


def test_what_a_forward_makes_is_named_by_the_innermost_module() -> None:
    made = labels(timeline_of(Widths(), torch.zeros(4, 3)))
    assert made[5:10] == [
        "first: linear [4, 5] float32",
        "the model: sigmoid [4, 5] float32",
        "inner.0: linear [4, 7] float32",
        "inner.1: tanh [4, 7] float32",
        "inner.2: linear [4, 11] float32",
    ]


def test_a_linear_has_the_shape_that_people_see() -> None:
    made = labels(timeline_of(Widths(), torch.zeros(2, 4, 3)))
    assert "inner.0: linear [2, 4, 7] float32" in made and "head: linear [2, 4, 2] float32" in made


@pytest.mark.parametrize("recompute", [False, True])
def test_what_backward_makes_is_named_by_the_module_whose_forward_it_undoes(recompute: bool) -> None:
    """By the events that allocate the gradients, which the parameters themselves tell apart."""
    timeline = timeline_of(Widths(recompute), torch.zeros(4, 3))
    births = [(timeline.births[s], str(timeline.labels[s])) for s in timeline.births]
    gradients = [(event, name) for event, name in births if name.startswith("gradient of")]
    assert len(gradients) == 4
    for event, name in gradients:
        place = [place for place in timeline.places if place.event <= event][-1]
        assert f"gradient of {place.scope}.weight" == name and place.name == f"backward of {place.scope}"
    assert "backward of inner.1: tanh_backward [4, 7] float32" in labels(timeline)


def test_what_a_checkpoint_computes_again_is_of_its_module_in_backward() -> None:
    made = labels(timeline_of(Widths(recompute=True), torch.zeros(4, 3)))
    assert "backward of inner.1: tanh [4, 7] float32" in made
    assert "backward of inner.1: tanh [4, 7] float32" not in labels(timeline_of(Widths(), torch.zeros(4, 3)))


def test_gradients_that_are_copied_are_of_the_module_of_their_weight() -> None:
    """Autograd gives both weights of a sum the same gradient, and the nodes that store it make copies."""
    parts = {"first": nn.Linear(3, 5), "second": nn.Linear(3, 5)}
    timeline = timeline_of(Of(lambda m, x: (m.first.weight + m.second.weight).sum() * x, **parts), torch.zeros(()))
    places = {
        str(label): [place.name for place in timeline.places if place.event <= timeline.births[storage]][-1]
        for storage, label in enumerate(timeline.labels)
    }
    assert places["gradient of first.weight"] == "backward of first"
    assert places["gradient of second.weight"] == "backward of second"


def test_gradients_of_other_batches_are_named_before_the_step() -> None:
    made = labels(timeline_of(Widths(), torch.zeros(4, 3), accumulates=True))
    assert made[4:8] == [f"gradient of {name}.weight" for name in ("first", "inner.0", "inner.2", "head")]


def loss_and_logits(m: Of, x: Tensor) -> dict[str, Tensor]:
    """Computes its loss itself, after its last module."""
    logits = m.head(x) * 2
    return {"loss": F.cross_entropy(logits, torch.zeros(len(x), dtype=torch.long)), "logits": logits}


WITH_LOSS = Of(loss_and_logits, head=nn.Linear(8, 16))


@pytest.mark.parametrize("model", [WITH_LOSS, Of(lambda m, x: m.model(x), model=WITH_LOSS)], ids=["bare", "wrapped"])
def test_the_end_of_a_forward_that_returns_its_loss_is_the_loss(model: nn.Module) -> None:
    timeline = timeline_of(model, torch.zeros(4, 8))
    made = labels(timeline)
    assert "loss: mul [4, 16] float32" in made and "loss: log_softmax [4, 16] float32" in made
    assert "backward of loss: log_softmax_backward_data [4, 16] float32" in made
    names = list(dict.fromkeys(place.name for place in timeline.places))
    start = names.index("start of backward, in the loss")
    assert names[start - 1] == "forward, in the loss" and names[start + 1].endswith("head")


def test_without_a_loss_in_it_the_end_of_a_forward_is_the_models() -> None:
    timeline = timeline_of(WITH_LOSS, torch.zeros(4, 8), loss_fn=lambda output: output["logits"].exp().sum())
    made = labels(timeline)
    assert "the model: mul [4, 16] float32" in made and "the model: log_softmax [4, 16] float32" in made
    assert "loss: exp [4, 16] float32" in made
    names = list(dict.fromkeys(place.name for place in timeline.places))
    assert names[names.index("start of backward, in the loss") + 1] == "start of backward"


def test_temporaries_of_the_optimizer_are_named_as_such() -> None:
    def foreach(copied: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(copied.parameters(), foreach=True)

    timeline = timeline_of(Widths(), torch.zeros(4, 3), make_optimizer=foreach)
    assert "optimizer step: foreach_sqrt [7, 5] float32" in labels(timeline)
    assert timeline.places[-1].name == "optimizer step"


def test_graphs_of_blocks_are_of_their_block() -> None:
    planned = tightest(stack(), (rows(),), optimizer="adamw").planned.timeline
    assert planned is not None
    assert "blocks.1: compress [4, 8, 1] float32" in labels(planned)
    assert "backward of blocks.1" in {place.name for place in planned.places}


def test_compiled_graphs_are_of_their_block_or_with_what_surrounds_them_of_the_model() -> None:
    timeline = velora_fx.plan(stack(num_blocks=14), 1, (rows(),), compiled=True).planned.timeline
    assert timeline is not None
    names = list(dict.fromkeys(place.name for place in timeline.places))
    inner = [f"blocks.{number}" for number in range(1, 13)]  # the ends are compiled with what surrounds them
    assert [name for name in names if "blocks" in name] == [
        *(f"forward of {name}" for name in inner),
        *(f"backward of {name}" for name in reversed(inner)),
    ]
    last = names.index("backward of blocks.12")
    assert (
        names[last - 1] == "start of backward" and "forward of the model" in names[: names.index("forward of blocks.1")]
    )
    assert "blocks.1: [4, 8, 64] float32" in labels(timeline)


def test_modules_are_called_as_before_when_it_is_over() -> None:
    before = nn.Module.__call__
    with pytest.raises(RuntimeError, match="no luck"), Scopes(nn.Linear(2, 2)).on():
        assert nn.Module.__call__ is not before
        raise RuntimeError("no luck")
    assert nn.Module.__call__ is before


def test_modules_of_other_models_are_left_alone() -> None:
    model, other = nn.Linear(2, 2), nn.Tanh()
    scopes = Scopes(nn.Sequential(model))
    seen: list[str] = []
    other.register_forward_hook(lambda *_: seen.append(str(scopes.current())))
    model.register_forward_hook(lambda *_: seen.append(str(scopes.current())))
    with scopes.on():
        other(torch.zeros(2))
        model(torch.zeros(2))
    assert seen == ["loss", "0"]
