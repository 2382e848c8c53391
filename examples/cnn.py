"""A pretrained CNN of timm: prepared by `cptv_ao.recipe`, quantized by stock calls, refined.

    python examples/cnn.py

EfficientNet-Lite0 with its ImageNet weights (from a package: nothing is downloaded), on crops of the photographs that
scikit-image and scikit-learn ship. There are no labels: what counts is how often the 8-bit network chooses what the
float network chooses. FX does not fuse timm's batch norms with their convolutions; `recipe` takes them apart so that
it does, which leaves fewer roundings, and fewer scales to search.
"""

from __future__ import annotations

import photos
import torch
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx
from workloads import options, quantize, quietly, shown

import cptv_ao


def main() -> None:
    parser = options(__doc__, seconds=30)
    parser.add_argument("--images", type=int, default=100, help="calibration crops, default %(default)s")
    parser.add_argument("--test-images", type=int, default=200, help="test crops, default %(default)s")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.backends.quantized.engine = "x86"
    model = photos.efficientnet()
    calibration = photos.crops(photos.CALIBRATION, args.images, seed=0).split(25)
    test = photos.crops(photos.TEST, args.test_images, seed=2000)

    _, stock = quantize(model, calibration)
    example = (calibration[0],)
    ready = cptv_ao.recipe(model, example, qconfig_mapping=cptv_ao.qconfig_mapping(weight_bits=8, engine="x86"))
    print(f"recipe: {ready}")
    with quietly(), torch.no_grad():
        prepared = prepare_fx(
            ready.model, ready.qconfig_mapping, example, prepare_custom_config=ready.prepare_custom_config
        )
        for images in calibration:
            prepared(images)
        quantized = convert_fx(prepared)
    print(f"scales to search: {len(cptv_ao.find_sites(stock))} sites without the recipe, ", end="")
    print(f"{len(cptv_ao.find_sites(quantized))} with it")

    config = cptv_ao.RefineConfig(max_seconds=args.seconds)
    refined = cptv_ao.refine(quantized, calibration, float_model=ready.model, config=config, inplace=False)
    print(f"\n{cptv_ao.report(refined)}\n")
    shown({"stock": stock, "recipe": quantized, "recipe and refine": refined}, model, test)


if __name__ == "__main__":
    main()
