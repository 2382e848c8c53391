"""The initial population, beside the observers' scales, in the order in which it is tried."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from functools import partial

from cptv_ao.core.batches import Batch
from cptv_ao.core.contexts import is_cpu
from cptv_ao.core.image_subsets import spread_images
from cptv_ao.core.qparams import Assignment
from cptv_ao.evaluation.calibration import Calibration
from cptv_ao.search.budget import Budget
from cptv_ao.search.proposals.bias_correction import BiasCorrector
from cptv_ao.search.proposals.compensating_weights import compensating_weights
from cptv_ao.search.proposals.initial_scales import Proposal, individuals
from cptv_ao.search.proposals.least_loss_ranges import LeastLossRanges
from cptv_ao.search.proposals.narrower_weights import narrower_weights
from cptv_ao.search.proposals.saturation_limits import SaturationLimits
from cptv_ao.search.proposals.searched_scales import SearchedScales
from cptv_ao.search.proposals.sequential_rounding import sequential_roundings
from cptv_ao.search.proposals.step_images import StepImages

# Images on which errors of weights are weighed, at most; where there is no time for the least of them, they are not
# weighed. Weights of few codes have more to gain. Share of the seconds of a limited search that each look may take.
_TOLD_BY, _TOLD_LEAST, _TOLD_LEAST_COARSE, _SHARE = 64, 16, 4, 0.03
# Share of the search in which weights may be rounded column after column.
_ROUNDED = 0.1
# Images that tell which codes activations reach.
_PROBED = 8


class Population:
    """Yields its individuals; each starts from what is in the model by then.

    Args:
        searched: whose scales they are.
        calibration: whose search images they are found on.
        budget: asked before each whether to go on.
        images: of the steps of the descent, of which some are looked at.
        limits: of the codes that kernels saturate on, which are found before the first.
        biases: corrects them.
    """

    def __init__(
        self,
        searched: SearchedScales,
        calibration: Calibration,
        budget: Budget,
        images: StepImages,
        limits: SaturationLimits,
        biases: BiasCorrector,
    ) -> None:
        self._searched, self._budget, self._images = searched, budget, images
        self._config, self._cost = calibration.config, calibration.cost
        self._limits, self._biases = limits, biases
        self._refused = list[Proposal]()
        # Activations on whole containers with their weights, as they were last proposed; by leader.
        self._traded = dict[str, Assignment]()
        self._ranges = LeastLossRanges(searched.twin, searched.groups, images, calibration, budget)
        batch = calibration.search.batches[0]
        self._batch = batch if is_cpu(self._config.device) else batch.few(_TOLD_BY).to(self._config.device)

    @property
    def image_forwards(self) -> int:
        """Images run through the twin so far by this rank, less those of the biases; forward and backward count as
        three."""
        return self._ranges.image_forwards

    def proposals(self) -> Iterator[Proposal]:
        """Its individuals, as far as there is time for them; behind corrected biases those that were refused before,
        since the means that they move may have been all that was wrong with them."""
        biases, store = self._biases, self._searched.store
        yield from self._of_scales()
        if "biases" in self._config.population and biases.worth(store) and self._budget.left:
            yield "biases corrected", partial(biases.corrected, dict, store)
            again, self._refused = self._refused if biases.in_use(store) else [], []
            for name, scales in again:
                if self._budget.left:
                    yield from self._tried([(f"{name}, biases corrected", partial(biases.corrected, scales, store))])

    def _of_scales(self) -> Iterator[Proposal]:
        population, searched, biases = set(self._config.population), self._searched, self._biases
        kernels, groups = searched.kernels, searched.groups
        if kernels.form.enforces_ranges:  # for which its observers calibrate
            population.discard("ranges")
        limited = [] if kernels.form.simulates_itself else self._limits.on_whole_containers()
        self._limits.limit(limited)
        coarse = [lead for lead, group in groups.items() if group[0].is_coarse]
        worth = self._cost.images(_TOLD_BY, forwards=2, share=_SHARE, least=0)
        if worth < (_TOLD_LEAST_COARSE if coarse else _TOLD_LEAST):
            population.discard("output_error")
        if biases.dear:  # what gains most for its seconds; the whole range is no news to it
            first = searched.scales()
            yield from self._least_loss(population)
            moved = searched.moved_since(first)
            yield from self._narrower(population)
            if moved:
                population.discard("ranges")
        trained = {name: qparams for name, qparams in kernels.weights.trained.items() if name in groups}
        if trained and self._budget.left:
            yield "weight scales of the fake quantization", partial(dict, trained)
        batch = self._batch.few(max(worth, 1))
        most_flops = self._cost.flops_of(_SHARE)
        traded = {name for lead in set(limited) - self._limits.limited for name in self._traded[lead]}
        others = {lead: group for lead, group in groups.items() if lead not in traded}
        limited = [lead for lead in limited if lead in others]
        found = list(individuals(population, searched.twin, others, limited, kernels.read, batch, most_flops))
        for individual in self._tried(reversed(found) if biases.dear else found):  # first what costs nothing
            if self._budget.left:
                yield individual
        if not biases.dear:
            yield from self._narrower(population)
            yield from self._least_loss(population)
        self._limits.release()
        yield from self._roundings([lead for lead, group in groups.items() if group[0].kind == "weight"], coarse)

    def _tried(self, individuals: Iterable[Proposal]) -> Iterator[Proposal]:
        """Individuals, of which those that are refused are remembered; they change the limits only where they are
        kept."""
        for individual in individuals:
            before, limited = self._searched.scales(), self._limits.limited
            yield individual
            if not self._searched.moved_since(before):
                self._refused.append(individual)
                self._limits.limit(limited)

    def _narrower(self, population: Collection[str]) -> Iterator[Proposal]:
        """Whole containers where kernels would saturate on them, with weights of fewer codes."""
        if "ranges" in population and self._limits.limited and self._budget.left:
            yield from self._tried(
                [("whole range, weights of fewer codes where kernels saturate", self._with_narrower_weights)]
            )

    def _with_narrower_weights(self) -> Assignment:
        """Those of the limited groups for which that does it: they are limited no more."""
        limits, searched, limited = self._limits, self._searched, self._limits.limited
        searched.follow()
        limits.limit(())  # or whole containers would look like halves
        batch, read = self._batch.few(_PROBED), searched.store.read
        found = narrower_weights(searched.twin, searched.groups, sorted(limited), read, batch)
        saturating = limits.saturating({name: qparams for part in found.values() for name, qparams in part.items()})
        self._traded = {lead: part for lead, part in found.items() if lead not in saturating}
        limits.limit(limited - self._traded.keys())
        return {name: qparams for part in self._traded.values() for name, qparams in part.items()}

    def _least_loss(self, population: Collection[str]) -> Iterator[Proposal]:
        if "curvature" not in population:
            return
        found = partial(self._ranges.assignment, self._searched.store, self._limits.limited)
        # The first gain does not wait for all images.
        if self._biases.dear and is_cpu(self._config.device) and self._budget.left:
            yield "activation ranges of least loss, few images", partial(found, True)
        if self._budget.left and not self._ranges.done:
            yield from self._tried([("activation ranges of least loss", found)])

    def _roundings(self, weights: Collection[str], coarse: Collection[str]) -> Iterator[Proposal]:
        """Of weights; of few codes also those that compensate, if there is time for them."""
        wanted = "output_error" in self._config.population and self._config.rounding_rate
        if wanted and weights and self._budget.left:
            yield "weights rounded for least output error", partial(self._rounded_in_turn, weights)
        if wanted and coarse and self._budget.left:
            worth = self._cost.images(_TOLD_BY, forwards=24, share=_SHARE, least=0)
            if worth and self._budget.left:
                few = self._batch.few(worth)
                yield "weights that compensate for what is before them", partial(self._compensating, coarse, few)

    def _rounded_in_turn(self, weights: Collection[str]) -> Assignment:
        """At their present scales."""
        self._searched.follow()
        images = self._cost.images(_TOLD_BY, forwards=2, share=_SHARE, least=_TOLD_LEAST_COARSE)
        batches = spread_images(self._images.batches, images)
        return sequential_roundings(self._searched.twin, weights, batches, self._cost.flops_of(_ROUNDED))

    def _compensating(self, weights: Collection[str], batch: Batch) -> Assignment:
        """Each with a scale of its own."""
        self._searched.follow()
        alone = [name for name in weights if len(self._searched.groups[name]) == 1]
        return compensating_weights(self._searched.twin, alone, batch, self._cost.flops_of(_ROUNDED))
