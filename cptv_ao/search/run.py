"""A search from its start, or from where it was saved, to its end."""

from __future__ import annotations

from dataclasses import replace

from cptv_ao.evaluation.cost import Seconds
from cptv_ao.search.checkpoint import Checkpoint
from cptv_ao.search.loop import Loop
from cptv_ao.search.proposals.proposer import Proposer
from cptv_ao.search.state import SearchLosses, SearchState


class Search:
    """Proposals for the whole model, then the block visits of the loop; saved on the way.

    Args:
        loop: scores, and keeps what is best.
        proposer: what is proposed; None: nothing.
        checkpoint: where it is saved, and gone on from; None: nowhere.
        image_seconds: see `SearchState`.
    """

    def __init__(
        self, loop: Loop, proposer: Proposer | None, checkpoint: Checkpoint | None, image_seconds: Seconds = (0.0, 0.0)
    ) -> None:
        self._loop, self._proposer, self._checkpoint = loop, proposer, checkpoint
        self._image_seconds = image_seconds

    def run(self) -> None:
        """Leave the best scales in the model.

        Raises:
            ScalesFileError: what the checkpoint holds is not the state of this search.
            OSError: the checkpoint cannot be written.
        """
        found = None if self._checkpoint is None else self._checkpoint.resume(self)
        loop, proposer = self._loop, self._proposer
        if found is None:
            loop.begin()
        if found is None or (found.descent is not None and proposer is not None):
            proposals = () if proposer is None else proposer.proposals(loop.step, self._pause)
            if loop.propose(proposals, None if proposer is None else proposer.beside_the_judge(loop.step)):
                self._save()
        loop.run(self._save)

    def state(self) -> SearchState:
        """Where it is."""
        descent = None if self._proposer is None else self._proposer.state()
        return replace(self._loop.state(), descent=descent, image_seconds=self._image_seconds)

    def resume(self, state: SearchState) -> None:
        """Go to where it was, see `cptv_ao.search.state.Resumable`."""
        self._loop.resume(state)
        if state.descent is not None and self._proposer is not None:
            self._proposer.resume(state.descent)

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
