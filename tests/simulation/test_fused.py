"""The kernels of a GPU, without a GPU: in Triton's interpreter, which must be asked for before anything imports it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.parametrize(("chosen", "count"), [("not vit_w3", 17), ("vit_w3", 1)], ids=["parts", "vit"])
def test_kernels_in_the_interpreter(chosen: str, count: int) -> None:
    pytest.importorskip("triton", reason="comes with torch builds for GPUs")
    checks = Path(__file__).with_name("check_fused.py")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-m",
        "not slow",
        "-k",
        chosen,
        str(checks),
    ]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    assert count * "." in done.stdout
