"""Which modules of a model become regions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator

from torch import nn

from velora_fx.capture.left_out import LeftOut

LISTS = (nn.ModuleList, nn.ModuleDict)  # which have no forward
CONTAINERS = (*LISTS, nn.Sequential)


def find_regions(model: nn.Module, passed_by: Collection[str] = ()) -> dict[str, nn.Module]:
    """Picks the modules to capture, by dotted name, in model order; the model itself has the name "".

    Regions are the repeated blocks, and outside of them the smallest modules that own a trainable matrix; the whole
    model where nothing repeats. A module without a trainable matrix is never a region. Modules whose forward is
    `passed_by` while their parts are called are none either: their parts are. What several modules hold goes by its
    first name.
    """
    blocks = find_blocks(model, passed_by)
    if "" in blocks:
        return blocks if has_trainable_matrix(model) else {}
    regions = {**blocks, **dict(_owners(model, "", set(blocks), passed_by))}
    return {name: regions[name] for name, _ in model.named_modules() if name in regions}


def find_blocks(model: nn.Module, passed_by: Collection[str] = ()) -> dict[str, nn.Module]:
    """The repeated blocks by dotted name, as `find_regions` has them; the model itself where nothing repeats."""
    named = {id(block): name for name, block in reversed(list(model.named_modules(remove_duplicate=False)))}
    blocks = {named[id(block)]: block for _, block in _blocks(model, "", passed_by)}
    return blocks or {"": model}


def has_trainable_matrix(module: nn.Module, recurse: bool = True) -> bool:
    """True if the module has a parameter that a matrix product may train; embeddings do not count."""
    modules = module.modules() if recurse else [module]
    return any(
        parameter.requires_grad and parameter.dim() >= 2
        for child in modules
        if not isinstance(child, (nn.Embedding, nn.EmbeddingBag))
        for parameter in child.parameters(recurse=False)
    )


def child_regions(module: nn.Module, name: str) -> dict[str, nn.Module]:
    """The regions to try instead of a module that cannot be captured."""
    regions: dict[str, nn.Module] = {}
    for child_name, child in _children(module, name):
        if isinstance(child, CONTAINERS):
            regions.update(child_regions(child, child_name))
        elif has_trainable_matrix(child):
            regions[child_name] = child
    return regions


def _children(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """The children of a module of this dotted name, with theirs."""
    for child_name, child in module.named_children():
        yield f"{name}.{child_name}" if name else child_name, child


def _blocks(module: nn.Module, name: str, passed_by: Collection[str]) -> Iterator[tuple[str, nn.Module]]:
    for child_name, child in _children(module, name):
        items = [item for item in child.children() if not isinstance(item, LeftOut)]
        if isinstance(child, CONTAINERS) and items and _is_repeated(items):
            for item_name, item in _children(child, child_name):
                yield from _called(item, item_name, passed_by)
        else:
            yield from _blocks(child, child_name, passed_by)


def _called(item: nn.Module, name: str, passed_by: Collection[str]) -> Iterator[tuple[str, nn.Module]]:
    """An item of a list of blocks or, where its forward is not what is called, its parts."""
    if isinstance(item, LISTS) or name in passed_by:
        for child_name, child in _children(item, name):
            yield from _called(child, child_name, passed_by)
    elif has_trainable_matrix(item):
        yield name, item


def _is_repeated(items: list[nn.Module]) -> bool:
    """A list of blocks: modules of one class that have parts of their own, two or more, or the only one."""
    class_, count = Counter(type(item) for item in items).most_common(1)[0]
    has_parts = any(True for item in items if type(item) is class_ for _ in item.children())
    return has_parts and has_trainable_matrix(nn.ModuleList(items)) and (count >= 2 or len(items) == 1)


def _owners(
    module: nn.Module, name: str, blocks: set[str], passed_by: Collection[str]
) -> Iterator[tuple[str, nn.Module]]:
    for child_name, child in _children(module, name):
        if child_name in blocks:
            continue
        holds_block = any(block.startswith(f"{child_name}.") for block in blocks)
        if not holds_block and child_name not in passed_by and has_trainable_matrix(child, recurse=False):
            yield child_name, child
        else:
            yield from _owners(child, child_name, blocks, passed_by)
