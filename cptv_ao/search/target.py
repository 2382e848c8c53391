"""Where a search takes place: on the kernels of the model, or on its float twin with the kernels as the judge."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property

from cptv_ao.backends.backend import Backend
from cptv_ao.backends.protocol import ScaleStore
from cptv_ao.core.formatting import number
from cptv_ao.core.outcome import Losses, Outcome, Status
from cptv_ao.core.sites import ScaleSite
from cptv_ao.evaluation.calibration import Calibration, on_device
from cptv_ao.evaluation.scoring import Shipped, SplitEvaluators, check_losses
from cptv_ao.search.baseline import Baseline
from cptv_ao.search.budget import Budget
from cptv_ao.search.proposals.proposer import Proposer
from cptv_ao.search.verdict import Verdict
from cptv_ao.simulation.simulated_backend import SimulatedBackend


class KernelTarget:
    """The kernels of a model: what is searched is what ships.

    Args:
        backend: of the model, as it is searched.
        kernels: scores the model as it was given.
        form: the model that was given, where it has another form now.
        calibration: as for `SplitEvaluators`.

    Attributes:
        store: what the search writes its candidates into.
    """

    def __init__(
        self, backend: Backend, kernels: SplitEvaluators, form: Baseline | None, calibration: Calibration
    ) -> None:
        self._backend, self._form, self._calibration = backend, form, calibration
        self.store: ScaleStore = backend
        self._scorings = [kernels]

    @cached_property
    def _kernels(self) -> SplitEvaluators:
        """Score the model as it is now."""
        if self._form is None:
            return self._scorings[0]
        self._scorings.append(self._form.scoring)
        return self._form.scoring

    @property
    def scoring(self) -> SplitEvaluators:
        """What the search scores its candidates with."""
        return self._kernels

    @property
    def given(self) -> Baseline | None:
        """The model that was given, where the search starts from another form of it, with losses like the search's."""
        return self._form

    @property
    def verdict_seconds(self) -> float:
        """What it takes to judge what the search has found, once it is over."""
        return 0.0

    @property
    def image_forwards(self) -> int:
        """Images scored so far by this rank."""
        return sum(scoring.image_forwards for scoring in self._scorings)

    def proposer(self, groups: Mapping[str, tuple[ScaleSite, ...]], budget: Budget) -> Proposer:
        """Proposals for the whole model.

        Raises:
            UnsupportedModelError: the float twin does not know an op of it.
        """
        return Proposer(self._backend, self.store, groups, self._calibration, budget)

    def judged(self, found: Outcome) -> Outcome:
        """What the search has made of the model that ships."""
        form = self._form
        return found if form is None or found.after == form.losses else replace(found, notes=found.notes + form.done)


class SimulationTarget(KernelTarget):
    """The float twin of a model, on any device: what is found there ships where the kernels find it no worse.

    Args:
        backend, kernels, form, calibration: as above.
        verdict: gives the losses that count.
    """

    def __init__(
        self,
        backend: Backend,
        kernels: SplitEvaluators,
        form: Baseline | None,
        calibration: Calibration,
        verdict: Verdict,
    ) -> None:
        super().__init__(backend, kernels, form, calibration)
        self._verdict = verdict
        simulated = SimulatedBackend(backend, calibration.config.device)
        self.store = self._simulated = simulated.checked(calibration.search.batches[0])
        search, holdout = (on_device(self._simulated, part) for part in (calibration.search, calibration.holdout))
        self._simulation = SplitEvaluators(self.store.model, replace(calibration, search=search, holdout=holdout))
        self._scorings.append(self._simulation)
        self._exact = is_exact(backend, verdict)
        # The other form that is searched, where what it ships as is not asked: the simulation says it, or it takes too
        # much of the seconds.
        self._unasked = form if verdict.dear or self._exact else None
        asks = form is not None and self._unasked is None
        # What is found must not be worse than this: what is searched, or what was given.
        self._before = check_losses(verdict.losses(self._kernels)) if asks else verdict.given

    @property
    def verdict_seconds(self) -> float:
        return self._verdict.seconds

    @property
    def scoring(self) -> SplitEvaluators:
        return self._simulation

    @property
    def given(self) -> Baseline | None:
        """The losses of the model that was given, where those of the simulation are like them; the state is that of the
        form that is searched."""
        if self._form is None or not self._exact:
            return None
        return replace(self._form, state=self.store.snapshot())

    def judged(self, found: Outcome) -> Outcome:
        report, known = self._confirmed(found), None if self._unasked else self._form
        return super().judged(report if known is None else known.judge(report, self._backend))

    def _confirmed(self, found: Outcome) -> Outcome:
        """Write what was found into the model, and keep it if what ships is no worse on both sets.

        Args:
            found: what the search on the twin reports.

        Returns:
            The report of what ships: before and after are its losses. Where they are worse, or no time is left to ask
            for them, the model has the scales from before again.
        """
        before, unasked = self._before, self._unasked
        told = (
            f"searched on the simulation, whose loss went from {number(found.before.search)} to "
            f"{number(found.after.search)}"
        )
        if not found.moves and unasked is None:
            return replace(found, before=before, after=before, notes=(*found.notes, told))
        back = self._backend.snapshot() if unasked is None else unasked.state
        self._simulated.commit()
        after = None if self._verdict.too_late else self._verdict.losses(self._kernels)
        if after is not None and not after.worse_than(before):
            status = found.status if found.moves else Status.IMPROVED
            notes = (*found.notes, told + "; the kernels confirm it")
            return replace(found, status=status, before=before, after=after, notes=notes)
        self._backend.restore_all(back)
        if after is not None and not any(point.kept for point in found.history[1:]):
            told += f"; the equal form that it began from is not kept: the kernels go from {_change(before, after)}"
            status = Status.UNCHANGED if found.status is Status.IMPROVED else found.status
            return replace(found, status=status, before=before, after=before, moves=(), notes=(*found.notes, told))
        if after is None:
            told += "; not kept, for no time was left to judge it"
        else:
            told += f"; rejected: on the kernels it went from {_change(before, after)}"
            if not self._backend.form.simulates_itself:
                told += "; the default score_on='kernels' searches there"
        return replace(found, status=Status.REJECTED, before=before, after=before, moves=(), notes=(*found.notes, told))


def verdict_of(backend: Backend, kernels: SplitEvaluators, calibration: Calibration, budget: Budget) -> Verdict:
    """The losses that count, of the model as it was given.

    Raises:
        ValueError: `accept_on` where the kernels that are searched accept.
    """
    accept_on, shipped = calibration.config.accept_on, None
    if accept_on is not None:
        if not _on_simulation(backend, calibration):
            raise ValueError("accept_on: a search on the kernels is accepted there; add score_on='simulation'")
        shipped = Shipped(backend.model, accept_on, calibration)
    return Verdict(shipped, kernels, budget, calibration.images * calibration.cost.kernel_seconds)


def is_exact(backend: Backend, verdict: Verdict) -> bool:
    """Whether a search on the simulation of a model finds the losses of what ships."""
    return backend.form.simulates_itself and verdict.shipped is None


def open_target(
    backend: Backend,
    kernels: SplitEvaluators,
    form: Baseline | None,
    calibration: Calibration,
    verdict: Verdict,
) -> KernelTarget:
    """Where this config searches this model; arguments as for `SimulationTarget`."""
    if _on_simulation(backend, calibration):
        return SimulationTarget(backend, kernels, form, calibration, verdict)
    return KernelTarget(backend, kernels, form, calibration)


def _on_simulation(backend: Backend, calibration: Calibration) -> bool:
    return calibration.config.score_on == "simulation" or backend.form.simulates_itself


def _change(before: Losses, after: Losses) -> str:
    """From which losses to which, in words."""
    told = f"{number(before.search)} to {number(after.search)}"
    if before.holdout and after.holdout:
        told += f", held-out {number(before.holdout)} to {number(after.holdout)}"
    return told
