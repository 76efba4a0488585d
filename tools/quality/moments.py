"""AdamW whose moments differ from what compression makes of them in one respect each, to find out what helps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from velora_fx.ops import sign_projection

BETAS, EPS, WEIGHT_DECAY = (0.9, 0.95), 1e-8, 0.01


class FoldedAdamW(torch.optim.Optimizer):
    """AdamW, but for the weights [O, D] that `sizes` gives a sub-token size M, by parameter.

    Compression with signs makes every entry of a sub-token's gradient of one magnitude. That does two things to Adam,
    and `moments` tells them apart; gradients are exact:

    * "folded": the second moment is the mean over each sub-token, [O, D / M]; the first is that of AdamW.
    * "projected": the first moment is that of the gradient projected on signs, as compression has it; the second is
      that of AdamW.
    * "both": first and second moment of the projected gradient, which is what compression computes.
    """

    def __init__(
        self,
        parameters: Any,
        lr: float,
        sizes: Mapping[Tensor, int],
        moments: str,
        seed: int = 0,
    ) -> None:
        super().__init__(parameters, {"lr": lr})
        self.sizes, self.moments, self.seed = sizes, moments, seed

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step of all parameters that have a gradient."""
        for group in self.param_groups:
            for number, parameter in enumerate(group["params"]):
                if parameter.grad is not None:
                    self._step(parameter, self.state[parameter], group["lr"], str(number))

    def _step(self, parameter: Tensor, state: dict[str, Any], rate: float, name: str) -> None:
        assert parameter.grad is not None
        grad, size = parameter.grad, self.sizes.get(parameter, 1)
        projected = self._projected(grad, size, name, state) if size > 1 and self.moments != "folded" else grad
        seen = projected if self.moments == "both" else grad
        squares = seen.square()
        if size > 1 and self.moments == "folded":
            squares = _sub_tokens(squares, size).mean(-1)
        if not state.get("step"):
            state.update(step=0, first=torch.zeros_like(grad), second=torch.zeros_like(squares))
        state["step"] += 1
        state["first"].lerp_(projected, 1 - BETAS[0])
        state["second"].lerp_(squares, 1 - BETAS[1])
        first = state["first"] / (1 - BETAS[0] ** state["step"])
        root = (state["second"] / (1 - BETAS[1] ** state["step"])).sqrt() + EPS
        if size > 1 and self.moments == "folded":
            root = root.unsqueeze(-1).expand(*root.shape, size).reshape(grad.shape)
        parameter.mul_(1 - rate * WEIGHT_DECAY).sub_(rate * first / root)

    def _projected(self, grad: Tensor, size: int, name: str, state: dict[str, Any]) -> Tensor:
        """The gradient with each sub-token projected on its signs."""
        if "signs" not in state:
            groups = grad.shape[1] // size
            state["signs"] = sign_projection(self.seed, "moments", name, groups, size, grad.dtype).to(grad.device)
        tokens = _sub_tokens(grad, size)
        lengths = (tokens * state["signs"]).sum(-1, keepdim=True)
        projected: Tensor = (lengths * state["signs"]).reshape(grad.shape)
        return projected


def _sub_tokens(weight: Tensor, size: int) -> Tensor:
    """[O, D] as [O, D / M, M]."""
    return weight.reshape(weight.shape[0], -1, size)
