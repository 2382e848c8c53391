"""How near the outputs of a quantized model are to those of the float one, each by itself."""

from __future__ import annotations

from collections.abc import Sequence

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
        return (_of(name, config.loss_name, values, images, pairs),)
    table = torch.stack([joint.each(got, wanted) for got, wanted in pairs])
    counted = [(index, term) for index, term in enumerate(joint.parts) if term is not None]
    found = []
    for (index, term), values in zip(counted, table.T.tolist(), strict=True):
        columns = [joint.packing.columns(got)[index] for got, _ in pairs]
        own = [tuple(term.view(c, side) for side in pair) for c, pair in zip(columns, pairs, strict=True)]
        found.append(_of(term.name, term.loss_name, values, images, own))
    return tuple(found)


def _of(
    name: str, loss: str, values: Sequence[float], images: Images, pairs: Sequence[tuple[Tensor, ...]]
) -> OutputDiagnosis:
    value = images.mean(lambda index, _, __: values[index])
    fidelity = Fidelity()
    for got, wanted in pairs:
        fidelity.add(got, wanted)
    agreement = None
    if pairs[0][0].shape[1] > 1:
        same = [got.argmax(1) == wanted.argmax(1) for got, wanted in pairs]
        agreement = float(torch.cat(same).double().mean())
    return OutputDiagnosis(name, loss, value, fidelity.sqnr, agreement)
