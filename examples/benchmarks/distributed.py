"""What a second process brings: deit_tiny at 224 x 224, one thread each, the same search with 1 and with 2 ranks.

    python examples/benchmarks/distributed.py

Prints seconds per phase (teacher and first scoring, descent, block visits) and their ratios, the bytes that a rank
sends per candidate and per step, and whether the scales are equal; then what the cost model of docs/distributed.md
makes of the measured figures for more ranks. Weights are random: they make no difference to the seconds.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import cptv_ao

PHASES = ("start", "descent", "visits")


def worker(args: argparse.Namespace) -> None:
    """One rank: refine, and write what it cost to a file."""
    import timm
    from workloads import quantize

    torch.set_num_threads(1)
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    talk = _Talk()
    torch.manual_seed(0)
    model = timm.create_model(args.model, num_classes=1000).eval()
    batches = list(torch.randn(args.batches * args.batch, 3, 224, 224).split(args.batch))
    _, quantized = quantize(model, batches[:1], weight_bits=4)
    config = cptv_ao.RefineConfig(
        gradient_steps=args.steps, passes=1, evaluations=args.evaluations, population=(), include=args.include
    )
    marks: list[tuple[str, float, int, int, int]] = []

    def watch(event: cptv_ao.Event) -> None:
        marks.append((event.kind, time.monotonic(), event.evaluations, talk.calls, talk.bytes))

    if dist.is_initialized():
        dist.barrier()
    started = time.monotonic()
    cptv_ao.refine(quantized, batches, float_model=model, config=config, callback=watch, progress=False)
    ended = time.monotonic()
    if int(os.environ.get("RANK", "0")) == 0:
        Path(args.worker).write_text(json.dumps({
            "marks": marks, "started": started, "ended": ended,
            "scales": [cptv_ao.report(quantized).to_dict()["moves"], float(quantized(batches[0]).sum())],
        }))  # fmt: skip
    if dist.is_initialized():
        dist.destroy_process_group()


class _Talk:
    """Counts what this rank gives to all-reduce."""

    def __init__(self) -> None:
        self.calls = self.bytes = 0
        inner = dist.all_reduce

        def counted(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            self.bytes += tensor.numel() * tensor.element_size()
            return inner(tensor, *args, **kwargs)

        dist.all_reduce = counted


def phases(found: dict[str, Any]) -> dict[str, float]:
    """Seconds of the start, of the descent with its proposals, and of the block visits."""
    marks = found["marks"]
    first = next(i for i, mark in enumerate(marks) if mark[0] == "candidate")
    steps = [mark for mark in marks[:first] if mark[0] == "step"]
    spans = (steps[0][1] - found["started"], marks[first - 1][1] - steps[0][1], marks[-1][1] - marks[first - 1][1])
    return dict(zip(PHASES, spans, strict=True))


def bytes_per(found: dict[str, Any], kind: str) -> float:
    """Median bytes that a rank sends from one event of a kind to the next of the same kind."""
    pairs = zip(found["marks"], found["marks"][1:], strict=False)
    sent = sorted(b[4] - a[4] for a, b in pairs if a[0] == b[0] == kind)
    return sent[len(sent) // 2] if sent else math.nan


def run(ranks: int, args: argparse.Namespace, folder: str) -> dict[str, Any]:
    """The search with so many ranks, in processes of its own."""
    out = Path(folder) / f"{ranks}.json"
    command = [sys.executable]
    command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    command += [__file__, "--worker", str(out)]
    for name in ("model", "batches", "batch", "steps", "evaluations"):
        command += [f"--{name}", str(getattr(args, name))]
    command += ["--include", *args.include]
    paths = os.pathsep.join([str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "PYTHONWARNINGS": "ignore"}
    subprocess.run(command, check=True, env=environment, stderr=subprocess.DEVNULL)
    return json.loads(out.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="deit_tiny_patch16_224")
    parser.add_argument("--batches", type=int, default=40)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--evaluations", type=int, default=10)
    parser.add_argument("--include", nargs="+", default=["blocks.0.*", "blocks.6.*"])
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.include = tuple(args.include)
    if args.worker:
        worker(args)
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(args.repeat):  # interleaved: the machine may be busier at one time than at another
            alone, two = run(1, args, folder), run(2, args, folder)
            equal = alone["scales"] == two["scales"]
            rows.append((phases(alone), phases(two), alone["ended"] - alone["started"], two["ended"] - two["started"]))
            print(f"scales equal: {equal}; {len(alone['marks'])} events", flush=True)
    print(f"\n{args.model}, {args.batches} batches of {args.batch}, one thread per rank, {args.repeat} runs")
    print(f"{'phase':<10} {'1 rank, s':>10} {'2 ranks, s':>11} {'ratio':>7}")
    for phase in PHASES:
        one, both = (min(row[i][phase] for row in rows) for i in (0, 1))
        print(f"{phase:<10} {one:>10.1f} {both:>11.1f} {one / both:>7.2f}")
    one, both = (min(row[i] for row in rows) for i in (2, 3))
    print(f"{'all':<10} {one:>10.1f} {both:>11.1f} {one / both:>7.2f}")
    for kind in ("candidate", "step"):
        print(f"bytes that a rank sends per {kind}: {bytes_per(two, kind):,.0f}")


if __name__ == "__main__":
    main()
