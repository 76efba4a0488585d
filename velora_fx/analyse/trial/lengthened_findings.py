"""What the trial step of a model finds in all of its equal blocks, from what it finds in a few."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

from velora_fx.analyse.trial.probe import Findings, Use
from velora_fx.capture import UnequalError
from velora_fx.simulate import Saving
from velora_fx.simulate.equal_blocks import Repetition, Shortened, ShownStep, lengthen, renaming

Value = TypeVar("Value")


def lengthen_findings(findings: Findings, shown: ShownStep, shortened: Shortened) -> Findings:
    """The findings with all blocks of all stretches; UnequalError where the few do not tell."""
    rename = renaming(shortened.stands_for)
    found = [_renamed(findings, rename)]

    def repeat(repetition: Repetition) -> None:
        found.append(_Block(repetition).repeated(found.pop()))

    timeline = lengthen(shown, shortened, repeat)
    return replace(found[0], timeline=timeline)


def _renamed(findings: Findings, rename: Callable[[str], str]) -> Findings:
    """The findings with other names of regions."""
    overwrites = findings.overwrites
    overwrites.inputs_of = set(map(rename, overwrites.inputs_of))
    overwrites.results_of = set(map(rename, overwrites.results_of))
    return replace(
        findings,
        graphs={rename(name): graphs for name, graphs in findings.graphs.items()},
        uses={(rename(name), consumer): _use(use, rename) for (name, consumer), use in findings.uses.items()},
        failures={rename(name): reason for name, reason in findings.failures.items()},
        calls={rename(name): count for name, count in findings.calls.items()},
        savings=tuple(replace(saving, region=rename(saving.region)) for saving in findings.savings),
        inputs={
            (rename(name), consumer): replace(saving, region=rename(saving.region))
            for (name, consumer), saving in findings.inputs.items()
        },
    )


def _use(use: Use, rename: Callable[[str], str]) -> Use:
    return replace(use, region=rename(use.region), weight=rename(use.weight))


@dataclass(frozen=True)
class _Block:
    """The third block that is shown of a stretch, from which what is found in the others follows."""

    repetition: Repetition

    @property
    def name(self) -> str:
        """Its name."""
        stretch = self.repetition.stretch
        return stretch.stands_for[stretch.shown[2]]

    def repeated(self, findings: Findings) -> Findings:
        """The findings with the blocks that are not shown."""
        overwrites, renamings = findings.overwrites, self.repetition.renamings
        for names in (overwrites.inputs_of, overwrites.results_of):
            names |= {rename(name) for name in names if self.owns(name) for rename in renamings}
        self.check_graphs(findings)
        return replace(
            findings,
            graphs=self.by_name(findings.graphs),
            failures=self.by_name(findings.failures),
            calls=self.by_name(findings.calls),
            uses=self.by_key(findings.uses, self.use),
            savings=self.savings(findings.savings),
            inputs=self.by_key(findings.inputs, self.copied),
            last_uses=self.last_uses(findings.last_uses),
        )

    def use(self, use: Use, block: int) -> Use:
        """The product of another block in the place of one of this block, the last."""
        return use if block > self.repetition.count else _use(use, self.repetition.renamings[block - 1])

    def owns(self, name: str) -> bool:
        """True for the name of something in this block."""
        return name == self.name or name.startswith(f"{self.name}.")

    def check_graphs(self, findings: Findings) -> None:
        """Refuses equal blocks that run by different graphs: their keys tell more than the modules."""
        stretch = self.repetition.stretch
        second = stretch.stands_for[stretch.shown[1]]
        for name, graphs in findings.graphs.items():
            if self.owns(name):
                others = findings.graphs.get(second + name[len(self.name) :], [])
                if [id(graph) for graph in graphs] != [id(graph) for graph in others]:
                    raise UnequalError("equal blocks have different graphs")

    def by_name(self, found: Mapping[str, Value]) -> dict[str, Value]:
        """With the entries of the other blocks before those of this one."""
        return dict(
            self.in_order(
                found.items(), lambda item: item[0], lambda item, block: (self.other(item[0], block), item[1])
            )
        )

    def by_key(
        self, found: Mapping[tuple[str, str], Value], copied: Callable[[Value, int], Value]
    ) -> dict[tuple[str, str], Value]:
        """The same of what is found by region and consumer."""
        return dict(
            self.in_order(
                found.items(),
                lambda item: item[0][0],
                lambda item, block: ((self.other(item[0][0], block), item[0][1]), copied(item[1], block)),
                lambda item: (item[0], copied(item[1], self.repetition.count + 1)),
            )
        )

    def other(self, name: str, block: int) -> str:
        """What has this name in another block."""
        return self.repetition.renamings[block - 1](name)

    def in_order(
        self,
        items: Iterable[Value],
        name_of: Callable[[Value], str],
        copied: Callable[[Value, int], Value],
        own: Callable[[Value], Value] = lambda item: item,
    ) -> list[Value]:
        """The items, and before the first of this block the copies that the blocks before have of its items."""
        items = list(items)
        mine = [item for item in items if self.owns(name_of(item))]
        found: list[Value] = []
        for item in items:
            if mine and item is mine[0]:
                found += [copied(one, block) for block in range(1, self.repetition.count + 1) for one in mine]
            found.append(own(item) if self.owns(name_of(item)) else item)
        return found

    def copied(self, saving: Saving, block: int) -> Saving:
        """What another block saves in the place of what this one does, or this one itself: the last."""
        count = self.repetition.count
        side, alike = self.repetition.others_of.get(saving.storage, (1, ()))
        place = block - (1 - side)  # of what the block before has made
        storage = alike[place] if alike else saving.storage
        region = saving.region if block == count + 1 else self.other(saving.region, block)
        return replace(saving, storage=storage, region=region)

    def savings(self, savings: Iterable[Saving]) -> tuple[Saving, ...]:
        """What all save, in order."""
        for saving in savings:
            if saving.storage in self.repetition.others_of and saving.region == "":
                raise UnequalError("what equal blocks save is saved outside of what was captured")
        count = self.repetition.count
        return tuple(
            self.in_order(
                savings, lambda saving: saving.region, self.copied, lambda saving: self.copied(saving, count + 1)
            )
        )

    def last_uses(self, last_uses: Mapping[int, int]) -> dict[int, int]:
        """The events of the last uses of all storages."""
        repetition = self.repetition
        found = {
            storage: repetition.moved(event)
            for storage, event in last_uses.items()
            if storage not in repetition.others_of
        }
        for storage, (side, alike) in repetition.others_of.items():
            if side == 1 and (storage in last_uses or alike[0] in last_uses):
                if storage not in last_uses or alike[0] not in last_uses:
                    raise UnequalError("what one of two equal blocks makes is used and not that of the other")
                pair, block, offset = self.place_of(last_uses[alike[0]])
                for number, one in enumerate(alike[:-1]):
                    found[one] = repetition.begin(pair, number + block) + offset
                own = repetition.moved(last_uses[storage])
                if block == 0 and own != repetition.begin(pair, repetition.count + 1) + offset:
                    raise UnequalError("what equal blocks make is used last in different places")
                found[storage] = own
        return found

    def place_of(self, event: int) -> tuple[int, int, int]:
        """The pair, which of the two blocks, and where in it something is used after so many events."""
        for number, pair in enumerate(self.repetition.pairs):
            for block, (start, end) in enumerate((pair.second, pair.third)):
                if start < event <= end:
                    return number, block, event - start
        raise UnequalError("what equal blocks make is used last outside of them")
