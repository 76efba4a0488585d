"""The timeline that follows from few of a model's equal blocks is that of a step of all of them, to the byte."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tests.helpers.toys import Block, rows
from velora_fx.analyse import Actions, Analysis, analyse
from velora_fx.options import Options, planning_device
from velora_fx.simulate import Timeline

WIDTH, NUM_BLOCKS = 32, 6


class Model(nn.Module):
    """Equal blocks on a linear's output, a head, and what a kind of model does besides."""

    def __init__(self, num_blocks: int = NUM_BLOCKS) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Block(WIDTH) for _ in range(num_blocks))
        self.between = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, 16)

    def forward(self, x: Tensor) -> Any:
        x = self.first(x)
        for number, block in enumerate(self.blocks):
            x = self.call(number, block, x)
        return self.end(x)

    def call(self, number: int, block: nn.Module, x: Tensor) -> Tensor:
        """One block's output."""
        return block(x)  # type: ignore[no-any-return]

    def end(self, x: Tensor) -> Any:
        """The loss."""
        return self.head(x).square().mean()


class Masked(Model):
    """All blocks keep one mask, which has a gradient."""

    def forward(self, x: Tensor) -> Any:
        self.mask = torch.sigmoid(self.between(x))
        return super().forward(x)

    def call(self, number: int, block: nn.Module, x: Tensor) -> Tensor:
        return block(x, self.mask)  # type: ignore[no-any-return]


class Checkpointed(Model):
    """Each block is recomputed in backward."""

    def call(self, number: int, block: nn.Module, x: Tensor) -> Tensor:
        return checkpoint(block, x, use_reentrant=False)  # type: ignore[no-any-return]


class Tied(Model):
    """The first and the last linear have one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(WIDTH, WIDTH)
        self.head.weight = self.first.weight


class Returning(Model):
    """What each block returns is returned too, and is there until the output goes."""

    def forward(self, x: Tensor) -> Any:
        self.states: list[Tensor] = []
        loss = super().forward(x)
        return {"loss": loss, "states": self.states}

    def call(self, number: int, block: nn.Module, x: Tensor) -> Tensor:
        self.states.append(block(x))
        return self.states[-1]


class Stacking(Returning):
    """The loss is of what all blocks return."""

    def forward(self, x: Tensor) -> Any:
        return super().forward(x)["loss"] + torch.stack(self.states).square().mean()


class Skipping(Model):
    """The last blocks take what the first have returned."""

    def forward(self, x: Tensor) -> Any:
        self.kept: list[Tensor] = []
        return super().forward(x)

    def call(self, number: int, block: nn.Module, x: Tensor) -> Tensor:
        if number < len(self.blocks) // 2:
            self.kept.append(block(x))
            return self.kept[-1]
        return block(x + self.kept.pop())  # type: ignore[no-any-return]


class Interrupted(Model):
    """One block in the middle is followed by something else."""

    def call(self, number: int, block: nn.Module, x: Tensor) -> Tensor:
        return self.between(block(x)) if number == 3 else block(x)  # type: ignore[no-any-return]


class TwoRows(Model):
    """Two rows of equal blocks, of which the second is wider within."""

    def __init__(self) -> None:
        super().__init__()
        self.others = nn.ModuleList(nn.Sequential(Block(WIDTH), nn.Tanh()) for _ in range(5))

    def end(self, x: Tensor) -> Any:
        for block in self.others:
            x = block(x)
        return super().end(x)


class Numbered(Model):
    """Every other block does something else, by its number."""

    def __init__(self, num_blocks: int = NUM_BLOCKS) -> None:
        super().__init__(num_blocks)
        for number, block in enumerate(self.blocks):
            block.number = number
            block.register_forward_hook(lambda module, args, output: F.relu(output) if module.number % 2 else output)


def analysis_of(model: nn.Module, device: str | None = None, **options: Any) -> Analysis:
    wanted = Options(**{"compiled": False, **options})
    return analyse(model.train(), (rows(),), {}, wanted, planning_device(model, device), lambda text: None)


def everything(analysis: Analysis) -> Sequence[Actions]:
    """Nothing, all compressed, all recomputed, and blocks that are treated in two ways."""
    names = [block.name for block in analysis.blocks]
    later = set(names[-(len(names) // 2) :]) if names else set()
    largest = {candidate.key: candidate.sizes[-1] for candidate in analysis.candidates}
    both = {key: size for key, size in largest.items() if key[0] not in later}
    levels = {block.name: block.levels[-1] for block in analysis.blocks}
    mixed = Actions(both, {name: level for name, level in levels.items() if name in later})
    return Actions(), Actions(largest), Actions({}, levels), mixed


def turns(timeline: Timeline) -> list[tuple[int, int]]:
    """The live bytes wherever something is born, and where nothing more is freed before."""
    is_birth = [*(timeline.deltas > 0).tolist(), True]
    start = timeline.marks[0][0]
    return [
        (event, size)
        for event, size in enumerate(timeline.live_bytes.tolist())
        if event >= start and (is_birth[event] or is_birth[event + 1])
    ]


def assert_same(found: Timeline, whole: Timeline) -> None:
    start = whole.marks[0][0]
    assert found.live_bytes[start:].tolist() == whole.live_bytes[start:].tolist()
    assert found.peak.curve == whole.peak.curve
    assert_same_but_for_order(found, whole)


def assert_same_but_for_order(found: Timeline, whole: Timeline) -> None:
    """The same but for the order of what is freed at once: that of casts that autocast has kept is chance."""
    assert found.marks == whole.marks
    assert turns(found) == turns(whole)
    assert found.saved_bytes == whole.saved_bytes
    assert found.peak_bytes_with_output == whole.peak_bytes_with_output
    assert found.seconds == pytest.approx(whole.seconds, rel=1e-9)
    assert sorted(map(str, found.labels)) == sorted(map(str, whole.labels))
    for name in ("peak_bytes", "breakdown", "moment", "place", "there", "largest"):
        assert getattr(found.peak, name) == getattr(whole.peak, name), name


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (lambda: Model(9), {}),
        (Model, {"optimizer": "sgd", "gradient_accumulation": 2}),
        (Model, {"gradients": "factored"}),
        (Model, {"device": "cuda"}),
        (lambda: Model().bfloat16(), {"device": "cuda", "gradients": "factored"}),
        (Checkpointed, {}),
        (Tied, {}),
        (Returning, {}),
        (TwoRows, {}),
    ],
)
def test_few_blocks_tell_what_all_take(make: Callable[[], nn.Module], options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    analysis = analysis_of(make(), **options)
    for actions in everything(analysis):
        found = analysis.simulate.lengthened(actions)
        if actions.sizes and actions.recomputed and len(analysis.blocks) < 9:
            assert found is None  # too few of each kind
            continue
        assert found is not None
        assert_same(found, analysis.simulate.whole(actions))


@pytest.mark.parametrize("joined", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("make", "options"),
    [
        (lambda: Model(14), {}),
        pytest.param(lambda: Model(14), {"gradients": "factored"}, marks=pytest.mark.slow),
        pytest.param(lambda: Checkpointed(14), {}, marks=pytest.mark.slow),
    ],
)
def test_few_blocks_tell_what_all_take_where_the_model_is_compiled(
    make: Callable[[], nn.Module], options: dict[str, Any], joined: bool
) -> None:
    torch.manual_seed(0)
    analysis = analysis_of(make(), compiled=True, **options)
    found = [analysis.simulate.lengthened(actions, joined) for actions in everything(analysis)]
    assert sum(timeline is not None for timeline in found) >= 2
    for actions, timeline in zip(everything(analysis), found, strict=True):
        if timeline is not None:
            assert_same(timeline, analysis.simulate.whole(actions, joined))


def test_few_blocks_tell_it_under_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        analysis = analysis_of(Model())
        for actions in everything(analysis)[:3]:
            found = analysis.simulate.lengthened(actions)
            assert found is not None
            assert_same_but_for_order(found, analysis.simulate.whole(actions))


@pytest.mark.parametrize("make", [Stacking, Skipping, Interrupted, Numbered, Masked])
def test_blocks_that_are_not_used_alike_are_simulated_one_by_one(make: Callable[[], nn.Module]) -> None:
    analysis = analysis_of(make())
    for actions in everything(analysis)[:2]:
        assert_same(analysis.simulate(actions), analysis.simulate.whole(actions))


@pytest.mark.slow
@pytest.mark.parametrize("make", [Stacking, Skipping, Interrupted, Numbered, Masked])
def test_compiled_blocks_that_are_not_used_alike_are_simulated_one_by_one(make: Callable[[int], nn.Module]) -> None:
    analysis = analysis_of(make(14), compiled=True)
    for actions in everything(analysis)[:2]:
        assert_same(analysis.simulate(actions), analysis.simulate.whole(actions))


def test_what_a_block_saves_is_found_in_all() -> None:
    few, many = analysis_of(Model(4)), analysis_of(Model(7))
    assert {name for name in many.findings.calls if "blocks" in name} == {f"blocks.{n}" for n in range(7)}
    assert [c.region for c in many.candidates] == [*(f"blocks.{n // 2}" for n in range(14)), "head"]
    assert [c.region for c in few.candidates] == [*(f"blocks.{n // 2}" for n in range(8)), "head"]
    assert {c.bytes_before for c in many.candidates} == {c.bytes_before for c in few.candidates}
    assert (len(few.blocks), len(many.blocks)) == (4, 7)
    assert all(block.kept_bytes == few.blocks[1].kept_bytes for block in many.blocks)
