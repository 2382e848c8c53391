"""The initial population, beside the observers' scales, in the order in which it is tried."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from functools import partial

import torch

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
from cptv_ao.search.proposals.saturation_limits import SaturationLimits
from cptv_ao.search.proposals.searched_scales import SearchedScales
from cptv_ao.search.proposals.sequential_rounding import is_coarse, sequential_roundings
from cptv_ao.search.proposals.step_images import StepImages

# Images on which errors of weights are weighed, at most.
_TOLD_BY = 64


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
        self._ranges = LeastLossRanges(searched.twin, searched.groups, images, calibration)
        batch = calibration.search.batches[0]
        self._batch = batch if is_cpu(self._config.device) else batch.few(_TOLD_BY).to(self._config.device)

    @property
    def image_forwards(self) -> int:
        """Images run through the twin so far by this rank, less those of the biases; forward and backward count as
        three."""
        return self._ranges.image_forwards

    def proposals(self) -> Iterator[Proposal]:
        """Its individuals, as far as there is time for them."""
        population, searched, biases = set(self._config.population), self._searched, self._biases
        kernels, groups = searched.kernels, searched.groups
        if kernels.form.enforces_ranges:  # for which its observers calibrate
            population.discard("ranges")
        limited = [] if kernels.form.simulates_itself else self._limits.on_whole_containers()
        self._limits.limit(limited)
        worth = self._cost.images(_TOLD_BY, forwards=24, share=0.03, least=0)
        if not worth:
            population.discard("output_error")
        first = searched.scales()
        if biases.dear:  # what gains most for its seconds; the whole range is no news to it
            yield from self._least_loss(population)
            if not torch.equal(first, searched.scales()):
                population.discard("ranges")
        trained = {name: qparams for name, qparams in kernels.weights.trained.items() if name in groups}
        if trained and self._budget.left:
            yield "weight scales of the fake quantization", partial(dict, trained)
        batch = self._batch.few(max(worth, 1))
        found = list(individuals(population, searched.twin, groups, limited, kernels.read, batch))
        for individual in reversed(found) if biases.dear else found:  # first what costs nothing
            if self._budget.left:
                yield individual
        if not biases.dear:
            yield from self._least_loss(population)
        yield from self._roundings(batch if worth else None)
        if "biases" in population and biases.worth(searched.store) and self._budget.left:
            yield "biases corrected", partial(biases.corrected, dict, searched.store)

    def _least_loss(self, population: Collection[str]) -> Iterator[Proposal]:
        if "curvature" not in population:
            return
        found = partial(self._ranges.assignment, self._searched.store, self._limits.limited)
        # The first gain does not wait for all images.
        if self._biases.dear and is_cpu(self._config.device) and self._budget.left:
            yield "activation ranges of least loss, few images", partial(found, True)
        if self._budget.left and not self._ranges.done:
            yield "activation ranges of least loss", found

    def _roundings(self, batch: Batch | None) -> Iterator[Proposal]:
        """Of weights of few codes; those that compensate are found on a batch, if there is time for that."""
        coarse = [lead for lead, group in self._searched.groups.items() if is_coarse(group[0])]
        wanted = "output_error" in self._config.population and self._config.rounding_rate
        if coarse and wanted and self._budget.left:
            yield "weights rounded for least output error", partial(self._rounded_in_turn, coarse)
            if batch is not None and self._budget.left:
                yield "weights that compensate for what is before them", partial(self._compensating, coarse, batch)

    def _rounded_in_turn(self, weights: Collection[str]) -> Assignment:
        """At their present scales."""
        self._searched.follow()
        images = self._cost.images(_TOLD_BY, forwards=2, share=0.03, least=4)
        return sequential_roundings(self._searched.twin, weights, spread_images(self._images.batches, images))

    def _compensating(self, weights: Collection[str], batch: Batch) -> Assignment:
        """Each with a scale of its own."""
        self._searched.follow()
        alone = [name for name in weights if len(self._searched.groups[name]) == 1]
        return compensating_weights(self._searched.twin, alone, batch)
