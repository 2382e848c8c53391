"""Which inputs of a batch have a row for each image, and whether a batch may be cut: what a model's outputs tell.

{"position_ids": (1, L), "input_ids": (N, L)}: the output has N rows, so there are N images
{"mask": (L, L), "x": (N, L, D)}, L == N: the outputs for the halves of the rows of both are not those of the whole
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from cptv_ao.core.batches import Batch
from cptv_ao.core.distributed import ALONE, World
from cptv_ao.core.errors import CalibrationDataError, UnsupportedModelError
from cptv_ao.core.loader import unlike
from cptv_ao.core.nested import Path, mapped
from cptv_ao.core.output_tree import named_tensors
from cptv_ao.core.packed_outputs import HINT
from cptv_ao.core.tensors import first_floating
from cptv_ao.evaluation.float_runs import FloatRuns

_Output = Callable[[Batch, int], list[Tensor]]

# Images on which is tried whether a single input may be cut.
_FEW = 4
# Share of the largest output by which those of the same images may differ, in a batch and in a part of it: kernels add
# up in another order.
_SAME = 1e-3


def counted(
    batches: Sequence[Batch], teacher: FloatRuns, pick: Callable[[Any], Any] | None = None, world: World = ALONE
) -> list[Batch]:
    """The same batches, with the number of their images as it is, and cut no more where that would change outputs.

    Args:
        batches: as they were read.
        teacher: runs the float model, on a few images and their halves, and on whole batches where inputs have several
            numbers of rows.
        pick: what of its outputs is compared; None: all.
        world: the ranks that all do so.

    Raises:
        CalibrationDataError: the model does not accept a batch.
    """

    def output(batch: Batch, index: int) -> list[Tensor]:
        found = teacher(batch, index)
        found = found if pick is None else pick(found)
        if pick is None:
            first_floating(found)
        return [tensor for tensor in named_tensors(found).values() if tensor.is_floating_point()]

    each = [batch.sizes for batch in batches]
    rows = {path: tuple(sizes[path] for sizes in each) for path in each[0]}
    images = _images({sizes for sizes in rows.values() if all(sizes)}, batches, output)
    if images is None:  # no input has as many rows as the output: the least that there can be
        return [replace(batch, fixed=True) for batch in batches]
    shared = frozenset(path for path, sizes in rows.items() if sizes != images)
    found = [replace(batch, images=count, shared=shared) for batch, count in zip(batches, images, strict=True)]
    _check_shapes(found, output)
    per_image = 1 if all(batch.fixed for batch in found) else _per_image(found, output)
    if per_image == 0:
        _check_batched(found, output)
    if world.most(float(per_image == 0))[0]:
        return [replace(batch, fixed=True) for batch in found]
    return [replace(batch, per_image=per_image) for batch in found]


def _check_shapes(batches: Sequence[Batch], output: _Output) -> None:
    """Refuse batches whose images are of another shape than those of the first, where the model does not take both."""
    seen = {_shapes(batches[0])}
    for index, batch in enumerate(batches):
        if _shapes(batch) in seen:
            continue
        seen.add(_shapes(batch))
        try:
            output(batch.few(1), index)
        except CalibrationDataError:  # of one image, at least
            try:
                output(batch, index)
            except CalibrationDataError as error:
                raise CalibrationDataError(_unlike(batches[0], batch, index, error), index) from error


def _shapes(batch: Batch) -> tuple[Any, ...]:
    """Those of its inputs, without how many images there are."""
    return tuple(t.shape if path in batch.shared else t.shape[1:] for path, t in batch.tensors.items())


def _unlike(first: Batch, batch: Batch, index: int, error: CalibrationDataError) -> str:
    path = next(path for path, t in batch.tensors.items() if t.shape[1:] != first.tensors[path].shape[1:])
    return (
        f"{unlike(first.tensors[path], batch.tensors[path], index)}, which the model does not take: {error.__cause__}"
    )


def _images(candidates: set[tuple[int, ...]], batches: Sequence[Batch], output: _Output) -> tuple[int, ...] | None:
    """The numbers of rows, by batch, that are those of the outputs, or the largest that these are multiples of."""
    left = sorted(candidates)
    while len(left) > 1:
        index = next(i for i, sizes in enumerate(zip(*left, strict=True)) if len(set(sizes)) > 1)
        counts = [len(tensor) for tensor in output(batches[index], index) if tensor.dim() and len(tensor)]
        divisors = [[sizes[index] for sizes in left if count % sizes[index] == 0] for count in counts]
        most = max(next(filter(None, divisors), [0]))
        left = [sizes for sizes in left if sizes[index] == most]
    return left[0] if left else None


def _per_image(batches: Sequence[Batch], output: _Output) -> int:
    """How many rows of the output each image has; 0 where those of its halves are not those of the batch."""
    index = next((i for i, batch in enumerate(batches) if batch.images > 1), None)
    if index is None:
        return 1
    whole = batches[index]
    batch = whole.few(_FEW) if len(whole.sizes) == 1 else whole
    middle = batch.images // 2
    try:
        got = output(batch, index)
        halves = [output(batch.rows(*ends), index) for ends in ((0, middle), (middle, batch.images))]
    except CalibrationDataError:  # the model says that this is no input
        output(whole, index)  # its error, if it does not take the whole batch
        return 0
    if any(len(half) != len(got) for half in halves):
        raise UnsupportedModelError(
            f"expected as many outputs for any number of images, got {len(got)} for {batch.images} of them and "
            f"{len(halves[0])} for {middle}; {HINT}"
        )
    if not any(tensor.dim() for tensor in got) or not all(bool(torch.isfinite(tensor).all()) for tensor in got):
        return 1  # which is told where the outputs are used
    found = [_rows(own, parts, batch) for own, *parts in zip(got, *halves, strict=True) if own.dim()]
    with_rows = [rows for rows in found if rows is not None]
    return min(with_rows) if with_rows else 0


def _rows(got: Tensor, halves: Sequence[Tensor], batch: Batch) -> int | None:
    """How many rows of an output each image has; 0 where they depend on the other images, None where it has none."""
    middle = batch.images // 2
    rows = len(got) // batch.images
    fits = rows > 0 and [len(half) for half in halves] == [rows * middle, len(got) - rows * middle]
    if not fits or any(half.shape[1:] != got.shape[1:] for half in halves):
        return None
    return rows if _near(torch.cat(list(halves)), got) else 0


def _check_batched(batches: Sequence[Batch], output: _Output) -> None:
    """Refuse single images without a batch dimension, where a model takes them: a layer of (..., C) does."""
    index = next(i for i, batch in enumerate(batches) if batch.images > 1)
    batch = batches[index]
    got, *others = output(batch, index)
    if len(batch.tensors) > 1 or others or len(got) % batch.images == 0:
        return

    def one(_: Path, value: Any) -> Any:
        return value.unsqueeze(0) if isinstance(value, Tensor) else value

    try:
        alone = output(replace(batch, args=mapped(batch.args, one), kwargs=mapped(batch.kwargs, one)), index)
    except CalibrationDataError:
        return
    first = alone[0] if alone else got
    if len(first) == 1 and first[0].shape == got.shape and _near(first[0], got):
        (tensor,) = batch.tensors.values()
        raise CalibrationDataError(
            f"calib_loader, batch {index}: expected a batch dimension, got an input of shape {tuple(tensor.shape)}, "
            f"for which the model's output is of shape {tuple(got.shape)}, with no row for each image; give "
            "batches (N, ...), of one image.unsqueeze(0)",
            index,
        )


def _near(found: Tensor, wanted: Tensor) -> bool:
    if not wanted.numel():
        return True
    share = max(_SAME, 8 * torch.finfo(wanted.dtype).eps) if wanted.is_floating_point() else 0.0
    return float((found.double() - wanted.double()).abs().max()) <= share * float(wanted.double().abs().max())
