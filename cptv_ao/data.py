"""Reading the calibration loader once, and splitting it into search and held-out images."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from cptv_ao.errors import CalibrationDataError


@dataclass(frozen=True)
class Batch:
    """The inputs of one forward call: positional tensors, or keyword inputs.

    `fixed`: the model takes this number of images and no other (a graph that was exported without a dynamic batch), or
    what it gives for an image depends on the others.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    images: int
    fixed: bool = False

    def rows(self, start: int, stop: int) -> Batch:
        """The images start..stop of this batch."""
        cut = {k: _cut(v, start, stop, self.images) for k, v in self.kwargs.items()}
        return Batch(tuple(_cut(a, start, stop, self.images) for a in self.args), cut, stop - start, self.fixed)

    def few(self, count: int) -> Batch:
        """At most so many images, or all of them where the number is fixed."""
        return self if self.fixed else self.rows(0, min(count, self.images))

    def parts(self, count: int) -> list[slice]:
        """Rows of about so many parts of equal size; one part where the number of images is fixed."""
        count = 1 if self.fixed else min(self.images, max(1, count))
        return [slice(*rows) for rows in pairwise(self.images * i // count for i in range(count + 1))]


@dataclass(frozen=True)
class Split:
    """Batches that the search sees, and batches that it never sees and that decide about acceptance."""

    search: tuple[Batch, ...]
    holdout: tuple[Batch, ...]


def read_batches(loader: Iterable[Any], fixed: bool = False, limit: float = math.inf) -> list[Batch]:
    """Read the loader once: tensors, tuples or lists whose first item is the input, or dicts of keyword inputs.

    Labels (further items of a tuple) are never looked at.

    Args:
        fixed: see `Batch`.
        limit: stop once so many images are there; the batch that reaches it is read whole.

    Raises:
        CalibrationDataError: empty, of another type, of changing shape, or not finite; names the batch.
    """
    if isinstance(loader, (Tensor, str, bytes, Mapping)) or not isinstance(loader, Iterable):
        hint = "; wrap it in a list: [images]" if isinstance(loader, Tensor) else ""
        raise CalibrationDataError(f"calib_loader: expected an iterable of batches, got {type(loader).__name__}{hint}")
    batches: list[Batch] = []
    for index, item in enumerate(loader):
        batch = replace(_batch(item, index), fixed=fixed)
        if batches:
            _check_shape(batches[0], batch, index)
        batches.append(batch)
        if sum(batch.images for batch in batches) >= limit:
            break
    if not batches:
        raise CalibrationDataError("calib_loader: expected at least one batch, got an empty iterable")
    return batches


def split_batches(batches: list[Batch], fraction: float) -> Split:
    """Hold out the last `fraction` of the batches (at least one); of a single batch, of its images.

    Raises:
        CalibrationDataError: a single batch of a single image cannot be split.
    """
    if fraction == 0.0:
        return Split(tuple(batches), ())
    if len(batches) == 1:
        only = batches[0]
        if only.images < 2:
            raise CalibrationDataError(
                "calib_loader: expected at least 2 images, got 1; one part is held out to accept or reject the "
                "result (RefineConfig(holdout=0) searches without that check)",
                0,
            )
        if only.fixed:
            raise CalibrationDataError(
                f"calib_loader: expected at least 2 batches, got 1 of {only.images} images, which cannot be cut to "
                "hold some out, for the model was exported for this number of images; give more batches, or export "
                "with a dynamic batch",
                0,
            )
        cut = only.images - max(1, round(only.images * fraction))
        return Split((only.rows(0, cut),), (only.rows(cut, only.images),))
    held = min(len(batches) - 1, max(1, round(len(batches) * fraction)))
    return Split(tuple(batches[:-held]), tuple(batches[-held:]))


def _batch(item: Any, index: int) -> Batch:
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if isinstance(item, Mapping):
        kwargs = dict(item)
        tensors = [v for v in kwargs.values() if isinstance(v, Tensor)]
    else:
        first = item[0] if isinstance(item, (list, tuple)) and item else item
        args = (first,)
        tensors = [first] if isinstance(first, Tensor) else []
    if not tensors:
        raise CalibrationDataError(
            f"calib_loader, batch {index}: expected a tensor, a tuple whose first item is the input tensor, or a dict "
            f"of keyword inputs, got {type(item).__name__}",
            index,
        )
    if tensors[0].dim() == 0 or tensors[0].shape[0] == 0:
        raise CalibrationDataError(
            f"calib_loader, batch {index}: expected a batch dimension with at least one image, "
            f"got a tensor of shape {tuple(tensors[0].shape)}",
            index,
        )
    for tensor in tensors:
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise CalibrationDataError(
                f"calib_loader, batch {index}: the input holds NaN or inf; clean the calibration data", index
            )
    # The caller may reuse its buffers for the next batch, and a model may work in place on its input.
    return Batch(tuple(_own(a) for a in args), {k: _own(v) for k, v in kwargs.items()}, int(tensors[0].shape[0]))


def _check_shape(first: Batch, batch: Batch, index: int) -> None:
    if len(first.args) != len(batch.args) or first.kwargs.keys() != batch.kwargs.keys():
        raise CalibrationDataError(f"calib_loader, batch {index}: its inputs differ from those of batch 0", index)
    pairs: list[tuple[Any, Any]] = list(zip(first.args, batch.args, strict=True))
    pairs += [(first.kwargs[k], batch.kwargs[k]) for k in first.kwargs]
    for a, b in pairs:
        if isinstance(a, Tensor) and isinstance(b, Tensor) and (a.shape[1:] != b.shape[1:] or a.dtype != b.dtype):
            raise CalibrationDataError(
                f"calib_loader, batch {index}: expected images of shape {tuple(a.shape[1:])} and {a.dtype} as in "
                f"batch 0, got {tuple(b.shape[1:])} and {b.dtype}",
                index,
            )


def _own(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def _cut(value: Any, start: int, stop: int, images: int) -> Any:
    whole = isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == images
    return value[start:stop] if whole else value
