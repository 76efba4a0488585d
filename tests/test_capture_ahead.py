"""Calls of new kinds under torch.compile: captured before compiled code runs."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import velora_fx
from tests.helpers.gradients import assert_same_gradients, step, tightest
from tests.helpers.toys import compressed_stack, rows
from tests.helpers.zoo import loss_of


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield


def compressing(graphs: list[torch.fx.GraphModule]) -> int:
    return sum("velora.linear" in str(node.target) for gm in graphs for node in gm.graph.nodes)


class Counting:
    """A backend that runs graphs as they are and keeps them."""

    def __init__(self) -> None:
        self.graphs: list[torch.fx.GraphModule] = []

    def __call__(self, gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        self.graphs.append(gm)
        return gm.forward


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=64)).train()


def ids() -> dict[str, Any]:
    tokens = torch.randint(4, 64, (4, 8), generator=torch.Generator().manual_seed(1))
    return {"input_ids": tokens, "labels": tokens}


def planned_stack() -> nn.Module:
    return compressed_stack(is_compiled=True, has_dropout=False)


def planned(compiled: Any = True) -> LlamaForCausalLM:
    return copy.deepcopy(planned_once(compiled))


@cache
def planned_once(compiled: Any) -> LlamaForCausalLM:
    """What is compressed is planned for eager code, which takes less time."""
    model = llama()
    return velora_fx.apply(model, replace(tightest(model, ids()), compiled=compiled), ids())  # type: ignore[no-any-return]


@pytest.mark.filterwarnings("error:velora_fx")
@pytest.mark.parametrize("way", ["wrapped", "in place", "blocks"])
def test_arguments_that_were_not_planned_with_do_not_end_compression(way: str) -> None:
    model = planned("blocks" if way == "blocks" else True)
    eager, backend = copy.deepcopy(model), Counting()
    batch = {**ids(), "num_items_in_batch": torch.tensor(28), "use_cache": False}
    run = torch.compile(model, backend=backend) if way == "wrapped" else model
    for module in {"wrapped": [], "in place": [model], "blocks": model.model.layers}[way]:
        module.compile(backend=backend)
    for _ in range(2):
        step(run, batch, loss_of)
    assert compressing(backend.graphs) > 0
    step(eager, batch, loss_of)
    assert_same_gradients(model, eager)


@pytest.mark.filterwarnings("error:velora_fx")
def test_a_batch_of_one_row_is_captured_too() -> None:
    backend = Counting()
    torch.compile(planned_stack(), backend=backend)(rows(1, 8)).backward()
    assert compressing(backend.graphs) > 0


def test_a_call_of_a_known_kind_rehearses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = planned_stack()
    rehearsed: list[Any] = []
    monkeypatch.setattr("velora_fx.capture_ahead._rehearse", lambda *args: rehearsed.append(args))
    run = torch.compile(model, backend="aot_eager")
    for shape in ((4, 8), (3, 5), (4, 8)):
        run(rows(*shape)).backward()
    assert len(rehearsed) == 2  # once as it is traced, once as it runs around compiled blocks
    run(rows(), torch.ones(4, 8, 1)).backward()
    assert len(rehearsed) == 4


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_capture_for_themselves_and_restore_takes_it_off(copied: Any) -> None:
    model = planned_stack()
    other, backend = copied(model), Counting()
    torch.compile(other, backend=backend)(rows(), torch.ones(4, 8, 1)).backward()
    assert compressing(backend.graphs) > 0
    velora_fx.restore(other)
    assert not other._forward_pre_hooks and len(model._forward_pre_hooks) == 2


class Texts(torch.utils.data.Dataset):  # type: ignore[type-arg]
    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        tokens = torch.randint(4, 64, (8,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": tokens, "labels": tokens}


def trained(model: nn.Module, folder: Path, **options: Any) -> Tensor:
    """The weights of the blocks after three steps of a Trainer."""
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=3, per_device_train_batch_size=4, use_cpu=True, learning_rate=1e-2,
        report_to=[], save_strategy="no", disable_tqdm=True, **options,
    )  # fmt: skip
    Trainer(model, arguments, train_dataset=Texts()).train()
    return torch.cat([p.detach().flatten() for name, p in model.named_parameters() if "layers" in name])


@pytest.mark.filterwarnings("error:velora_fx", "ignore:velora_fx.*was planned with autocast")
@pytest.mark.parametrize("bf16", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_stock_trainer_that_compiles_trains_compressed(tmp_path: Path, bf16: bool) -> None:
    start = planned()
    eager, dense = copy.deepcopy(start), velora_fx.restore(copy.deepcopy(start))
    ours = trained(start, tmp_path, torch_compile=True, torch_compile_backend="eager", bf16=bf16)
    expected = trained(eager, tmp_path, bf16=bf16)
    others = trained(dense, tmp_path, bf16=bf16)
    assert (ours - expected).norm() < 0.01 * (others - expected).norm()
