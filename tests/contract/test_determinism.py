"""Same seed, same scales: in another process, with another hash seed, again in the same process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.cases import Case
from helpers.search import small_config

import cptv_ao

HERE = Path(__file__).parents[1]

SCRIPT = """
import json, sys, warnings
warnings.simplefilter("ignore")
sys.path[:0] = [{tests!r}, {examples!r}]
import pytest
import torch
torch.set_num_threads(1)
import cptv_ao
from helpers import nets
from helpers.search import small_config
config = small_config(passes=2, evaluations=4, gradient_steps=10, population=("output_error", "ranges", "biases"))
batches = list(nets.images(16, 3, 16, 16).split(4))
reports = {{}}
for net in (nets.ConvNet, nets.FunctionalNet):
    model = nets.seeded(net)
    for again in range(2):
        _, converted = nets.quantize(model, batches, weight_bits=3)
        cptv_ao.refine(converted, batches, float_model=model, config=config, progress=False)
        name = net.__name__ + str(again)
        cptv_ao.save_scales(converted, {path!r} + name)
        reports[name] = cptv_ao.report(converted).to_dict()
        for record in (reports[name], *reports[name]["history"]):
            record["seconds"] = 0
        torch.rand(3)  # global generators have nothing to do with it
print(json.dumps([reports, hash("a"), str(cptv_ao.report(converted))]))
"""


def run(path: Path, *, hash_seed: int) -> list[Any]:
    """Refine two networks twice in a process of its own: the reports, what a string hashes to, the last table."""
    code = SCRIPT.format(tests=str(HERE), examples=str(HERE.parent / "examples"), path=str(path))
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=HERE.parent,
        env=os.environ | {"PYTHONHASHSEED": str(hash_seed)},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.slow
def test_the_same_scales_in_every_process_and_every_time(tmp_path: Path) -> None:
    first, one_hash, _ = run(tmp_path / "first", hash_seed=1)
    second, other_hash, _ = run(tmp_path / "second", hash_seed=2)
    assert one_hash != other_hash, "sets of strings have another order"
    assert first == second
    for net in ("ConvNet", "FunctionalNet"):
        assert first[f"{net}0"] == first[f"{net}1"]
        assert first[f"{net}0"]["moves"]
        files = [(tmp_path / f"{name}{net}{again}").read_bytes() for name in ("first", "second") for again in (0, 1)]
        assert all(content == files[0] for content in files)


def test_the_report_says_how_many_threads_there_were(functional: Case) -> None:
    torch.set_num_threads(2)
    try:
        config = small_config(evaluations=1, include=("head.*",))
        cptv_ao.refine(
            functional.converted, functional.batches, float_model=functional.float_model, config=config, progress=False
        )
    finally:
        torch.set_num_threads(1)
    report = cptv_ao.report(functional.converted)
    assert report.threads == report.to_dict()["threads"] == 2
    assert ", 2 threads, seed 0" in str(report)
