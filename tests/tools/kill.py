"""Kill a refine with SIGKILL at random moments, call it again each time, and compare with one that was left alone.

    python tests/tools/kill.py --kills 50

A kill counts when it ended a process that was inside refine. The model is made once; each attempt is a fork, which
torch allows here because the parent has one thread only (it is checked). Every fifth kill waits for the sight of a
half-written checkpoint. How many blocks an attempt may search, and the moment after them, are drawn.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # NumPy's BLAS starts its threads when it is imported
sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

import torch
from helpers import nets
from helpers.search import small_config
from safetensors.torch import load_file

import cptv_ao
from cptv_ao.core.tensor_file import read_file

IN_WRITING = 5  # every so many kills


@dataclass(frozen=True)
class Pace:
    """Of a search that is left alone: seconds until it begins with its blocks, per block; how many blocks it visits."""

    start: float
    per_block: float
    blocks: int


class Search:
    """A model to refine, made once; `start` refines it in a process of its own."""

    def __init__(self, folder: Path, passes: int) -> None:
        self._folder = folder
        self._float_model = nets.seeded(nets.ConvNet)
        self._batches = list(nets.images(48, 3, 16, 16).split(8))
        _, self._converted = nets.quantize(self._float_model, self._batches, weight_bits=3)
        self._config = small_config(
            passes=passes, evaluations=3, gradient_steps=4, population=("ranges",), holdout=0, blocks=_site_by_site
        )

    def start(self, name: str) -> tuple[int, int]:
        """Fork; the child says `i` when it goes into refine, `b` after each block, `o` when it is out of refine.

        Returns:
            Its id, and the pipe to read.
        """
        assert len(os.listdir("/proc/self/task")) == 1, "a process with threads must not be forked"
        sys.stdout.flush()
        reading, writing = os.pipe()
        child = os.fork()
        if child:
            os.close(writing)
            return child, reading
        try:
            os.write(writing, b"i")
            cptv_ao.refine(
                self._converted,
                self._batches,
                float_model=self._float_model,
                config=self._config,
                callback=lambda event: os.write(writing, b"b") if event.kind == "block" else None,
                checkpoint=self._folder / f"{name}.search",
                progress=False,
            )
            os.write(writing, b"o")
            cptv_ao.save_scales(self._converted, self._folder / f"{name}.scales")
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)

    def finish(self, name: str) -> Pace:
        """Run to the end, and measure."""
        child, pipe = self.start(name)
        times = []
        while os.read(pipe, 1) != b"o":
            times.append(time.monotonic())
        assert os.waitpid(child, 0)[1] == 0
        os.close(pipe)
        return Pace(times[1] - times[0], (times[-1] - times[1]) / max(1, len(times) - 2), len(times) - 1)

    def position(self, name: str) -> tuple[str, int]:
        """What the checkpoint says: where an attempt would go on, and how many blocks were visited."""
        path = self._folder / f"{name}.search"
        if not path.exists():
            return "no checkpoint yet", -1
        data = read_file(path)[1]
        return f"pass {data['position']['passes']}, block {data['position']['blocks']}", len(data["results"])

    def half_written(self) -> list[str]:
        """Checkpoints that are being written, or were when their process was killed."""
        return [name for name in os.listdir(self._folder) if name.endswith(".partial")]


def _site_by_site(sites: Sequence[cptv_ao.ScaleSite]) -> dict[str, str]:
    """Many short blocks, so that many checkpoints are written."""
    return {site.name: site.tied for site in sites}


def kill_once(search: Search, blocks: int, seconds: float, in_writing: bool) -> bool:
    """One attempt, killed so many seconds after so many of its blocks; False where it was out of refine before."""
    child, pipe = search.start("killed")
    for awaited in [b"i", *[b"b"] * blocks]:
        if os.read(pipe, 1) != awaited:
            os.waitpid(child, 0)
            return False
    time.sleep(seconds)
    while in_writing and not search.half_written() and not _ended(child):
        pass
    os.kill(child, signal.SIGKILL)  # it is not waited for yet, so the id is its own still
    status = os.waitpid(child, 0)[1]
    said = os.read(pipe, 1000)
    os.close(pipe)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "an attempt failed by itself"
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL and b"o" not in said


def _ended(child: int) -> bool:
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def run(kills: int, folder: Path, seed: int = 0) -> dict[str, Any]:
    """Kill so many times; what happened, JSON-safe.

    Raises:
        AssertionError: fewer kills landed, or the end differs from that of the search that was left alone.
    """
    torch.set_num_threads(1)
    search = Search(folder, passes=2 + kills // 2)
    pace = search.finish("whole")
    print(f"left alone: {pace}")
    most = max(1, round(pace.blocks / kills))  # half of the blocks on the average
    generator = random.Random(seed)
    landed = resumed = written = moved = 0
    for number in range(1, kills + 1):
        before = search.position("killed")[1]
        resumed += before >= 0
        blocks = generator.randint(0, most)
        seconds = generator.uniform(0, pace.per_block if blocks else pace.start)
        if not kill_once(search, blocks, seconds, number % IN_WRITING == 0):
            break
        landed += 1
        half, (position, visited) = bool(search.half_written()), search.position("killed")
        written += half
        moved += visited > before
        where = f"{position}{', while it was written' if half else ''}"
        print(f"kill {number}: {seconds:.3f} s after {blocks} blocks, {where}", flush=True)
    resumed += search.position("killed")[1] >= 0
    search.finish("killed")
    ends = {name: load_file(folder / f"{name}.scales") for name in ("whole", "killed")}
    states = {name: read_file(folder / f"{name}.search")[1] for name in ends}
    for state in states.values():
        for record in (state, *state["history"]):
            del record["seconds"]
    equal = ends["whole"].keys() == ends["killed"].keys()
    equal = equal and all(torch.equal(value, ends["killed"][key]) for key, value in ends["whole"].items())
    equal = equal and states["whole"] == states["killed"]
    result = {"kills": kills, "landed": landed, "in_writing": written, "resumed": resumed, "progressed": moved}
    result |= {"blocks": pace.blocks, "equal": equal, "left_over": len(search.half_written())}
    print(json.dumps(result))
    assert landed == kills, f"only {landed} of {kills} kills landed inside refine: the search was over"
    assert equal, "the end differs from that of the search that was left alone"
    assert not search.half_written(), "half-written checkpoints are left over"
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        run(arguments.kills, Path(scratch), arguments.seed)
