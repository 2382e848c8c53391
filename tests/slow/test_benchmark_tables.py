"""The benchmarks' cells say where they are from, their tables mark single seeds, and a run goes on where it stopped."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "examples" / "benchmarks"


@pytest.fixture(autouse=True)
def _found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)


def cells_of(method: str, seeds: int, **more: Any) -> list[dict[str, Any]]:
    cost = {} if method == "start" else {"seconds": 10.0, "image_forwards": 5000}
    cell = {"workload": "net", "method": method, "float": 0.9, "top1": 0.5, "kl": 0.25, **cost, **more}
    return [{**cell, "seed": seed} for seed in range(seeds)]


def test_a_single_seed_is_marked_in_every_table() -> None:
    from tables import recovery_table

    cells = [*cells_of("start", 3), *cells_of("ours", 1, top1=0.8), *cells_of("rival", 3, top1=0.6)]
    rows = [line for line in recovery_table(cells, ["net"], ["start", "ours", "rival"]).splitlines() if "| net" in line]
    assert rows == [
        "| net | 90.00 | 50.00 ± 0.00 | 80.00, 1 seed | 60.00 ± 0.00 |",
        "| net | 75, 1 seed | 25 |",
        "| net | 0.2500 | 0.2500, 1 seed | 0.2500 |",
        "| net | 10 / 5, 1 seed | 10 / 5 |",
    ]


def test_a_table_says_where_its_cells_are_from() -> None:
    from origins import origin, told

    known = {"day": "2026-11-27", "commit": "abc1234", "cpu": "Z80", "torch": "2.14"}
    assert set(origin()) == set(known) and all(origin().values())
    assert told([known, known | {"day": "2026-11-26"}]) == (
        "Measured: day 2026-11-26, 2026-11-27; commit abc1234; CPU Z80; torch 2.14."
    )
    assert told([known, {"day": "2026-11-27", "torch": "2.14"}]) == (
        "Measured: day 2026-11-27; commit abc1234; CPU Z80; torch 2.14. Not stored with 1 of 2 cells: commit, CPU."
    )


def test_each_part_is_left_out_by_a_setting_of_its_own() -> None:
    from ablation import PARTS

    from cptv_ao import RefineConfig

    found = [RefineConfig(**changes) for changes in PARTS.values()]
    assert len(set(found)) == len(PARTS)
    assert found[0] == RefineConfig()


def test_an_ablation_goes_on_where_it_stopped(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import ablation

    def run(*parts: str) -> str:
        """What it prints; each of its searches has a process of its own."""
        words = ["--only", "digits", "--seeds", "1", "--seconds", "1", "--folder", str(tmp_path / "cells")]
        monkeypatch.setattr(sys, "argv", ["ablation.py", *words, "--parts", *parts])
        with warnings.catch_warnings():
            ablation.main()
        return capfd.readouterr().out

    first = run("without descent")
    assert "digits ViT W2A8, without descent, seed 0: KL " in first
    again = run("without descent", "without equal forms")
    assert "without descent, seed" not in again and "without equal forms, seed 0: KL " in again
    assert "| KL to float on unseen images | seconds | without equal forms | without descent |" in again
    stored = json.loads((tmp_path / "cells.json").read_text())
    assert {cell["part"] for cell in stored} == {"without descent", "without equal forms"}
    assert all(cell["commit"] and cell["cpu"] and cell["limit"] == 1 for cell in stored)
