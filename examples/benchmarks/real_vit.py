"""What a real pretrained ViT gets back, over the seconds of the whole call: `python examples/benchmarks/real_vit.py`.

DINOv2 ViT-S/14 at 224 (`examples/dinov2.py` says what to install): 400 calibration crops, 300 test crops of other
photographs, which choose nothing. Each cell is a file in `results/real_vit`, written as soon as it is there, so that an
interrupted run goes on where it stopped; the table and the curves come from them. `--only` picks rows, `--seconds`
limits. Two of the limits are rivals: `gradient` is Adam on all scales for 300 seconds (as in `recovery.py`), and `nncf`
is NNCF's quantization of the same float network at its own pace (extra `rivals`), which leaves norms, GELU, softmax and
the residual stream in float. Run it alone.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from origins import origin, told
from recovery import gradient
from tables import markdown
from torch import Tensor, nn
from torch.fx import GraphModule

sys.path.insert(0, str(Path(__file__).parent.parent))
from dinov2 import Photographs, backbone, fidelity, photographs, quantized
from workloads import logits, quantize_exported, quietly

import cptv_ao
from cptv_ao.core.events import Event

CELLS = Path(__file__).parent / "results" / "real_vit"
# As many crops as observers need; a search gets all.
_OBSERVED = 200


def _exported(model: nn.Module, images: Tensor, **bits: int) -> GraphModule:
    return quantize_exported(model, images.split(20), **bits)


Quantize = Callable[[nn.Module, Tensor], GraphModule]
ROWS: dict[str, Quantize] = {
    "W8A8": quantized,
    "W8A8 full range": partial(quantized, reduce_range=False),
    "W4A8": partial(quantized, weight_bits=4),
    "PT2E W8A8": _exported,
    "PT2E W4A8": partial(_exported, weight_bits=4),
    "PT2E W4A4": partial(_exported, weight_bits=4, activation_bits=4),
}
OURS, RIVALS = ("0", "60", "300", "none"), ("gradient", "nncf")
LIMITS = OURS + RIVALS
# Of the gradient: the seconds, and the learning rate that most of the small workloads are best with.
_GRADIENT_SECONDS, _GRADIENT_RATE = 300, 0.03


def measured(row: str, limit: str, data: Photographs, teacher: Tensor, threads: int) -> dict[str, Any]:
    """One cell: what is left of the embeddings' geometry, in how many seconds, and every accepted gain on the way.

    Args:
        teacher: what the float network gives on the test crops.
    """
    float_model = backbone()
    curve: list[tuple[float, float]] = []
    if limit == "nncf":
        model, seconds = _nncf(data)
    else:
        model = ROWS[row](copy.deepcopy(float_model), data.calibration[:_OBSERVED])
        started = time.monotonic()

        def see(event: Event) -> None:
            if event.kind in ("proposal", "block") and (not curve or event.best < curve[-1][1]):
                curve.append((round(time.monotonic() - started, 1), event.best))

        if limit != "0":
            config = _config(limit)
            batches = data.calibration.split(20)
            cptv_ao.refine(model, batches, float_model=float_model, config=config, callback=see, progress=False)
        seconds = time.monotonic() - started
    found = fidelity(logits(model, data.test, 20), teacher, data.source)
    return {
        "row": row,
        "limit": limit,
        "seconds": round(seconds, 1),
        **{name: round(value, 4) for name, value in found.items()},
        "curve": curve,
        "stages": list(cptv_ao.report(model).stages) if limit not in ("0", "nncf") else [],
        "threads": threads,
        **origin(),
    }


def _config(limit: str) -> cptv_ao.RefineConfig:
    if limit == "gradient":
        return gradient(_GRADIENT_SECONDS, 0, _GRADIENT_RATE)
    return cptv_ao.RefineConfig(max_seconds=None if limit == "none" else float(limit))


def _nncf(data: Photographs) -> tuple[nn.Module, float]:
    import nncf

    images = [image[None] for image in data.calibration[:_OBSERVED]]
    started = time.monotonic()
    model = nncf.quantize(
        backbone(), nncf.Dataset(images), model_type=nncf.ModelType.TRANSFORMER, subset_size=len(images)
    )
    return model, time.monotonic() - started


def _path(row: str, limit: str) -> Path:
    """Where a cell is kept."""
    return CELLS / f"{row.replace(',', '').replace(' ', '_')}_{limit}.json"


def table(cells: list[dict[str, Any]]) -> str:
    """Cosine to float / nearest neighbours that are float's, and the seconds of the call; every cell is one seed."""
    by_key = {(cell["row"], cell["limit"]): cell for cell in cells}
    limits = [limit for limit in LIMITS if any(key[1] == limit for key in by_key)]
    names = {"0": "start", "none": "no limit", "gradient": f"gradient, {_GRADIENT_SECONDS} s", "nncf": "NNCF"}
    lines = [["DINOv2 ViT-S/14, 1 seed", *(names.get(limit, f"{limit} s") for limit in limits)]]
    for row in ROWS:
        if any(key[0] == row for key in by_key):
            lines.append([row, *(_shown(by_key.get((row, limit))) for limit in limits)])
    return markdown(lines)


def _shown(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return ""
    found = f"{cell['cosine']:.4f} / {100 * cell['neighbours']:.1f} %"
    return found if cell["limit"] == "0" else f"{found} ({cell['seconds']:.0f} s)"


def draw(cells: list[dict[str, Any]], path: str) -> None:
    """What is left of the cosine to float over the seconds of the whole call, a line per row; needs matplotlib."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 3.6), layout="constrained")
    colors: dict[str, Any] = {}
    for row in ROWS:
        points = sorted((c["seconds"], 1 - c["cosine"]) for c in cells if c["row"] == row and c["limit"] in OURS)
        if len(points) > 1:
            (line,) = axes.plot(*zip(*points, strict=True), marker="o", label=row)
            colors[row] = line.get_color()
    for cell in cells:
        if cell["limit"] == "gradient":
            color, label = colors.get(cell["row"], "black"), f"{cell['row']}, gradient"
            axes.plot(cell["seconds"], 1 - cell["cosine"], "x", color=color, markersize=9, label=label)
        if cell["limit"] == "nncf":
            axes.plot(cell["seconds"], 1 - cell["cosine"], "k^", label="NNCF (norms and\nresidual stream in float)")
    axes.set_yscale("log")
    axes.set(xlabel="seconds of the whole call", ylabel="1 - cosine to float, unseen crops", title="DINOv2 ViT-S/14")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right center")
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--seconds", nargs="*", default=list(OURS), choices=LIMITS)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--plot", help="draw quality over seconds into this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    CELLS.mkdir(parents=True, exist_ok=True)
    wanted = [(row, limit) for limit in args.seconds for row in args.only if limit != "nncf" or row == "W8A8"]
    if missing := [key for key in wanted if not _path(*key).exists()]:
        data = photographs()
        with quietly():
            teacher = logits(backbone(), data.test, 20)
            for row, limit in missing:
                cell = measured(row, limit, data, teacher, args.threads)
                _path(row, limit).write_text(json.dumps(cell, indent=1) + "\n")
                print(row, limit, _shown(cell), flush=True)
    cells = [json.loads(path.read_text()) for path in sorted(CELLS.glob("*.json"))]
    print(f"{table(cells)}\n\n{told(cells)}")
    if args.plot:
        draw(cells, args.plot)


if __name__ == "__main__":
    main()
