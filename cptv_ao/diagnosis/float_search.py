"""Which parts to leave in float, one after another: most loss gone for each operation given up.

What a part gains depends on what is in float already. It is predicted to second order for all parts at once, from one
pass that follows the rounding of every site to the outputs: errors of sites that add up or make up for each other are
counted so. The twin then measures the few that promise most (lazy evaluation: Minoux, 1978).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cptv_ao.core.batches import Batch
from cptv_ao.core.config import RefineConfig
from cptv_ao.core.loss_curvature import random_direction
from cptv_ao.core.losses import get_exact_loss
from cptv_ao.core.progress import Advance
from cptv_ao.core.tensors import compared
from cptv_ao.diagnosis.wiring import Wiring
from cptv_ao.evaluation.calibration import Images
from cptv_ao.fx.running import call
from cptv_ao.simulation.partly_float import partly_float
from cptv_ao.simulation.rounding_effects import rounding_effects
from cptv_ao.simulation.twin import Twin
from cptv_ao.transforms.float_model.exclusion import Part

# Images that are run at once where errors are followed, and directions of each.
_AT_ONCE, _DIRECTIONS = 16, 2
# Operations that a part, and each node in it, costs beside its own, as a share of all: few are better than many.
_FIXED, _EACH = 0.002, 1e-5
# How much the price of a part counts: each is tried.
_POWERS = 1.0, 0.5
# Steps, at most. Share of the loss that a step must take away, and what stands for a loss of 0.
_MOST_STEPS, _LEAST_GAIN, _TINY = 24, 0.002, 1e-12


@dataclass(frozen=True)
class Chosen:
    """One step.

    Attributes:
        parts: that are left in float from here on, beside those before.
        loss: of the twin then.
        share: of the quantized operations, all that are in float then.
    """

    parts: tuple[Part, ...]
    loss: float
    share: float


@dataclass
class Measure:
    """The loss of a twin with some nodes in float.

    Args:
        images: where the twin computes.
    """

    twin: Twin
    wiring: Wiring
    images: Images
    config: RefineConfig
    known: dict[frozenset[str], float] = field(default_factory=dict)

    def __call__(self, nodes: frozenset[str]) -> float:
        if nodes not in self.known:
            config = self.config
            select, loss = config.select, get_exact_loss(config.loss, config.temperature)
            with torch.inference_mode(), partly_float(self.twin, self.wiring.region(nodes)):
                self.known[nodes] = self.images.mean(
                    lambda _, batch, target: float(loss(compared(call(self.twin, batch), select), target))
                )
        return self.known[nodes]


class Prediction:
    """The loss to second order, with some sites gone: that of the sum of what all others do to the outputs.

    Errors that a few directions show to make up for each other may do so by chance: as much is believed that they have
    nothing to do with one another.
    """

    def __init__(self, twin: Twin, batches: Sequence[Batch], config: RefineConfig) -> None:
        generator, select = torch.Generator().manual_seed(0), config.select
        rows: list[dict[str, Tensor]] = []

        def pull(output: Any) -> Tensor:
            return random_direction(config.loss, compared(output, select), generator)

        for batch in batches:
            for part, _ in batch.parts(-(-batch.images // _AT_ONCE)):
                rows += [rounding_effects(twin, part, pull) for _ in range(_DIRECTIONS)]
        self._names = {name: i for i, name in enumerate(sorted({name for row in rows for name in row}))}
        lengths = [len(next(iter(row.values()))) for row in rows if row]
        self._effects = torch.zeros(len(self._names), sum(lengths), dtype=torch.float64)
        at = 0
        for row, length in zip((row for row in rows if row), lengths, strict=True):
            for name, values in row.items():
                self._effects[self._names[name], at : at + length] = values
            at += length

    def rows(self) -> Iterator[tuple[str, Tensor]]:
        """What each site adds in each direction."""
        return zip(self._names, self._effects, strict=True)

    def __call__(self, gone: Collection[str]) -> float:
        left = torch.tensor([name not in gone for name in self._names])
        effects = self._effects[left]
        if not effects.numel():
            return 0.0
        return float((effects.sum(0).square().mean() + effects.square().mean(1).sum()) / 4)


@dataclass(frozen=True)
class _State:
    """What has been chosen so far, and the losses then."""

    parts: frozenset[Part]
    nodes: frozenset[str]
    loss: float
    predicted: float

    def new(self, parts: Collection[Part]) -> tuple[Part, ...]:
        """Those that are not in float yet."""
        return tuple(sorted(part for part in parts if not any(_inside(part, other) for other in self.parts)))


def _inside(part: Part, other: Part) -> bool:
    return part == other or (not other.functions and other.holds(part.path, True))


class _Offer(NamedTuple):
    """A group, what it costs, what it is predicted to gain, and that with what it gained when it was last measured."""

    group: frozenset[Part]
    cost: float
    predicted: float
    promised: float


class FloatSearch:
    """The steps, each with what is left judged given what was chosen.

    What a group gains is what goes of the loss as it was at the start, half as the twin measures it and half as it is
    predicted. A measurement is exact on its images, but images that a network is sure of hardly tell losses apart once
    the worst is gone; the prediction, an expectation, goes on telling them apart, and knows no more than small errors.

    Args:
        measure: of the twin.
        prediction: of the loss with some sites gone.
        operations: of each quantized node.
        least: loss of the teacher against itself.
        tries: groups that are measured in each step, those that promise most.
        survey: groups that are measured once at the start, each alone; where the time allows, all.
    """

    def __init__(
        self,
        measure: Measure,
        prediction: Callable[[Collection[str]], float],
        operations: dict[str, float],
        least: float,
        tries: int,
        survey: int,
    ) -> None:
        self._measure, self._prediction, self._wiring = measure, prediction, measure.wiring
        self._operations, self._all = operations, sum(operations.values())
        self._tries = tries
        self._groups = {group: self._wiring.parts.nodes_of(group) for group in self._wiring.groups()}
        none: frozenset[str] = frozenset()
        self._start = _State(frozenset(), none, measure(none), self._predicted(none))
        self._units = max(self._start.loss - least, _TINY), max(self._start.predicted, _TINY)
        self._survey, self._seen = survey, dict[frozenset[Part], float]()

    @property
    def given(self) -> float:
        """The loss with nothing in float."""
        return self._start.loss

    def share(self, nodes: Collection[str]) -> float:
        """Of the quantized operations, those of some nodes."""
        return sum(self._operations.get(name, 0.0) for name in nodes) / self._all if self._all else 0.0

    def steps(self, budget: float, advance: Advance) -> list[Chosen]:
        """Until the budget (a share of the operations) is spent, or nothing gains any more.

        What brings most for each operation may leave a rest of the budget that pays for nothing; so the price is also
        taken less seriously, and the better end counts (Leskovec et al., KDD 2007, for the same reason).
        """
        for offer in self._offers(self._start, budget, 1.0)[: self._survey]:
            self._gained(self._start, offer.group)
            advance("each alone")
        powers = _POWERS if self._tries > 1 else _POWERS[:1]  # where a measurement is dear, one way is enough
        ways = [self._way(budget, power, advance) for power in powers]
        return min(ways, key=lambda way: self._left(way[1]))[0]

    def _way(self, budget: float, power: float, advance: Advance) -> tuple[list[Chosen], _State]:
        state, found = self._start, list[Chosen]()
        while len(found) < _MOST_STEPS and (best := self._best(state, budget, power)) is not None:
            new, nodes = state.new(best), state.nodes | self._groups[best]
            state = _State(state.parts | best, nodes, self._measure(nodes), self._predicted(nodes))
            found.append(Chosen(new, state.loss, self.share(nodes)))
            advance(", ".join(map(str, new)))
        return found, state

    def _left(self, state: _State) -> float:
        """Of the loss, measured and predicted."""
        return state.loss / self._units[0] + state.predicted / self._units[1]

    def _best(self, state: _State, budget: float, power: float) -> frozenset[Part] | None:
        """The group of most gain for each operation; None where none gains enough."""
        best, best_rate = None, 0.0
        for offer in self._offers(state, budget, power)[: self._tries]:
            gain = (offer.predicted + self._gained(state, offer.group)) / 2
            if gain >= _LEAST_GAIN and gain / offer.cost**power > best_rate:
                best, best_rate = offer.group, gain / offer.cost**power
        return best

    def _gained(self, state: _State, group: frozenset[Part]) -> float:
        """What the twin measures, or nothing where it measures a loss."""
        gone = state.loss - self._measure(state.nodes | self._groups[group])
        self._seen[group] = max(gone, 0.0) / self._units[0]
        return self._seen[group]

    def _offers(self, state: _State, budget: float, power: float) -> list[_Offer]:
        """Groups that the budget pays for and that are predicted to gain, those that promise most first."""
        share = self.share(state.nodes)
        offers: list[_Offer] = []
        for group, own in self._groups.items():
            nodes = state.nodes | own
            after = self.share(nodes)
            if nodes == state.nodes or after > budget:
                continue
            gain = (state.predicted - self._predicted(nodes)) / self._units[1]
            if gain > 0:
                cost = after - share + _FIXED * max(1, len(state.new(group))) + _EACH * len(own)
                offers.append(_Offer(group, cost, gain, gain + self._seen.get(group, gain)))
        return sorted(offers, key=lambda offer: (-offer.promised / offer.cost**power, sorted(offer.group)))

    def _predicted(self, nodes: frozenset[str]) -> float:
        return self._prediction(self._wiring.vanishing(nodes))
