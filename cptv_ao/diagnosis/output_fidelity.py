"""How near the outputs of a quantized model are to those of the float one, each by itself."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from cptv_ao.core.config import RefineConfig
from cptv_ao.core.losses import get_exact_loss
from cptv_ao.core.output_losses import OutputLosses
from cptv_ao.core.output_tree import WHOLE
from cptv_ao.diagnosis.meters import Fidelity
from cptv_ao.diagnosis.results import OutputDiagnosis
from cptv_ao.evaluation.calibration import Images
from cptv_ao.evaluation.compared_outputs import OneOutput


def output_diagnoses(outputs: Sequence[Tensor], images: Images, config: RefineConfig) -> tuple[OutputDiagnosis, ...]:
    """Of each output that is compared.

    Args:
        outputs: of the quantized model, as the loss is given them, by batch.
        images: with those of the teacher.
        config: with the loss that is used.
    """
    joint, pairs = config.loss, list(zip(outputs, images.targets, strict=True))
    if not isinstance(joint, OutputLosses):
        loss = get_exact_loss(config.loss, config.temperature)
        values = [float(loss(got, wanted)) for got, wanted in pairs]
        name = config.select.name if isinstance(config.select, OneOutput) else WHOLE
        return (_of(name, config.loss_name, _mean(values, images), pairs),)
    table = torch.stack([joint.each(got, wanted) for got, wanted in pairs])
    found, counted = [], 0
    for index, term in enumerate(joint.parts):
        if term is None:
            continue
        columns = [joint.packing.columns(got)[index] for got, _ in pairs]
        own = [tuple(term.view(c, side) for side in pair) for c, pair in zip(columns, pairs, strict=True)]
        found.append(_of(term.name, term.loss_name, _mean(table[:, counted].tolist(), images), own))
        counted += 1
    return tuple(found)


def _of(name: str, loss: str, value: float, pairs: Sequence[tuple[Tensor, ...]]) -> OutputDiagnosis:
    fidelity = Fidelity()
    for got, wanted in pairs:
        fidelity.add(got, wanted)
    agreement = None
    if pairs[0][0].shape[1] > 1:
        same = [got.argmax(1) == wanted.argmax(1) for got, wanted in pairs]
        agreement = float(torch.cat(same).double().mean())
    return OutputDiagnosis(name, loss, value, fidelity.sqnr, agreement)


def _mean(values: Iterable[float], images: Images) -> float:
    return sum(v * b.images for v, b in zip(values, images.batches, strict=True)) / images.count
