"""Two-bit weights on Fashion-MNIST: how much of the accuracy that they cost comes back.

    python examples/fashion_mnist.py

A trained ViT of six blocks is quantized by stock prepare_fx / convert_fx, then refined on 1,000 training images without
their labels; accuracy is that on the 10,000 test images. The images are those of the Debian package
dataset-fashion-mnist: `apt-get install dataset-fashion-mnist`, or `--data FOLDER` with its four IDX files.
"""

from __future__ import annotations

from pathlib import Path

import torch
from workloads import FASHION_MNIST, accuracy, fashion_mnist, logits, options, quantize, shown, trained

import cptv_ao


def main() -> None:
    parser = options(__doc__, seconds=60)
    parser.add_argument("--weight-bits", type=int, default=2, choices=range(2, 9))
    parser.add_argument("--data", type=Path, default=FASHION_MNIST, help="folder with the four IDX files")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    try:
        data = fashion_mnist(args.data)
    except FileNotFoundError as error:
        raise SystemExit(str(error)) from error

    model = trained("fashion_vit")
    calibration = data.calibration(1000, seed=0).split(100)
    _, quantized = quantize(model, calibration, weight_bits=args.weight_bits)
    config = cptv_ao.RefineConfig(max_seconds=args.seconds)
    refined = cptv_ao.refine(quantized, calibration, float_model=model, config=config, inplace=False)

    print(f"{cptv_ao.report(refined)}\n")
    models = {"quantized": quantized, "refined": refined}
    before, after = shown(models, model, data.test, data.test_labels)
    gap = accuracy(logits(model, data.test), data.test_labels) - before
    if gap > 0.005:
        print(f"{100 * (after - before) / gap:.0f} % of what quantization took is back")
    else:
        print("quantization took less than half a point: there is no gap to close")


if __name__ == "__main__":
    main()
