"""Calls that differ from the captured one must equal the untouched model, or their own plan's reference."""

from __future__ import annotations

import contextlib
import copy
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import velora_fx
from tests.helpers.gradients import (
    assert_same_gradients,
    compressed_weights,
    rebuilt_inputs,
    regions_of,
    saved_by,
    tightest,
)
from tests.helpers.toys import Block, Of, compressed, compressed_stack, rows, stack, without_dropout
from tests.helpers.zoo import ZOO
from velora_fx.runtime.region import MAX_GRAPHS


def loss_of(model: nn.Module, *args: Any, autocast: bool = False) -> Tensor:
    """The loss for the same random numbers each time, after its backward."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(5)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        loss = model(*args)
    loss.backward()
    return loss.detach()


def check(model: nn.Module, reference: nn.Module, *args: Any) -> None:
    """Loss bit-equal, exact gradients exact, and compressed ones those of the rebuilt input."""
    loss = loss_of(model, *args)
    with rebuilt_inputs(reference, compressed_weights(model)):
        assert torch.equal(loss, loss_of(reference, *args))
    assert_same_gradients(model, reference)


def check_exact(model: nn.Module, reference: nn.Module, x: Tensor, autocast: bool = False) -> None:
    """Loss bit-equal, and the gradients of weights that are not compressed exact."""
    assert torch.equal(loss_of(model, x, autocast=autocast), loss_of(reference, x, autocast=autocast))
    assert_same_gradients(model, reference, set(dict(model.named_parameters())) - set(compressed_weights(model)))


@pytest.fixture(params=["", *(pytest.param(stretch, marks=pytest.mark.slow) for stretch in ("no_grad", "autocast"))])
def pair(request: pytest.FixtureRequest) -> tuple[nn.Module, nn.Module]:
    plain = compressed_stack() if not request.param else compressed(stack(request.param), rows())
    return plain, stack(request.param)


def test_the_captured_call_and_other_sizes_run_the_same_graph(pair: tuple[nn.Module, nn.Module]) -> None:
    check(*pair, rows())
    check(*pair, rows(3, 5))
    assert {len(region.graphs) for region in regions_of(pair[0])} == {1}


def test_a_mask_that_was_none_when_captured_is_applied(pair: tuple[nn.Module, nn.Module]) -> None:
    check(*pair, rows(), torch.rand(4, 8, 1))


def test_a_dimension_of_one_is_captured_anew(pair: tuple[nn.Module, nn.Module]) -> None:
    check(*pair, rows(1, 8))


def test_one_dropout_in_eval_mode_stays_off(pair: tuple[nn.Module, nn.Module]) -> None:
    for model in pair:
        model.blocks[1].dropout.eval()
    check(*pair, rows())


def test_a_changed_dropout_rate_counts(pair: tuple[nn.Module, nn.Module]) -> None:
    for model in pair:
        model.blocks[1].dropout.p = 0.5
    check(*pair, rows())


def test_an_ambient_autocast_after_capturing_without_one_loses_nothing_but_the_inputs_precision() -> None:
    check_exact(compressed_stack(), stack(), rows(), autocast=True)


def test_after_to_bfloat16_the_model_still_runs_compressed(pair: tuple[nn.Module, nn.Module]) -> None:
    model, reference = (one.to(torch.bfloat16) for one in pair)
    if model.blocks[0].stretch == "autocast":
        pytest.skip("a float32 norm of bfloat16 weights is an error in the model itself")
    check_exact(model, reference, rows().to(torch.bfloat16))
    weight = model.blocks[0].up.weight
    assert not torch.allclose(weight.grad, reference.blocks[0].up.weight.grad, rtol=0.1)


def test_a_weight_frozen_afterwards_gets_no_gradient(pair: tuple[nn.Module, nn.Module]) -> None:
    for model in pair:
        model.blocks[1].up.weight.requires_grad_(False)
    check(*pair, rows())
    assert pair[0].blocks[1].up.weight.grad is None


def test_a_block_frozen_afterwards_runs_its_original_forward(pair: tuple[nn.Module, nn.Module]) -> None:
    for model in pair:
        model.blocks[1].requires_grad_(False)
    with pytest.warns(UserWarning, match="blocks.1 runs its original forward.*is trained"):
        check(*pair, rows())


class Cache:
    """A key-value cache as far as blocks can tell."""

    def __init__(self, past: Tensor | None) -> None:
        self.past = past

    def get_seq_length(self, layer: int = 0) -> int:
        return 0 if self.past is None else self.past.shape[1]

    def update(self, x: Tensor) -> Tensor:
        return torch.zeros_like(x) if self.past is None else self.past.mean(1, keepdim=True)


@pytest.mark.filterwarnings("ignore:velora_fx")
def test_a_filled_cache_means_the_original_forward() -> None:
    model, reference, cache = compressed_stack(), stack(), Cache(torch.randn(4, 3, 32))
    assert torch.equal(loss_of(model, rows(), None, cache), loss_of(reference, rows(), None, cache))
    in_blocks = {name for name, _ in model.named_parameters() if name.startswith("blocks")}
    assert_same_gradients(model, reference, in_blocks)


def test_an_empty_cache_is_passed_as_none() -> None:
    model = compressed_stack()
    check(model, stack(), rows())
    graphs = len(regions_of(model)[0].graphs)
    loss_of(model, rows(), None, Cache(None))
    assert len(regions_of(model)[0].graphs) == graphs


def test_eval_and_no_grad_are_bit_equal_to_the_untouched_model(pair: tuple[nn.Module, nn.Module]) -> None:
    model, reference = pair
    with torch.no_grad():
        torch.manual_seed(5)
        expected = reference(rows())
        torch.manual_seed(5)
        assert torch.equal(model(rows()), expected)
    assert torch.equal(loss_of(model.eval(), rows()), loss_of(reference.eval(), rows()))
    assert_same_gradients(model, reference)


def test_with_a_hook_on_an_inner_module_the_original_forward_runs_and_a_warning_says_so_once() -> None:
    model, reference = compressed_stack(), stack()
    seen = []
    handle = model.blocks[0].up.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    with pytest.warns(UserWarning, match="hook") as caught:
        losses = [loss_of(one, rows()) for one in (model, model, reference)]
    assert len(caught) == 1 and torch.equal(losses[1], losses[2])
    assert seen == [torch.Size([4, 8, 64])] * 2
    assert torch.equal(model.blocks[0].up.weight.grad, reference.blocks[0].up.weight.grad)
    handle.remove()
    check(model, reference, rows())


@pytest.mark.filterwarnings("ignore:velora_fx")
def test_hooks_on_all_modules_are_called_as_before() -> None:
    model, reference = compressed_stack(), stack()
    seen: list[str] = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(type(module).__name__))
    try:
        reference(rows())
        expected = list(seen)
        model(rows())
    finally:
        handle.remove()
    assert seen == 2 * expected


def test_too_many_kinds_of_calls_fall_back_exactly_and_say_so_once() -> None:
    model, reference = compressed(stack(num_blocks=2), rows()), stack(num_blocks=2)
    with pytest.warns(UserWarning, match="more than 8 different ways") as caught:
        for number in range(MAX_GRAPHS + 2):
            for one in (model, reference):
                for block in one.blocks:
                    block.dropout.p = number / 100
            assert torch.equal(loss_of(model, rows()), loss_of(reference, rows()))
    assert len(caught) == 1


def test_a_deepcopy_trains_the_copy() -> None:
    model = compressed_stack()
    twin = copy.deepcopy(model)
    check(twin, stack(), rows())
    assert all(parameter.grad is None for parameter in model.parameters())
    with torch.no_grad():
        twin.blocks[0].up.weight.zero_()
    assert not torch.equal(model(rows()), twin(rows()))


def test_a_pickled_model_trains_in_a_fresh_process(pair: tuple[nn.Module, nn.Module], tmp_path: Path) -> None:
    model, reference = pair
    (tmp_path / "model.pkl").write_bytes(pickle.dumps(model))
    code = (
        "import pickle, sys, torch; sys.path.insert(0, sys.argv[2])\n"
        "model = pickle.load(open(sys.argv[1] + '/model.pkl', 'rb'))\n"
        "from tests.helpers.toys import rows\n"
        "torch.manual_seed(5); model(rows()).backward()\n"
        "torch.save({n: p.grad for n, p in model.named_parameters()}, sys.argv[1] + '/grads.pt')\n"
    )
    root = str(Path(__file__).parents[2])
    subprocess.run([sys.executable, "-c", code, str(tmp_path), root], check=True, cwd=root)
    grads = torch.load(tmp_path / "grads.pt")
    with rebuilt_inputs(reference, compressed_weights(model)):
        loss_of(reference, rows())
    for name, parameter in model.named_parameters():
        parameter.grad = grads[name]
    assert_same_gradients(model, reference)


def test_functional_call_trains_the_given_weights() -> None:
    model, reference = compressed_stack(), stack()
    weights = {name: (p.detach() * 1.5).requires_grad_() for name, p in model.named_parameters()}
    torch.manual_seed(5)
    loss = torch.func.functional_call(model, weights, (rows(),))
    gradients = torch.autograd.grad(loss, list(weights.values()))
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter *= 1.5
    with rebuilt_inputs(reference, compressed_weights(model)):
        loss_of(reference, rows())
    for (_, parameter), gradient in zip(model.named_parameters(), gradients, strict=True):
        parameter.grad = gradient
    assert_same_gradients(model, reference)


def test_under_torch_func_the_original_forward_runs() -> None:
    def gradients(model: nn.Module) -> dict[str, Tensor]:
        weights = {name: p.detach() for name, p in model.named_parameters()}
        return torch.func.grad(lambda w: torch.func.functional_call(model, w, (rows(),)))(weights)

    got, expected = gradients(compressed_stack(has_dropout=False)), gradients(without_dropout(stack()))
    assert all(torch.equal(gradient, got[name]) for name, gradient in expected.items())


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointed_blocks_compute_the_same(use_reentrant: bool) -> None:
    model, reference = compressed_stack(), stack()
    check(model, reference, rows())
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    x = rows().requires_grad_()
    torch.manual_seed(5)
    with pytest.warns(UserWarning, match="is under gradient checkpointing already"):
        for block in model.blocks:
            x = checkpoint(block, x, use_reentrant=use_reentrant)
        model.head(x).square().mean().backward()
    assert all(torch.equal(expected[name], p.grad) for name, p in model.named_parameters())


def test_gradient_checkpointing_turned_on_afterwards_is_exact_and_keeps_nothing() -> None:
    case = next(case for case in ZOO if case.name == "llama")
    model, reference, batch = case.build(), case.build(), case.batch(2, 12)
    velora_fx.apply(model, tightest(model, batch), batch)
    losses: list[Tensor] = []
    for one in (model, reference):
        one.gradient_checkpointing_enable()
    with pytest.warns(UserWarning, match="checkpoint"):
        saved = saved_by(lambda: losses.append(model(**batch).loss))
    assert len(saved) == len(saved_by(lambda: losses.append(reference(**batch).loss))) < 40
    for loss in losses:
        loss.backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(model.parameters(), reference.parameters(), strict=True))


def test_accumulated_gradients_add_up() -> None:
    model, reference = compressed_stack(), stack()
    for one in (model, reference):
        one.zero_grad()
        for seed in (5, 6):
            torch.manual_seed(seed)
            patched = rebuilt_inputs(reference, compressed_weights(model)) if one is reference else None
            with patched or contextlib.nullcontext():
                one(rows()).backward()
    assert_same_gradients(model, reference)


def inverting(m: Of, x: Tensor) -> Tensor:
    """Inverts a matrix of its input without gradients, which fails for some values."""
    with torch.no_grad():
        scale = torch.linalg.inv(x[0, :8, :8]).mean()
    return m.linear(x * scale).tanh().square().mean()


def test_an_error_inside_a_no_grad_stretch_leaves_grad_mode_on() -> None:
    inner = nn.Sequential(nn.Linear(32, 32), Of(inverting, linear=nn.Linear(32, 32)))
    model = compressed(inner.train(), rows())
    with torch.no_grad():
        inner[0].weight.zero_()
        inner[0].bias.zero_()
    with pytest.raises(torch.linalg.LinAlgError):
        model(rows())
    assert torch.is_grad_enabled()


def looking_up(m: Of, x: Tensor, index: Tensor) -> Tensor:
    """Adds rows of a table in bfloat16, which fails for an index that is not there."""
    h = F.gelu(m.first(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = m.second(h) + m.table(index)
    return y.float().square().mean()


def autocast_depth() -> int:
    torch.autocast_increment_nesting()
    return torch.autocast_decrement_nesting()


def test_an_error_inside_an_autocast_stretch_leaves_autocast_off() -> None:
    index = torch.zeros(4, 8, dtype=torch.long)
    parts = {"first": nn.Linear(32, 32), "second": nn.Linear(32, 32), "table": nn.Embedding(4, 32)}
    model = compressed(Of(looking_up, **parts), rows(), index)
    assert regions_of(model)
    depth = autocast_depth()
    try:
        with pytest.raises(IndexError):
            model(rows(), index + 9)
        assert not torch.is_autocast_enabled("cpu")
        assert autocast_depth() == depth
    finally:
        torch.set_autocast_enabled("cpu", False)


class Scaled(Block):
    """Reads a tensor that is neither a parameter nor a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.tensor(2.0)

    def forward(self, x: Tensor, mask: Tensor | None = None, cache: Any = None) -> Tensor:
        return super().forward(x * self.scale, mask, cache)


def scaled_stack() -> nn.Module:
    model = stack()
    model.blocks = nn.ModuleList(Scaled() for _ in range(3))
    return model.train()


def test_a_tensor_that_is_a_plain_attribute_is_read_anew_in_every_step() -> None:
    model, reference = compressed(scaled_stack(), rows()), scaled_stack()
    assert len(regions_of(model)) >= 3
    check(model, reference, rows())
    assert all(type(parameter.grad) is Tensor for parameter in model.parameters())
    for one in (model, reference):
        one.blocks[0].scale.fill_(0.5)
        one.blocks[1].scale = torch.tensor(3.0)
    check(model, reference, rows())


def test_projections_do_not_show_in_the_model(pair: tuple[nn.Module, nn.Module]) -> None:
    model, reference = pair
    assert list(model.state_dict()) == list(reference.state_dict())
    assert [name for name, _ in model.named_buffers()] == [name for name, _ in reference.named_buffers()]
    assert [name for name, _ in model.named_modules()] == [name for name, _ in reference.named_modules()]


def test_projections_survive_to_empty() -> None:
    model = compressed_stack()
    model.to_empty(device="cpu")
    reference = stack()
    model.load_state_dict(reference.state_dict())
    check(model, reference, rows())


def test_equal_blocks_share_their_graphs() -> None:
    model = compressed(stack(num_blocks=6), rows())
    blocks = [region for region in regions_of(model) if region.name.startswith("blocks")]
    assert len(blocks) == 6
    assert len({id(region.graphs) for region in blocks}) == 1


def test_restore_gives_every_block_its_own_forward_back() -> None:
    model = compressed_stack()
    assert velora_fx.restore(model) is model
    assert not regions_of(model)
    reference = stack()
    assert torch.equal(loss_of(model, rows()), loss_of(reference, rows()))
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(model.parameters(), reference.parameters(), strict=True))
