"""A search from its start, or from where it was saved, to its end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property

from cptv_ao.evaluation.cost import Seconds
from cptv_ao.search.checkpoint import Checkpoint
from cptv_ao.search.loop import Loop
from cptv_ao.search.proposals.proposer import Proposer
from cptv_ao.search.state import SearchLosses, SearchState


class Search:
    """Proposals for the whole model, then the block visits of the loop; saved on the way.

    Args:
        loop: scores, and keeps what is best.
        make_proposer: gives what is proposed, once that is asked for; None: nothing.
        checkpoint: where it is saved, and gone on from; None: nowhere.
        image_seconds: see `SearchState`.
    """

    def __init__(
        self,
        loop: Loop,
        make_proposer: Callable[[], Proposer | None],
        checkpoint: Checkpoint | None,
        image_seconds: Seconds = (0.0, 0.0),
    ) -> None:
        self._loop, self._make_proposer, self._checkpoint = loop, make_proposer, checkpoint
        self._image_seconds = image_seconds

    @cached_property
    def proposer(self) -> Proposer | None:
        """What is proposed; it is made behind the first gain, where there is one without it."""
        return self._make_proposer()

    @property
    def image_forwards(self) -> int:
        """Images run through the twin for proposals so far by this rank; forward and backward count as three."""
        made: Proposer | None = vars(self).get("proposer")
        return 0 if made is None else made.image_forwards

    def run(self) -> None:
        """Leave the best scales in the model.

        Raises:
            ScalesFileError: what the checkpoint holds is not the state of this search.
            OSError: the checkpoint cannot be written.
        """
        found = None if self._checkpoint is None else self._checkpoint.resume(self)
        loop = self._loop
        if found is None:
            loop.begin()
        if loop.budget.left:  # else nothing is made that nobody asks
            self._propose(found)
        loop.run(self._save)

    def _propose(self, found: SearchState | None) -> None:
        """Score what is proposed, or what is left of that in a state that was saved."""
        loop, proposer = self._loop, self.proposer
        if found is None or (found.descent is not None and proposer is not None):
            proposals = () if proposer is None else proposer.proposals(loop.step, self._pause)
            if loop.propose(proposals, None if proposer is None else proposer.beside_the_judge(loop.step)):
                self._save()

    def state(self) -> SearchState:
        """Where it is."""
        descent = None if self.proposer is None else self.proposer.state()
        return replace(self._loop.state(), descent=descent, image_seconds=self._image_seconds)

    def resume(self, state: SearchState) -> None:
        """Go to where it was, see `cptv_ao.search.state.Resumable`."""
        self._loop.resume(state)
        if state.descent is not None and self.proposer is not None:
            self.proposer.resume(state.descent)

    def score_again(self) -> SearchLosses:
        """Of the scales that `resume` has brought back."""
        return self._loop.score_again()

    def _save(self) -> None:
        if self._checkpoint is not None:
            self._checkpoint.save(self)

    def _pause(self, worth: bool) -> None:
        """Between two steps of the descent."""
        if self._checkpoint is not None and (worth or self._checkpoint.due):
            self._checkpoint.save(self)
