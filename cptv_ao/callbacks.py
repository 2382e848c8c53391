"""Callbacks for `refine` that work as they stand: logs, TensorBoard, and an early stop on a metric of your own.

    from cptv_ao.callbacks import EarlyStop, Log, chain

    stop = EarlyStop(lambda model: accuracy(model, images, labels), patience=4)
    cptv_ao.refine(quantized, calib_loader, float_model=model, callback=chain(Log("search.jsonl"), stop))

A callback is any function of an `Event`. It watches: what it can decide is to end the search, by returning
`cptv_ao.STOP`. Which scales are kept is decided by the calibration images alone.
"""

from __future__ import annotations

import csv
import json
import math
import os
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, TextIO

from torch.fx import GraphModule

from cptv_ao.core.atomic_file import straight
from cptv_ao.core.events import STOP, Callback, Event

_COLUMNS = ("kind", "name", "pass_index", "evaluations", "loss", "best", "seconds")


def chain(*callbacks: Callback) -> Callback:
    """One callback that calls several, in order; it asks to stop where one of them does."""

    def call(event: Event) -> Any:
        answers = [callback(event) for callback in callbacks]
        return STOP if any(answer is STOP for answer in answers) else None

    return call


class Log:
    """Writes one line per event into a file, at once: CSV where its name ends in `.csv`, else JSON lines.

    Columns are those of `Event` but its model: kind, name, pass_index (0 is the first), evaluations, loss, best (losses
    on the search images), seconds. A loss that is not finite (a candidate that was rejected early) is null in JSON and
    empty in CSV.

    Args:
        path: of the file, which is written anew; or of a FIFO, a terminal or this process's own output
            (`/dev/stdout`), which take the lines as they come.
        append: go on at the end of the file instead, for a search that goes on from a checkpoint.

    Raises:
        OSError: the file cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str], *, append: bool = False) -> None:
        self._path = Path(path)
        self._csv = self._path.suffix.lower() == ".csv"
        self._held = straight(path)  # who reads from a FIFO takes a close for the end
        if self._held is not None:
            weakref.finalize(self, self._held.close)
            self._begin(self._held)
            return
        with open(self._path, "a" if append else "w", encoding="utf-8", newline="") as file:
            if file.tell() == 0:
                self._begin(file)

    def __call__(self, event: Event) -> None:
        row = {name: _finite(getattr(event, name)) for name in _COLUMNS}
        with self._opened() as file:
            if self._csv:
                csv.writer(file).writerow(row.values())
            else:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()

    def _opened(self) -> AbstractContextManager[TextIO]:
        """A file anew for each line: nothing to close, and a search that is killed has lost nothing."""
        if self._held is not None:
            return nullcontext(self._held)
        return open(self._path, "a", encoding="utf-8", newline="")

    def _begin(self, file: TextIO) -> None:
        if self._csv:
            csv.writer(file).writerow(_COLUMNS)
            file.flush()


class TensorBoard:
    """Gives the losses to a `torch.utils.tensorboard.SummaryWriter`, or to what else has its `add_scalar`.

    `refine/best` is the lowest loss on the search images so far and `refine/candidate` that of each candidate which was
    scored in full, both over evaluations; `refine/descent` is the loss of each step of the gradient descent, over
    steps.

    Args:
        writer: it stays yours: close it when `refine` has returned.
    """

    def __init__(self, writer: Any) -> None:
        self._writer = writer
        self._steps = 0

    def __call__(self, event: Event) -> None:
        if event.kind == "step":
            self._steps += 1
            self._add("refine/descent", event.loss, self._steps)
            return
        if event.kind in ("candidate", "proposal"):
            self._add("refine/candidate", event.loss, event.evaluations)
        self._add("refine/best", event.best, event.evaluations)

    def _add(self, tag: str, value: float, at: int) -> None:
        if math.isfinite(value):
            self._writer.add_scalar(tag, value, at)


class EarlyStop:
    """Ends the search once a metric of your own has not become better for a while.

    It cannot select: the model ends with the scales that are best on the calibration images, not with those at which
    the metric was best. All that the images of a metric decide is when the search ends.

    Args:
        metric: `(model) -> float`, asked after each proposal and each block visit. It is given the model that is
            searched, on the device where it is: the one that `refine` was given, or its simulation with
            `score_on="simulation"` and for PT2E graphs, or the lowered copy of a reference model. Run it, never write
            it.
        patience: looks in a row that are not better than the best before them until the search is ended.
        higher: whether larger values are better; False for a loss.

    Attributes:
        values: what the metric was: pairs of evaluations and value.

    Raises:
        ValueError: patience is below 1.
    """

    def __init__(self, metric: Callable[[GraphModule], float], *, patience: int = 5, higher: bool = True) -> None:
        if patience < 1:
            raise ValueError(f"EarlyStop: expected a patience of at least 1 look, got {patience}")
        self._metric, self._patience, self._sign = metric, patience, 1.0 if higher else -1.0
        self._best, self._worse = -math.inf, 0
        self.values: list[tuple[int, float]] = []

    def __call__(self, event: Event) -> Any:
        if event.kind not in ("proposal", "block"):
            return None
        value = float(self._metric(event.model))
        self.values.append((event.evaluations, value))
        if self._sign * value > self._best:  # never true of NaN
            self._best, self._worse = self._sign * value, 0
        else:
            self._worse += 1
        return STOP if self._worse >= self._patience else None


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
