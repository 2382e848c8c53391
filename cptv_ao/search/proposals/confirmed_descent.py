"""A descent on the twin that the kernels confirm on the way: what it has found is tried; where that is not accepted, a
part of the way to it; and where none is, the descent goes back to what is there."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np

from cptv_ao.core.contexts import is_cpu
from cptv_ao.core.losses import get_loss, is_per_image
from cptv_ao.core.qparams import REDUCED_QMAX, Assignment
from cptv_ao.evaluation.calibration import Calibration
from cptv_ao.search.budget import Budget
from cptv_ao.search.proposals.bias_correction import BiasCorrector
from cptv_ao.search.proposals.descent_objective import Objective
from cptv_ao.search.proposals.gradient import GradientDescent, State
from cptv_ao.search.proposals.initial_scales import Meanwhile, Proposal
from cptv_ao.search.proposals.learnable_qparams import NO_UNITS
from cptv_ao.search.proposals.saturation_limits import SaturationLimits
from cptv_ao.search.proposals.schedule import Schedule
from cptv_ao.search.proposals.searched_scales import SearchedScales
from cptv_ao.search.proposals.step_images import StepImages

# Share of the seconds of a limited search that the descent may take where block visits follow.
_DESCENT_SHARE = 0.85
# Shares of a descent after which it is tried on the kernels; where seconds are counted, also while it is young: what it
# has by then may be all that there is time for, and is no reason to send it back.
_MARKS, _YOUNG = (0.25, 0.5, 0.75, 1.0), (0.1,)
# Share of a descent that it goes on for while a proposal is judged.
_AHEAD = 0.08
# How often half of the way to a refused proposal is tried in its stead, for a direction may be right where its steps
# were too large; and the share of the seconds of these steps that this may take, where seconds are counted.
_HALVINGS, _WORTH = 2, 0.25


class ConfirmedDescent:
    """Yields what is tried of a descent, which begins at the scales that are in the model by then.

    Args:
        searched: whose scales it moves.
        calibration: for the settings, and the ranks that share the images of a step.
        budget: asked before each proposal and step whether to go on.
        images: of the steps.
        limits: of the codes that kernels saturate on, to which it is held.
        biases: corrects them in what is tried, where that is cheap.
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
        self._config, self._world = calibration.config, calibration.world
        self._limits, self._biases = limits, biases
        self._descent: GradientDescent | None = None
        self._began = 0.0
        # What was limited before what was proposed last.
        self._limited = set[str]()
        # Whether biases are corrected for what is tried; and whether it is the other way behind each refusal, until
        # something is accepted: where the kernels had accepted corrected ones before it began.
        self._corrects = self._alternates = False
        #: images run through the twin so far by this rank; forward and backward count as three
        self.image_forwards = 0

    @property
    def begun(self) -> bool:
        """Whether it has begun, and has not come to its end."""
        return self._descent is not None

    def proposals(self, on_step: Callable[[float], None], on_pause: Callable[[bool], None]) -> Iterator[Proposal]:
        """See `Proposer.proposals`."""
        if self._descent is None:
            self._began = self._budget.now
            self._corrects, self._alternates = False, self._biases.in_use(self._searched.store)
            self._descent = self._new()
        searched, limits, descent = self._searched, self._limits, self._descent
        proposals = descent.run(self._images, self._schedule(), on_step, lambda: self._budget.left, on_pause)
        counted, resumed = descent.image_forwards, self._budget.now
        saturates = searched.on_kernels and not searched.kernels.form.simulates_itself  # the twin never does
        for name, scales in proposals:
            self.image_forwards += descent.image_forwards - counted
            counted = descent.image_forwards
            if not descent.halvings:
                # Where no kernel saturates on the whole range, a dear look at each proposal is left to its score.
                look = saturates and (limits.limited or not self._biases.dear)
                highest = limits.saturating(scales()) if look else {}
                self._limited = limits.limited
                limits.limit(self._limited | highest.keys())
                narrower = {lead: code / REDUCED_QMAX for lead, code in highest.items() if code > REDUCED_QMAX}
                descent.scales.rescale(narrower)
            before, asked = searched.scales(), self._budget.now
            yield self._proposal(name, scales)
            searched.follow()
            if searched.moved_since(before):
                self._alternates = False
                if self._corrects:
                    descent.scales.take_biases(searched.store.read)
                descent.go_on(searched.store.read)
            else:
                self._corrects ^= self._alternates
                if self._goes_half_back(descent.halvings, asked - resumed, self._budget.now - asked):
                    descent.go_half_back_to(searched.store.read)
                    continue
                descent.go_back_to(searched.store.read)
                if not descent.young:
                    limits.limit(self._limited)
            resumed = self._budget.now
        if descent.over:
            self._descent = None

    def _goes_half_back(self, halvings: int, stepped: float, judged: float) -> bool:
        """Whether half of the way to what was refused is tried, by the seconds of its steps and of its judging."""
        if halvings >= _HALVINGS or not self._budget.left:
            return False
        return halvings > 0 or self._budget.search_seconds is None or _HALVINGS * judged <= _WORTH * stepped

    def _proposal(self, name: str, scales: Callable[[], Assignment]) -> Proposal:
        """Scales with the biases that were learnt with them, or with biases that are corrected for them."""
        if not self._corrects:
            return name, scales
        return f"{name}, biases corrected", partial(self._biases.corrected, scales, self._searched.store)

    def beside_the_judge(self, on_step: Callable[[float], None]) -> Meanwhile | None:
        """See `Proposer.beside_the_judge`."""
        if is_cpu(self._config.device) or not self._searched.on_kernels:
            return None

        def descend(judged: Callable[[], bool]) -> None:
            if self._descent is None:
                return
            schedule = self._schedule()
            limited = math.isfinite(schedule.seconds)

            def going(steps: int) -> bool:
                return (not judged() if limited else steps < _AHEAD * schedule.steps) and self._budget.left

            self._descent.run_ahead(self._images, schedule, on_step, going)

        return descend

    def state(self) -> State | None:
        """See `Proposer.state`."""
        if self._descent is None:
            return None
        tensors, data = self._descent.state()
        narrowed = {"narrowed": sorted(self._limits.limited), "narrowed_before": sorted(self._limited)}
        return tensors, {**data, **narrowed, "began": self._began, "corrects": [self._corrects, self._alternates]}

    def resume(self, state: State) -> None:
        """See `Proposer.resume`."""
        self._limits.limit(state[1]["narrowed"])
        self._limited = set(map(str, state[1]["narrowed_before"]))
        self._began = float(state[1]["began"])
        self._corrects, self._alternates = map(bool, state[1]["corrects"])
        self._descent = self._new()
        self._descent.set_state(state)
        batches = range(len(self._images))
        if not 0 <= self._began < math.inf or any(index not in batches for index in state[1]["course"]["order"]):
            raise ValueError(f"expected seconds >= 0 and an order of {len(batches)} batches")

    def _new(self) -> GradientDescent:
        config, searched = self._config, self._searched
        searched.follow()
        return GradientDescent(
            searched.twin,
            searched.groups,
            Objective(
                get_loss(config.loss, config.temperature),
                config.select,
                is_per_image(config.loss),
                config.feature_weight,
                config.cache_bytes // 4,
            ),
            activation_rate=config.activation_rate,
            rounding_rate=config.rounding_rate,
            units=self._biases.units(searched.store) if "biases" in config.population else NO_UNITS,
            rng=np.random.default_rng(config.seed),
            world=self._world,
        )

    def _schedule(self) -> Schedule:
        config, limit = self._config, self._budget.search_seconds
        share = _DESCENT_SHARE if config.passes else 1.0
        seconds = math.inf if limit is None else share * max(limit - self._began, 1e-3)
        started = self._budget.started + self._began
        marks = _MARKS if limit is None else _YOUNG + _MARKS
        steps, rate = self._images.steps(config.gradient_steps), config.learning_rate * self._images.rate
        return Schedule(steps, rate, seconds, marks, self._world, started)
