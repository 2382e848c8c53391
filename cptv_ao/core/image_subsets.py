"""Which of the images that were read are searched on, which are held out, and a few of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cptv_ao.core.batches import Batch
from cptv_ao.core.errors import CalibrationDataError


@dataclass(frozen=True)
class Split:
    """Batches that the search sees, and batches that it never sees and that decide about acceptance."""

    search: tuple[Batch, ...]
    holdout: tuple[Batch, ...]

    @property
    def images(self) -> int:
        """Of both."""
        return sum(batch.images for batch in (*self.search, *self.holdout))


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
                "hold some out, for the model was exported for this number of images, or gives other outputs for "
                "fewer of them; give more batches, or export with a dynamic batch",
                0,
            )
        cut = only.images - max(1, round(only.images * fraction))
        return Split((only.rows(0, cut),), (only.rows(cut, only.images),))
    held = min(len(batches) - 1, max(1, round(len(batches) * fraction)))
    return Split(tuple(batches[:-held]), tuple(batches[-held:]))


def first_images(batches: Sequence[Batch], images: int) -> list[Batch]:
    """The first so many images, or a few more where a batch cannot be cut."""
    found: list[Batch] = []
    for batch in batches:
        if images <= 0:
            break
        found.append(batch.few(images))
        images -= found[-1].images
    return found


def spread_images(batches: Sequence[Batch], images: int, whole: bool = False) -> list[Batch]:
    """About so many images, of all batches alike, or of some of them that are spread over all; of two at least, where
    there are as many.

    Args:
        whole: take batches as they are.
    """
    total = sum(batch.images for batch in batches)
    if images >= total:
        return list(batches)
    whole = whole or any(batch.fixed for batch in batches)
    each = total // len(batches) if whole else max(2, images // len(batches))
    count = min(len(batches), max(2, round(images / each)))
    chosen = [batches[len(batches) * index // count] for index in range(count)]
    return chosen if whole else [batch.few(max(each, images // count)) for batch in chosen]
