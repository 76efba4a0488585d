"""Fake operators leave storages as large as the real ones do, whatever the tensors in them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree
from torch.utils._python_dispatch import TorchDispatchMode

import velora_fx
from tests.helpers.peaks import measured_peak, predict
from tests.helpers.toys import Of
from velora_fx.simulate import fake_mode, fake_tensor, kernels_of

CPU = torch.device("cpu")
ROWS, OTHER, IDS = torch.rand(64, 32).clamp(0.1, 0.9), torch.rand(64, 32).clamp(0.1, 0.9), torch.randint(0, 32, (64,))
IMAGE, SEQUENCE = torch.randn(2, 4, 16, 16), torch.randn(20, 3, 16)
LENGTHS = torch.tensor([5, 5, 4]), torch.tensor([2, 1, 2])


class Both(TorchDispatchMode):
    """Runs each operator also on fake tensors, and notes storages of new results that are not of one size."""

    def __init__(self) -> None:
        super().__init__()
        self.mode = fake_mode()
        self.differences: list[tuple[str, int, int]] = []
        self.compared = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        fakes = _pytree.tree_map_only(Tensor, lambda t: fake_tensor(t.detach(), self.mode), (args, kwargs or {}))
        real = func(*args, **(kwargs or {}))
        with kernels_of(CPU):
            fake = func(*fakes[0], **fakes[1])
        given = {t.untyped_storage()._cdata for t in _pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for one, other in zip(_pytree.tree_leaves(real), _pytree.tree_leaves(fake), strict=True):
            if isinstance(one, Tensor) and one.untyped_storage()._cdata not in given:
                self.compared += 1
                sizes = one.untyped_storage().nbytes(), other.untyped_storage().nbytes()
                if sizes[0] != sizes[1]:
                    self.differences.append((str(func), *sizes))
        return real


def losses() -> dict[str, Callable[[Tensor], Tensor]]:
    names = (
        "mse_loss", "smooth_l1_loss", "huber_loss", "l1_loss", "binary_cross_entropy", "soft_margin_loss",
        "binary_cross_entropy_with_logits", "kl_div", "poisson_nll_loss",
    )  # fmt: skip
    return {
        f"{name} {how}": lambda x, name=name, how=how: getattr(F, name)(x, OTHER, reduction=how)
        for name in names
        for how in ("mean", "sum", "none")
    }


def of(layer: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: layer(x)[0] if isinstance(layer, nn.RNNBase) else layer(x)


ON_ROWS: dict[str, Callable[[Tensor], Tensor]] = {
    **losses(),
    "mse_loss that broadcasts": lambda x: F.mse_loss(x[:1], OTHER),
    "cross_entropy": lambda x: F.cross_entropy(x, IDS),
    "smooth cross_entropy": lambda x: F.cross_entropy(x, IDS, label_smoothing=0.1),
    "nll_loss": lambda x: F.nll_loss(x.log_softmax(-1), IDS),
    "gaussian_nll_loss": lambda x: F.gaussian_nll_loss(x, OTHER, OTHER),
    "cosine_embedding_loss": lambda x: F.cosine_embedding_loss(x, OTHER, torch.ones(64)),
    "triplet_margin_loss": lambda x: F.triplet_margin_loss(x, OTHER, OTHER + 1),
    "multi_margin_loss": lambda x: F.multi_margin_loss(x, IDS),
    "fft": lambda x: torch.fft.fft2(x).abs(),
    "cdist": lambda x: torch.cdist(x, OTHER),
    "einsum": lambda x: torch.einsum("bi,bj->ij", x, OTHER),
    "scatter": lambda x: x.scatter(1, IDS[:, None], OTHER),
    "index_put": lambda x: x.index_put((IDS,), OTHER),
    "topk": lambda x: x.topk(4)[0],
    "sort": lambda x: x.sort(-1)[0],
    "cumsum": lambda x: x.cumsum(0),
    "cumprod": lambda x: x.cumprod(0),
    "median": lambda x: x.median(),
    "norm": lambda x: x.norm(dim=1),
    "logsumexp": lambda x: x.logsumexp(0),
    "logsigmoid": F.logsigmoid,
    "rrelu": lambda x: F.rrelu(x, training=True),
    "embedding": lambda x: F.embedding(IDS, x),
    "embedding bag": lambda x: F.embedding_bag(IDS[:18].reshape(6, 3), x),
}
ON_IMAGES: dict[str, Callable[[Tensor], Tensor]] = {
    "conv": of(nn.Conv2d(4, 8, 3, padding=1)),
    "transposed conv": of(nn.ConvTranspose2d(4, 8, 3)),
    "batch norm": of(nn.BatchNorm2d(4)),
    "group norm": of(nn.GroupNorm(2, 4)),
    "max pool": lambda x: F.max_pool2d(x, 2),
    "average pool": lambda x: F.avg_pool2d(x, 2),
    "nearest": lambda x: F.interpolate(x, scale_factor=2),
    "bilinear": lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"),
    "unfold": lambda x: F.unfold(x, 3),
    "fold": lambda x: F.fold(F.unfold(x, 3), (16, 16), 3),
    "reflection": lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"),
    "dropout2d": F.dropout2d,
}
ON_SEQUENCES: dict[str, Callable[[Tensor], Tensor]] = {
    "LSTM": of(nn.LSTM(16, 24)),
    "bidirectional LSTM": of(nn.LSTM(16, 24, 2, bidirectional=True)),
    "GRU": of(nn.GRU(16, 24)),
    "RNN": of(nn.RNN(16, 24)),
    "attention": lambda x: F.scaled_dot_product_attention(x[None], x[None], x[None]),
    "ctc_loss": lambda x: F.ctc_loss(x.log_softmax(-1), IDS[:5] % 15 + 1, *LENGTHS),
    "ctc_loss of padded texts": lambda x: F.ctc_loss(x.log_softmax(-1), IDS[:6].reshape(3, 2) % 15 + 1, *LENGTHS),
}
CASES = {
    name: (x, run)
    for x, runs in ((ROWS, ON_ROWS), (IMAGE, ON_IMAGES), (SEQUENCE, ON_SEQUENCES))
    for name, run in runs.items()
}


@pytest.mark.parametrize("name", CASES)
def test_a_fake_operator_leaves_storages_of_the_real_size(name):
    x, run = CASES[name]
    x = x.clone().requires_grad_()
    with Both() as both:
        run(x).sum().backward()
    assert both.compared and both.differences == []


def regression(loss: Callable[..., Tensor]) -> Of:
    return Of(lambda m, x: loss(m.layers(x), x), layers=nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64)))


@pytest.mark.parametrize("loss", [F.mse_loss, F.smooth_l1_loss, F.huber_loss])
def test_a_step_with_a_mean_loss_is_predicted_to_the_byte(loss):
    model, batch = regression(loss), {"x": torch.randn(512, 64)}
    predicted = predict(model, batch)
    assert predicted.untouched_bytes == measured_peak(model, batch)
    assert predicted.compressed_bytes == measured_peak(predicted.compressed, batch)


def test_the_report_says_that_what_an_lstm_takes_while_it_runs_is_not_counted():
    recurrent = Of(lambda m, x: F.mse_loss(m.head(m.rnn(x)[0]), x), rnn=nn.LSTM(16, 24), head=nn.Linear(24, 16))
    plan = velora_fx.plan(recurrent, 1, SEQUENCE)
    assert plan.has_uncounted and any("LSTM" in note for note in plan.notes)
    assert "to spare, but for kernels (see the note)" in str(plan)
    without = velora_fx.plan(regression(F.mse_loss), 1, torch.randn(8, 64))
    assert not without.has_uncounted and "but for kernels" not in str(without)


@pytest.mark.parametrize("steps", [40, 90, 200])
def test_the_workspace_of_a_long_lstm_is_told_from_a_short_one(steps):
    x = torch.randn(steps, 8, 64).requires_grad_()
    with Both() as both:
        nn.LSTM(64, 96)(x)[0].sum().backward()
    for _, real, fake in both.differences:
        assert abs(fake - real) <= 2 * 4096  # whole pages, at the most


@pytest.mark.parametrize(
    ("layer", "channels"),
    [(nn.Conv2d(3, 64, 8, 8), 3), (nn.Conv2d(16, 32, 3, padding=1), 16), (nn.Conv2d(64, 8, 1), 64)],
)
def test_with_channels_last_what_a_convolution_holds_besides_is_counted(layer, channels):
    model = Of(lambda m, x: m.layer(x).square().mean(), layer=layer.to(memory_format=torch.channels_last))
    batch = {"x": torch.randn(2, channels, 32, 32).to(memory_format=torch.channels_last)}
    predicted, measured = predict(model, batch).untouched_bytes, measured_peak(model, batch)
    assert abs(measured - predicted) <= 2 * 4096 + 0.001 * measured
