"""A loss and blocks of your own.

    python examples/custom.py

Here only the decision between the two likeliest classes counts, so the loss compares nothing else; and attention and
MLP are searched apart from each other rather than together as a transformer block. The digits ViT at 2-bit weights is
refined so, and with the defaults for as many seconds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from workloads import digits, options, quantize, shown, trained

import cptv_ao


def margin(candidate: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error of the margin between the two classes that the teacher finds likeliest.

    A loss takes two tensors (N, C) and returns a scalar that is never negative; the mean over the images, since the
    losses of batches are averaged by their size. It must be differentiable, or `gradient_steps` be 0.
    """
    top = teacher.topk(2, dim=1).indices
    wanted, found = teacher.gather(1, top), candidate.gather(1, top)
    return ((found[:, 0] - found[:, 1]) - (wanted[:, 0] - wanted[:, 1])).square().mean()


def halves(sites: Sequence[cptv_ao.ScaleSite]) -> Mapping[str, str]:
    """The default blocks, those of the transformer cut into attention and MLP: a name for every site, in graph order.

    What the two halves are computed from (norms, sums) belongs to the half before.
    """
    names = dict(cptv_ao.blocks_by_path(sites))
    half: dict[str, str] = {}
    for site in sites:
        block = names[site.name]
        if ".attn" in site.scope or ".mlp" in site.scope:
            half[block] = "attn" if ".attn" in site.scope else "mlp"
        if block.startswith("blocks."):
            names[site.name] = f"{block}.{half.get(block, 'attn')}"
    return names


def main() -> None:
    args = options(__doc__, seconds=30).parse_args()
    torch.set_num_threads(args.threads)
    data, model = digits(), trained("digits_vit")
    calibration = data.calibration(900, seed=0).split(100)
    _, quantized = quantize(model, calibration, weight_bits=2)

    models = {"quantized": quantized}
    for name, changes in (("refined, defaults", {}), ("refined, own", {"loss": margin, "blocks": halves})):
        config = cptv_ao.RefineConfig(max_seconds=args.seconds, **changes)
        models[name] = cptv_ao.refine(quantized, calibration, float_model=model, config=config, inplace=False)

    print(f"{cptv_ao.report(models['refined, own'])}\n")
    shown(models, model, data.test, data.test_labels)


if __name__ == "__main__":
    main()
