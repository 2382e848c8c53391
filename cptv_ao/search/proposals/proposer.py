"""What is tried on the kernels before the block visits: the initial population, then a descent from the best of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import partial

import numpy as np
import torch
from torch import Tensor

from cptv_ao.backends.backend import Backend
from cptv_ao.backends.protocol import ScaleStore
from cptv_ao.core.batches import Batch
from cptv_ao.core.contexts import is_cpu
from cptv_ao.core.image_subsets import spread_images
from cptv_ao.core.losses import get_loss, is_per_image
from cptv_ao.core.qparams import REDUCED_QMAX, Assignment
from cptv_ao.core.sites import ScaleSite
from cptv_ao.evaluation.calibration import Calibration
from cptv_ao.search.budget import Budget
from cptv_ao.search.proposals.bias_correction import BiasCorrector
from cptv_ao.search.proposals.compensating_weights import compensating_weights
from cptv_ao.search.proposals.descent_objective import Objective
from cptv_ao.search.proposals.following import follow
from cptv_ao.search.proposals.gradient import GradientDescent, State
from cptv_ao.search.proposals.initial_scales import Meanwhile, Proposal, individuals
from cptv_ao.search.proposals.least_loss_ranges import LeastLossRanges
from cptv_ao.search.proposals.saturation_limits import SaturationLimits
from cptv_ao.search.proposals.schedule import Schedule
from cptv_ao.search.proposals.sequential_rounding import is_coarse, sequential_roundings
from cptv_ao.search.proposals.step_images import StepImages
from cptv_ao.simulation.twin import Twin

# Share of the seconds of a limited search that the descent may take where block visits follow.
_DESCENT_SHARE = 0.85
# Images on which errors of weights are weighed, at most.
_TOLD_BY = 64
# Images of one step of the descent: larger batches of the loader are cut, and further where a forward of an image is
# dear, to where a step costs so many floating point operations forward; on a GPU to half of the most, which is as good
# in less time and memory. Losses that compare images stay at the most.
_STEP_IMAGES, _STEP_IMAGES_ON_GPU, _STEP_LEAST, _STEP_FLOPS = 100, 50, 2, 2.5e10
# Shares of a descent after which it is tried on the kernels; where seconds are counted, also while it is young: what it
# has by then may be all that there is time for, and is no reason to send it back.
_MARKS, _YOUNG = (0.25, 0.5, 0.75, 1.0), (0.1,)
# Share of a descent that it goes on for while a proposal is judged.
_AHEAD = 0.08


class Proposer:
    """Yields proposals for the whole model; each starts from what the loop left in the model before.

    Args:
        backend: of the model.
        store: what is searched: that, or a simulation of it. Which sites the kernels saturate on is found on the
            kernels all the same, once: what they cannot add up would be rejected.
        groups: the tied groups that are searched, by the name of their leader.
        calibration: whose search images the descent learns from.
        budget: asked before each proposal and step whether to go on.

    Raises:
        UnsupportedModelError: the model has a node that neither the float twin nor a kernel computes.
    """

    def __init__(
        self,
        backend: Backend,
        store: ScaleStore,
        groups: Mapping[str, tuple[ScaleSite, ...]],
        calibration: Calibration,
        budget: Budget,
    ) -> None:
        self._kernels, self._store, self._groups = backend, store, groups
        self._config, self._world = calibration.config, calibration.world
        self._cost = calibration.cost
        self._images = calibration.search.batches[0]
        self._steps = StepImages(calibration, _step_images(calibration))
        self._twin = Twin(backend).checked(self._images)
        self._twin.reround_weights()
        if not is_cpu(self._config.device):
            self._steps.to(self._config.device)
            self._images = self._images.few(_TOLD_BY).to(self._config.device)
            self._twin.to(self._config.device)
        #: what is to be said of the twin that proposes
        self.twin_notes = self._twin.notes
        self._limits = SaturationLimits(backend, self._twin, groups, calibration.probe, self._world)
        self._biases = BiasCorrector(self._twin, groups, self._steps, calibration.cost)
        self._ranges = LeastLossRanges(self._twin, groups, self._steps, calibration)
        self._descended = 0
        self._budget = budget
        self._began = 0.0
        self._descent: GradientDescent | None = None

    @property
    def image_forwards(self) -> int:
        """Images run through the twin so far by this rank; forward and backward count as three."""
        return self._descended + self._biases.image_forwards + self._ranges.image_forwards

    def proposals(self, on_step: Callable[[float], None], on_pause: Callable[[bool], None]) -> Iterator[Proposal]:
        """The population, then those of the descent, or where it was before `resume` what is left of these.

        Args:
            on_step: called with the loss of each step of the descent.
            on_pause: called between its steps, when `state` says where it is; with True where that is worth saving.
        """
        if self._descent is None:
            yield from self._population()
            if not self._config.gradient_steps or not self._budget.left:
                return
            self._began = self._world.first(self._budget.seconds)
            self._descent = self._new_descent()
        yield from self._descend(self._descent, on_step, on_pause)
        if self._biases.dear and self._biases.in_use(self._store) and self._budget.left:
            yield "biases corrected", partial(self._biases.corrected, dict, self._store)

    def beside_the_judge(self, on_step: Callable[[float], None]) -> Meanwhile | None:
        """What to do while the kernels judge a proposal: the descent goes on, where it is on a GPU; None: nothing.

        Without a limit of seconds it goes on for so many steps, that a search finds the same each time.
        """
        if is_cpu(self._config.device) or self._store is not self._kernels:
            return None

        def descend(judged: Callable[[], bool]) -> None:
            if self._descent is None:
                return
            schedule = self._schedule()
            limited = math.isfinite(schedule.seconds)

            def going(steps: int) -> bool:
                return (not judged() if limited else steps < _AHEAD * schedule.steps) and self._budget.left

            self._descent.run_ahead(self._steps, schedule, on_step, going)

        return descend

    def state(self) -> State | None:
        """Where the descent is, for `resume`; None where it has not begun, or has come to its end."""
        if self._descent is None:
            return None
        tensors, data = self._descent.state()
        return tensors, {**data, "narrowed": sorted(self._limits.limited), "began": self._began}

    def resume(self, state: State) -> None:
        """Begin in the descent, with what `state` returned for the same model, config and images.

        Raises:
            KeyError, TypeError, ValueError: it is not that.
        """
        self._limits.limit(state[1]["narrowed"])
        self._began = float(state[1]["began"])
        self._descent = self._new_descent()
        self._descent.set_state(state)
        batches = range(len(self._steps))
        if not 0 <= self._began < math.inf or any(index not in batches for index in state[1]["course"]["order"]):
            raise ValueError(f"expected seconds >= 0 and an order of {len(batches)} batches")

    def _population(self) -> Iterator[Proposal]:
        population, now = set(self._config.population), self._kernels.read
        if self._kernels.form.enforces_ranges:  # for which its observers calibrate
            population.discard("ranges")
        limited = [] if self._kernels.form.simulates_itself else self._limits.on_whole_containers()
        self._limits.limit(limited)
        worth = self._cost.images(_TOLD_BY, forwards=24, share=0.03, least=0)
        if not worth:
            population.discard("output_error")
        first, dear = _scales(self._store, self._groups), self._biases.dear
        if dear:  # what gains most for its seconds; the whole range is no news to it
            yield from self._least_loss(population)
            if not torch.equal(first, _scales(self._store, self._groups)):
                population.discard("ranges")
        trained = {name: qparams for name, qparams in self._kernels.weights.trained.items() if name in self._groups}
        if trained and self._budget.left:
            yield "weight scales of the fake quantization", partial(dict, trained)
        batch = self._images.few(max(worth, 1))
        found = list(individuals(population, self._twin, self._groups, limited, now, batch))
        for individual in reversed(found) if dear else found:  # first what costs nothing
            if self._budget.left:
                yield individual
        if not dear:
            yield from self._least_loss(population)
        coarse = [lead for lead, group in self._groups.items() if is_coarse(group[0])]
        if coarse and "output_error" in self._config.population and self._config.rounding_rate and self._budget.left:
            yield "weights rounded for least output error", partial(self._rounded_in_turn, coarse)
            if worth and self._budget.left:
                yield "weights that compensate for what is before them", partial(self._compensating, coarse, batch)
        if "biases" in population and self._biases.worth(self._store) and self._budget.left:
            yield "biases corrected", partial(self._biases.corrected, dict, self._store)

    def _least_loss(self, population: Collection[str]) -> Iterator[Proposal]:
        if "curvature" not in population:
            return
        found = partial(self._ranges.assignment, self._store, self._limits.limited)
        # The first gain does not wait for all images.
        if self._biases.dear and is_cpu(self._config.device) and self._budget.left:
            yield "activation ranges of least loss, few images", partial(found, True)
        if self._budget.left and not self._ranges.done:
            yield "activation ranges of least loss", found

    def _rounded_in_turn(self, weights: Collection[str]) -> Assignment:
        """At their present scales."""
        self._follow()
        images = self._cost.images(_TOLD_BY, forwards=2, share=0.03, least=4)
        return sequential_roundings(self._twin, weights, spread_images(self._steps.batches, images))

    def _compensating(self, weights: Collection[str], batch: Batch) -> Assignment:
        """Each with a scale of its own."""
        self._follow()
        return compensating_weights(self._twin, [name for name in weights if len(self._groups[name]) == 1], batch)

    @property
    def _saturates(self) -> bool:
        """Whether what is searched runs on the kernels, which may saturate: the twin never does."""
        return self._store is self._kernels and not self._kernels.form.simulates_itself

    def _follow(self) -> None:
        """Give the twin the scales that are in the model."""
        follow(self._twin, self._store)

    def _new_descent(self) -> GradientDescent:
        config = self._config
        self._follow()
        return GradientDescent(
            self._twin,
            self._groups,
            Objective(
                get_loss(config.loss, config.temperature),
                config.select,
                is_per_image(config.loss),
                config.feature_weight,
                config.cache_bytes // 4,
            ),
            activation_rate=config.activation_rate,
            rounding_rate=config.rounding_rate,
            rng=np.random.default_rng(config.seed),
            world=self._world,
        )

    def _descend(
        self, descent: GradientDescent, on_step: Callable[[float], None], on_pause: Callable[[bool], None]
    ) -> Iterator[Proposal]:
        proposals = descent.run(self._steps, self._schedule(), on_step, lambda: self._budget.left, on_pause)
        counted = descent.image_forwards
        limits, biases = self._limits, self._biases
        for name, scales in proposals:
            self._descended += descent.image_forwards - counted
            counted = descent.image_forwards
            # Where no kernel saturates on the whole range, a dear look at each proposal is left to its score.
            look = self._saturates and (limits.limited or not biases.dear)
            highest = limits.saturating(scales()) if look else {}
            limited = limits.limited
            limits.limit(limited | highest.keys())
            narrower = {lead: code / REDUCED_QMAX for lead, code in highest.items() if code > REDUCED_QMAX}
            descent.scales.rescale(narrower)
            before = _scales(self._store, self._groups)
            corrects = biases.in_use(self._store) and not biases.dear
            yield name, partial(biases.corrected, scales, self._store) if corrects else scales
            self._follow()
            if not torch.equal(_scales(self._store, self._groups), before):
                descent.go_on()
            elif not descent.young:
                descent.go_back_to(self._store.read)
                limits.limit(limited)
        if descent.over:
            self._descent = None

    def _schedule(self) -> Schedule:
        config, limit = self._config, self._budget.search_seconds
        share = _DESCENT_SHARE if config.passes else 1.0
        seconds = math.inf if limit is None else share * max(limit - self._began, 1e-3)
        started = self._budget.started + self._began
        marks = _MARKS if limit is None else _YOUNG + _MARKS
        return Schedule(config.gradient_steps, config.learning_rate, seconds, marks, self._world, started)


def _scales(store: ScaleStore, leads: Iterable[str]) -> Tensor:
    """The scales of these groups that are in the model, one after another."""
    return torch.cat([store.read(lead).scale.reshape(-1) for lead in leads])


def _step_images(calibration: Calibration) -> int:
    if not is_per_image(calibration.config.loss):
        return _STEP_IMAGES
    if not is_cpu(calibration.config.device):
        return _STEP_IMAGES_ON_GPU
    return max(_STEP_LEAST, min(_STEP_IMAGES, round(_STEP_FLOPS / calibration.cost.flops)))
