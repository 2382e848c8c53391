"""Peak memory of `refine` against the images of a batch: `python examples/benchmarks/memory.py`.

DINOv2 ViT-S/14 at W8A8 (`examples/dinov2.py` says what to install), each batch size in a process of its own. A step of
the descent holds the graph of one part of a batch, so the peak does not grow with the batches of the loader: what grows
are the values of a forward without gradients. Beside the peak stands that of the process before `refine`: torch, the
float and the quantized network, the images.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from dinov2 import backbone, photographs, quantized
from origins import origin, told
from workloads import quietly

import cptv_ao

SIZES = (10, 50, 200)


def peak() -> float:
    """Of this process so far, GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def measured(size: int, images: int, seconds: float) -> None:
    """One search; prints its row."""
    data, model = photographs(images, test=1), backbone()
    with quietly():
        converted = quantized(model, data.calibration[:40])
        before = peak()
        config = cptv_ao.RefineConfig(max_seconds=seconds)
        cptv_ao.refine(converted, data.calibration.split(size), float_model=model, config=config, progress=False)
    print(f"{size:>6}  {before:>11.2f}  {peak():>8.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=90.0, help="of each search, default %(default)s")
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--size", type=int, help="only these batches, in this process")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.size is not None:
        measured(args.size, args.images, args.seconds)
        return
    print(told([origin()]))
    print(f"{'images':>6}  {'before, GB':>11}  {'peak, GB':>8}", flush=True)
    for size in SIZES:
        subprocess.run([sys.executable, __file__, *sys.argv[1:], "--size", str(size)], check=True)


if __name__ == "__main__":
    main()
