"""Refine a small trained ViT, and show what happened: plots as PNG, and one page of HTML to open or to send.

    python examples/plots.py --seconds 30 --out plots

While it runs, `plots/search.jsonl` tells each step (`tail -f` it), and the search ends early once the accuracy on some
labelled images has not risen for a while: a metric of one's own decides when to stop, never which scales are kept.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from workloads import accuracy, digits, logits, quantize, trained

import cptv_ao
from cptv_ao import plot
from cptv_ao.callbacks import EarlyStop, Log, chain


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("plots"), help="folder of what is written (plots)")
    parser.add_argument("--seconds", type=float, default=30.0, help="of search (30)")
    parser.add_argument("--patience", type=int, default=6, help="looks without a better accuracy until it stops (6)")
    parser.add_argument("--weight-bits", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)

    data, model = digits(), trained("digits_vit")
    calibration = data.train[:800].split(100)
    watched, labels = data.train[800:], data.train_labels[800:]  # not the test images, not even for this
    _, given = quantize(model, calibration, weight_bits=args.weight_bits)  # stock prepare_fx, convert_fx

    stop = EarlyStop(lambda m: accuracy(logits(m, watched), labels), patience=args.patience)
    refined = cptv_ao.refine(
        given,
        calibration,
        float_model=model,
        config=cptv_ao.RefineConfig(max_seconds=args.seconds),
        callback=chain(Log(args.out / "search.jsonl"), stop),
        inplace=False,
    )
    report = cptv_ao.report(refined)
    print(f"{report.status.value}; accuracy at each look: {', '.join(f'{value:.3f}' for _, value in stop.values)}")

    before, after = (cptv_ao.diagnose(m, calibration, float_model=model, progress=False) for m in (given, refined))
    print(f"\nbefore the search: {before.advice[0]}\n")
    drawn = {"losses": plot.losses(report), "movement": plot.movement(report)}
    drawn["sensitivity"] = plot.sensitivity(before, after)
    # What 2-bit weights and saturated activations look like: a weight before and after, and the output of its layer.
    site = "blocks.0.mlp.fc1.weight"
    drawn["codes_given"], drawn["codes_refined"] = plot.codes(given, site), plot.codes(refined, site)
    drawn["codes_output"] = plot.codes(refined, site.replace("weight", "output"), calibration)
    for name, ax in drawn.items():
        ax.figure.savefig(args.out / f"{name}.png", dpi=150)
    report.save_html(args.out / "report.html", before, after)
    print("\n".join(f"wrote {path}" for path in sorted(args.out.iterdir())))


if __name__ == "__main__":
    main()
