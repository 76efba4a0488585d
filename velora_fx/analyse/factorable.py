"""Which weights can have a factored gradient."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from velora_fx.analyse.trial import Use, full_name


def not_factorable(parameters: Mapping[str, torch.nn.Parameter], uses: Iterable[Use], use: Use) -> str | None:
    """Why the gradient of a use's weight is not dYᵀz ⊗ v for one z and one v; None if it is.

    `parameters` are those of the model under all their names, `uses` all of its products.
    """
    name = full_name(use.region, use.parameter)
    weight = parameters[name]
    others = [other for other, parameter in parameters.items() if parameter is weight and other != name]
    if others:
        return f"its weight is shared with {others[0]}, so that its gradient has no factor of its own"
    if use.input_dim is None:
        return "it takes a part of its weight or shares it, so that the gradient has no factor of its own"
    if any(other is not use and full_name(other.region, other.parameter) == name for other in uses):
        return "its weight is used by several products, so that its gradient has no factor of its own"
    return None
