"""Quantize a small trained ViT to low-bit weights, refine it, and print what came back.

    python examples/quickstart.py

The images are scikit-learn's 8x8 digits; the network and the script that trained it lie beside this file. Test images
are seen by no training, calibration or search.
"""

from __future__ import annotations

import argparse
import time
from statistics import mean

import torch
from workloads import accuracy, agreement, digits, divergence, logits, quantize, trained

import cptv_ao


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weight-bits", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    data, model = digits(), trained("digits_vit")
    teacher = logits(model, data.test)
    print(
        f"digits ViT, W{args.weight_bits}A8, {len(data.test)} test images; float accuracy "
        f"{accuracy(teacher, data.test_labels):.4f}\n"
    )
    print("seed  model      test accuracy  agrees with float  held-out KL  seconds")
    rows = []
    for seed in range(args.seeds):
        drawn = data.calibration(len(data.train), seed)
        calibration, unseen = drawn[:900].split(100), drawn[900:]
        _, quantized = quantize(model, calibration, weight_bits=args.weight_bits)  # stock prepare_fx, convert_fx
        started = time.monotonic()
        refined = cptv_ao.refine(
            quantized,
            calibration,
            float_model=model,
            config=cptv_ao.RefineConfig(seed=seed),
            inplace=False,
        )
        seconds = time.monotonic() - started
        for name, candidate, cost in (("quantized", quantized, "-"), ("refined", refined, f"{seconds:.0f}")):
            outputs = logits(candidate, data.test)
            found = accuracy(outputs, data.test_labels), agreement(outputs, teacher)
            loss = divergence(logits(candidate, unseen), logits(model, unseen))
            rows.append((name, *found, loss))
            print(f"{seed:<4}  {name:<9}  {found[0]:>13.4f}  {found[1]:>17.4f}  {loss:>11.4f}  {cost:>7}", flush=True)
    for name in ("quantized", "refined"):
        means = [mean(row[i] for row in rows if row[0] == name) for i in (1, 2, 3)]
        print(f"mean  {name:<9}  {means[0]:>13.4f}  {means[1]:>17.4f}  {means[2]:>11.4f}")
    print(f"\nthe report of the last seed\n\n{cptv_ao.report(refined)}")
    before, after = (mean(row[1] for row in rows if row[0] == name) for name in ("quantized", "refined"))
    if after <= before:
        raise SystemExit("no gain: refined is not better than quantized")


if __name__ == "__main__":
    main()
