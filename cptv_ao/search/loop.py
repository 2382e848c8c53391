"""The search loop: proposals for the whole model, then passes over the blocks; keeps the best state seen."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from functools import partial
from typing import Any

import numpy as np
import torch

from cptv_ao.backends.protocol import ScaleStore
from cptv_ao.core.config import RefineConfig
from cptv_ao.core.distributed import World
from cptv_ao.core.events import STOP, Callback, Event
from cptv_ao.core.formatting import number
from cptv_ao.core.losses import is_known
from cptv_ao.core.outcome import BlockResult, Status
from cptv_ao.core.qparams import Assignment
from cptv_ao.evaluation.scoring import SplitEvaluators
from cptv_ao.search.baseline import Baseline
from cptv_ao.search.best_so_far import BestSoFar, with_held_out
from cptv_ao.search.budget import Budget
from cptv_ao.search.proposals.initial_scales import Meanwhile, Proposal
from cptv_ao.search.scale_space import Beside, ScaleSpace
from cptv_ao.search.search_space import SearchSpace
from cptv_ao.search.state import Position, Record, SearchLosses, SearchState
from cptv_ao.search.strategies import make_strategy
from cptv_ao.search.strategies.protocol import Individual, Vector


class Loop:
    """Searches the scales of one model; leaves the best accepted state in it, see `BestSoFar`.

    Args:
        space: what is searched.
        scoring: gives the losses of what is in the model.
        config: how it is searched.
        budget: how long; counts the evaluations.
        listeners: told of each step.
        given: the model that was given, where the search starts from another form of it.
    """

    def __init__(
        self,
        space: SearchSpace,
        scoring: SplitEvaluators,
        config: RefineConfig,
        budget: Budget,
        listeners: Sequence[Callback] = (),
        given: Baseline | None = None,
    ) -> None:
        self.space, self._store, self._world = space, space.store, budget.world
        self._search, self._scoring = scoring.search, scoring
        self._config, self._listeners = config, tuple(listeners)
        self._evolves = config.search == "evolution"
        self._rng: np.random.Generator = np.random.default_rng(config.seed)
        self._step_sizes: dict[str, dict[str, float]] = {}
        self.budget = budget
        self.results: list[BlockResult] = []
        self.stages: list[str] = []
        self.loss = self._search.score()
        self._search.keep()
        # Where the search starts: the model that was given, or an equivalent one.
        self._first_state = self._store.snapshot()
        start = with_held_out(self.loss, scoring.holdout) if given is None else given.losses
        given_state = self._first_state if given is None else given.state
        self.best = BestSoFar(self._store, scoring.holdout, budget, start, given_state)
        self._position = Position()
        self._equalized = self.best.offer(self.loss) if given is not None else None

    def state(self) -> SearchState:
        """Where it is, less the descent."""
        now = self.space.moved_since(self._first_state)
        best = self.best.measured(lambda: self.space.moved_since(self._first_state))
        record = Record(
            position=self._position,
            losses=SearchLosses(self.best.start, self.best.losses, self.loss),
            rejected=self.best.rejected,
            step_sizes=deepcopy(self._step_sizes),
            evaluations=self.budget.evaluations,
            seconds=self.budget.seconds,
            results=tuple(self.results),
            stages=tuple(self.stages),
            history=tuple(self.best.history),
            raced=self._search.raced,
        )
        return SearchState(record, dict(self._rng.bit_generator.state), now, best)

    def resume(self, state: SearchState) -> None:
        """Go to where `state` says, see `cptv_ao.search.state.Resumable`."""
        record, best = state.record, None
        if state.best is not None:
            self.space.write(state.best)
            best = self._store.snapshot()
            self._store.restore_all(self._first_state)
        self.space.write(state.now)
        self.best.resume(best, record.history, record.rejected)
        self._rng.bit_generator.state = state.random
        self._position, self._step_sizes = record.position, deepcopy(record.step_sizes)
        self.results, self.stages = list(record.results), list(record.stages)
        self.budget.go_on_from(record.evaluations, record.seconds)
        self._search.go_on_from(record.raced)

    def score_again(self) -> SearchLosses:
        """Find the losses of the scales that `resume` has brought back; all ranks together."""
        self.best.score_again(self._search)
        self.loss = self._search.score()
        self._search.keep()
        return SearchLosses(self.best.start, self.best.losses, self.loss)

    def begin(self) -> None:
        """Tell of the form that the search starts from, where that is another than the given one."""
        if self._equalized is not None:
            told = _became(self.loss < self.best.start.search, self._equalized)
            where = "" if self._equalized else ", the search starts there"
            self.stages.append(f"equal forms: {told}{where}, {_told(self.loss)}")
            self._tell("proposal", "equal forms", 0, self.loss)

    def propose(self, proposals: Iterable[Proposal], meanwhile: Meanwhile | None = None) -> bool:
        """Score scales for the whole model; go on from the best of them if it is better than what is there.

        Args:
            meanwhile: called while each is scored, if that may be so.

        Returns:
            Whether all of them were scored.
        """
        whole = self.space.whole
        for name, scales in proposals:
            if not self.budget.may_score:
                return False
            whole.refresh()
            assignment = scales()
            proposed = whole.repair(whole.from_assignment(assignment))
            proposed = self._world.from_first(torch.from_numpy(proposed)).numpy()
            whole.write(proposed, _beside(self._store, assignment, self._world))
            score = partial(self._score, proposed, self.loss)
            loss = score() if meanwhile is None or self._world.size > 1 else _scored_meanwhile(score, meanwhile)
            better = loss < self.loss
            if better:
                self.loss = loss
                self._search.keep()
            else:
                whole.undo()
            self._tell("proposal", name, 0, loss)
            kept = self.best.offer(self.loss)
            self.stages.append(f"{name}: {_became(better, kept)}, {_told(loss)}")
        return True

    def step(self, loss: float) -> None:
        """Tell the listeners of a step of the descent."""
        self._tell("step", "gradient", 0, loss)

    def run(self, on_block: Callable[[], None]) -> None:
        """Visit every block in every pass, then leave the best state in the model; `on_block` is called after each."""
        order = list(self.space.blocks.items())
        if self._config.block_order == "backward":
            order.reverse()
        self._search.plan(space.nodes for space in self.space.blocks.values())
        for pass_index in range(self._position.passes, self._config.passes):
            for index in range(self._position.blocks, len(order)):
                if not self.budget.left or self._gives_up:
                    break
                evaluations = self._visit(*order[index], pass_index)
                at, gained = self._position, self.best.offer(self.loss)
                idle = 0 if gained else at.idle + evaluations * self._search.images
                self._position = Position(pass_index, index + 1, gained or at.gained, idle)
                on_block()
            self._tell("pass", f"pass {pass_index + 1}", pass_index, self.loss)
            if not self.budget.left or self._gives_up:
                break
            if self._evolves and not self._position.gained:
                break  # a whole pass gained nothing that the held-out images confirm
            self._position = Position(pass_index + 1, idle=self._position.idle)
        self.best.restore()

    @property
    def _gives_up(self) -> bool:
        """Whether the visits have cost too much since they last gained something, or in all; behind gradient steps, or
        would with another one."""
        visited = sum(result.evaluations for result in self.results)
        ahead = self._config.evaluations if self._config.gradient_steps else 0
        dear = (visited + ahead) * self._search.images > self._scoring.visit_images
        return self._evolves and (dear or self._position.idle >= self._scoring.idle_images)

    def _visit(self, name: str, space: ScaleSpace, pass_index: int) -> int:
        """One visit: the strategy proposes, the kernels decide; the best scales stay in the model.

        Returns:
            The number of evaluations.
        """
        space.refresh()
        self._search.enter(space.nodes)
        before = self.loss
        strategy = make_strategy(
            self._config.search,
            space.layout,
            Individual(space.vector, before),
            self._rng,
            evaluations=self._config.evaluations,
            epsilon=self._config.epsilon,
            steps=self._step_sizes.setdefault(name, {}),
        )
        count = accepted = 0
        best = before
        while not strategy.done and self.budget.left:
            vector = space.repair(strategy.ask())
            space.write(vector)
            loss = self._score(vector, strategy.threshold, strategy.races)
            count += 1
            if loss < best:
                best = loss
                accepted += 1
                self._search.keep()
            strategy.tell(vector, loss)
            self._tell("candidate", name, pass_index, loss, best)
        winner = strategy.best()
        if winner.loss < before:
            space.write(winner.vector)
            self.loss = winner.loss
        else:
            space.write(space.base)
        self._search.leave()
        self.results.append(BlockResult(name, pass_index, count, accepted, before, self.loss))
        self._tell("block", name, pass_index, self.loss)
        return count

    def _score(self, vector: Vector, threshold: float, race: bool = False) -> float:
        """The loss of what was just written; inf where it is rejected or no number."""
        self.budget.count()
        # Nothing says that a loss of the user's own is never negative: it is always scored in full.
        named = is_known(self._config.loss)
        races = race and named and self._config.racing
        loss = self._search.score(threshold if named else math.inf, races, vector.tobytes())
        return loss if math.isfinite(loss) else math.inf

    def _tell(self, kind: Any, name: str, pass_index: int, loss: float, best: float | None = None) -> None:
        lowest = self.loss if best is None else best
        budget, model = self.budget, self._store.model
        event = Event(kind, name, pass_index, budget.evaluations, loss, lowest, budget.seconds, model)
        for listener in self._listeners:
            if listener(event) is STOP:
                budget.stop(Status.CALLBACK)


def _scored_meanwhile(score: Callable[[], float], meanwhile: Meanwhile) -> float:
    """What `score` gives, with `meanwhile` beside it."""
    with ThreadPoolExecutor(1) as judge:  # it ends before anything is written again, whatever goes wrong meanwhile
        judged = judge.submit(score)
        meanwhile(judged.done)
        return judged.result()


def _beside(store: ScaleStore, assignment: Assignment, world: World) -> dict[str, Beside]:
    """What weights of an assignment, or those in the model, have beside their scales, from rank 0."""
    found: dict[str, Beside] = {}
    for name, qparams in assignment.items():
        now, parts = store.read(name), (qparams.shift, qparams.correction)
        if any(part is not None for part in (*parts, now.shift, now.correction)):
            shift, correction = (None if part is None else world.from_first(part) for part in parts)
            found[name] = shift, correction
    return found


def _became(better: bool, kept: bool) -> str:
    """Of a proposal; the search goes on from what is better on its images, the model gets what is kept."""
    if not better:
        return "not better"
    return "accepted" if kept else "better on the search images, not on all"


def _told(loss: float) -> str:
    return f"loss {number(loss)}" if math.isfinite(loss) else "loss above the best"
