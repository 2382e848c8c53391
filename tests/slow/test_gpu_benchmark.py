"""The benchmark of a GPU, small and without one: it must run where the one command is given."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "examples" / "benchmarks" / "gpu.py"


def test_it_runs_without_a_gpu() -> None:
    small = "--device cpu --networks digits_vit --searched digits_vit --batch 8 --images 64 --rounds 2 --steps 2"
    command = [sys.executable, str(SCRIPT), *small.split(), "--threads", "1", "--seconds", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(r"codes equal the CPU's: 1\.0000000 of \d+ ops", done.stdout)
    assert re.search(r"a step is \d+\.\d\d x TF32", done.stdout)
    assert "with a process group and without: scales at most 0.0e+00 apart" in done.stdout
    assert re.search(r"digits_vit, 64 images, .* s \(until the first proposal", done.stdout)
