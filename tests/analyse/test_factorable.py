"""Which weights have a gradient with a factor of its own."""

from __future__ import annotations

import torch
from torch import nn

from velora_fx.analyse.factorable import not_factorable
from velora_fx.analyse.trial import Use


def parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return dict(model.named_parameters(remove_duplicate=False))


def test_a_weight_used_once_as_a_whole_has_one():
    model = nn.ModuleDict({"a": nn.Linear(4, 4)})
    use = Use("", "a", "a.weight", "a.weight", None, 1)
    assert not_factorable(parameters(model), [use], use) is None


def test_a_weight_with_two_names_two_products_or_in_part_has_none():
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    use, again = Use("", "a", "a.weight", "a.weight", None, 1), Use("a", "", "weight", "a.weight", None, 1)
    assert "several products" in str(not_factorable(parameters(model), [use, again], use))
    part = Use("", "a", "a.weight", "a.weight", None, None)
    assert "takes a part" in str(not_factorable(parameters(model), [part], part))
    model["b"].weight = model["a"].weight
    assert "shared with b.weight" in str(not_factorable(parameters(model), [use], use))
    assert torch.equal(model["b"].weight, model["a"].weight)
