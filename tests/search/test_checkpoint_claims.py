"""What a checkpoint says of its scales is not believed: they are scored again before they count."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.cases import Case, Copies
from helpers.damage import changed, check_damaged, flipped
from helpers.killed import Killed, refine

import cptv_ao

#: what the searches of this file do beside what they do in all files
SETTINGS: dict[str, dict[str, Any]] = {
    "kernels": {},
    "simulation": {"score_on": "simulation"},
    "small": {"gradient_steps": 0, "population": (), "equalize": False, "passes": 1},
}


@pytest.fixture(scope="module")
def files(small_cases: Copies, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What searches of `conv` leave behind, by their settings."""
    folder = tmp_path_factory.mktemp("files")
    for name, settings in SETTINGS.items():
        refine(small_cases["conv"], folder / name, **settings)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def doubled(tensors: dict[str, Any], prefix: str) -> None:
    for key in tensors:
        if key.startswith(prefix) and key.endswith("weight/scale"):
            tensors[key] = tensors[key] * 2


def worse_best(tensors: dict[str, Any], _: Any) -> None:
    doubled(tensors, "best/")


def worse_now(tensors: dict[str, Any], _: Any) -> None:
    doubled(tensors, "now/")


def lower_best(_: Any, data: dict[str, Any]) -> None:
    for losses in (data["losses"]["best"], *[point for point in data["history"] if point["kept"]][1:]):
        losses["search"] *= 0.5


def lower_now(_: Any, data: dict[str, Any]) -> None:
    data["losses"]["now"] *= 0.5


def lower_start(_: Any, data: dict[str, Any]) -> None:
    data["losses"]["start"]["search"] = data["history"][0]["search"] = 1e9


def other_history(_: Any, data: dict[str, Any]) -> None:
    data["history"][-1]["search"] = data["history"][0]["search"] = 0.0


@pytest.mark.parametrize("settings", ["kernels", "simulation"])
@pytest.mark.parametrize(
    ("change", "told"),
    [
        (worse_best, "its scales are not what it says: best"),
        (worse_now, "its scales are not what it says: best"),
        (lower_best, "its scales are not what it says: best"),
        (lower_now, "its scales are not what it says: best"),
        (lower_start, "it started from another loss"),
        (other_history, "expected a history from the start's losses to the best ones"),
    ],
)
def test_scales_are_scored_again_before_they_count(
    conv: Case, files: dict[str, bytes], tmp_path: Path, change: Any, told: str, settings: str
) -> None:
    path = tmp_path / "search"
    path.write_bytes(files[settings])
    changed(path, change)
    given = conv.converted(conv.batches[0])
    with pytest.raises(cptv_ao.ScalesFileError, match=f"search: .*{told}.*delete it to search from the start"):
        refine(conv, path, **SETTINGS[settings])
    assert torch.equal(conv.converted(conv.batches[0]), given)


def test_a_file_that_is_right_about_worse_scales_is_refused(
    conv: Case, files: dict[str, bytes], tmp_path: Path
) -> None:
    """Not one word of it is wrong: but never worse holds."""
    from cptv_ao.backends.backend import Backend
    from cptv_ao.backends.float_weights import attach_float_weights

    path, spoilt = tmp_path / "search", conv.copy()
    path.write_bytes(files["small"])
    backend = Backend(spoilt.converted)
    attach_float_weights(backend, spoilt.float_model)
    qparams = backend.read("fc1.weight")
    backend.write("fc1.weight", replace(qparams, scale=qparams.scale * 50))
    refine(spoilt, None, **SETTINGS["small"], max_evaluations=0)
    losses = cptv_ao.report(spoilt.converted).before

    def worse(tensors: dict[str, Any], data: dict[str, Any]) -> None:
        tensors.clear()
        for where in ("best", "now"):
            tensors[f"{where}/fc1.weight/scale"] = qparams.scale * 50
            tensors[f"{where}/fc1.weight/zero_point"] = qparams.zero_point.clone()
        found = {"search": losses.search, "holdout": losses.holdout}
        data["losses"] |= {"best": found, "now": losses.search}
        data["best_is_given"] = False
        data["history"].append({**data["history"][0], **found})

    changed(path, worse)
    given = conv.converted(conv.batches[0])
    with pytest.raises(cptv_ao.ScalesFileError, match="its scales are worse than the given ones"):
        refine(conv, path, **SETTINGS["small"])
    assert torch.equal(conv.converted(conv.batches[0]), given)


def test_a_checkpoint_with_one_bit_turned_is_refused(conv: Case, tmp_path: Path) -> None:
    path = tmp_path / "search"
    with pytest.raises(Killed):
        refine(conv.copy(), path, kill_at=9)
    whole, given = path.read_bytes(), conv.converted(conv.batches[0])
    check_damaged(whole)
    for bad in list(flipped(whole, 100, seed=3))[-4:]:
        path.write_bytes(bad)
        with pytest.raises(cptv_ao.ScalesFileError, match=r"search: .*delete it to search from the start"):
            refine(conv, path)
    assert torch.equal(conv.converted(conv.batches[0]), given)


def odd_seconds(_: Any, data: dict[str, Any]) -> None:
    data["seconds"] = float("nan")


def odd_step(_: Any, data: dict[str, Any]) -> None:
    next(iter(data["step_sizes"].values()))["weights"] = -1.0


def odd_shift(tensors: dict[str, Any], _: Any) -> None:
    tensors["now/fc1.weight/shift"] = torch.ones(3, 3, dtype=torch.int8)


def odd_correction(tensors: dict[str, Any], _: Any) -> None:
    tensors["now/fc1.weight/correction"] = torch.ones(7)


@pytest.mark.parametrize("change", [odd_seconds, odd_step, odd_shift, odd_correction])
def test_what_cannot_be_is_refused(conv: Case, files: dict[str, bytes], tmp_path: Path, change: Any) -> None:
    path = tmp_path / "search"
    path.write_bytes(files["kernels"])
    changed(path, change)
    given = conv.converted(conv.batches[0])
    with pytest.raises(cptv_ao.ScalesFileError, match="not the checkpoint of a search"):
        refine(conv, path)
    assert torch.equal(conv.converted(conv.batches[0]), given)
