"""examples/imagenet.py on a small folder of generated images: it says that the script runs, not how accurate it is."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import imagenet
import numpy as np
import pytest
import torch
from PIL import Image

import cptv_ao

CLASSES = 3
VIT, CNN = "vit_tiny_patch16_224", "resnet10t"
COMMON = ["--img-size", "32", "--num-classes", str(CLASSES), "--weight-bits", "3"]
COMMON += ["--batch", "4", "--calibration-images", "20", "--workers", "0", "--threads", "1"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ImageFolder of noise: train/ with 24 and val/ with 12 images of three classes."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for part, each in (("train", 8), ("val", 4)):
        for label in range(CLASSES):
            folder = root / part / f"class{label}"
            folder.mkdir(parents=True)
            for i in range(each):
                Image.fromarray(rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return root


@pytest.fixture
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    """The search ends after one proposal, which gains."""
    settings: dict[str, Any] = {"population": ("output_error",), "gradient_steps": 0, "passes": 0}
    monkeypatch.setattr(cptv_ao, "RefineConfig", partial(cptv_ao.RefineConfig, **settings))


def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: str) -> str:
    """What the script prints; its exit text as SystemExit."""
    monkeypatch.setattr(sys, "argv", ["imagenet.py", VIT, *COMMON, *words])
    with torch.random.fork_rng():
        imagenet.main()
    return capsys.readouterr().out


def table(output: str) -> dict[str, float]:
    """Top-1 by the name of the model."""
    rows = [line.split() for line in output.splitlines()]
    return {row[0]: float(row[1]) for row in rows if len(row) == 3 and row[0] in ("float", "quantized", "refined")}


def test_runs_as_a_script(data: Path, tmp_path: Path) -> None:
    command = [sys.executable, imagenet.__file__, VIT, *COMMON, "--data", str(data), "--seconds", "1", "--paper"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert list(table(done.stdout)) == ["float", "quantized", "refined"]
    assert re.search(r"^infonce, \d+ search images", done.stdout, re.MULTILINE)  # as many as a second pays for
    assert [path.name for path in tmp_path.iterdir()] == [f"{VIT}_w3"]


@pytest.mark.usefixtures("_short")
def test_saves_and_resumes(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    words = ["--data", str(data), "--seconds", "100", "--out", str(out)]
    first = run(capsys, monkeypatch, *words)
    assert sorted(path.name for path in out.iterdir()) == ["quantized.pt", "refined.pt", "results.json"]
    saved = json.loads((out / "results.json").read_text())
    assert {name: round(100 * value, 2) for name, value in saved["top1"].items()} == table(first)
    assert list(table(first)) == ["float", "quantized", "refined"]
    assert saved["report"]["images"] == [16, 4]
    before, after = saved["report"]["before"], saved["report"]["after"]
    assert after["search"] < before["search"]
    assert after["holdout"] <= before["holdout"]

    resumed = run(capsys, monkeypatch, *words, "--resume")
    assert "cptv_ao.refine" not in resumed
    assert table(resumed) == table(first)
    assert json.loads((out / "results.json").read_text())["report"] == saved["report"]

    with pytest.raises(SystemExit, match="was made with weight_bits = 3, not 8"):
        run(capsys, monkeypatch, *words, "--resume", "--weight-bits", "8")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data", "nowhere"], "expected a folder with calibration/ or train/, and val/, got nowhere"),
        (["--num-classes", "5"], "5 for this model, found 3"),
        (["--resume", "--out", "nothing"], "leave --resume out"),
    ],
)
def test_says_what_is_missing(
    data: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit, match=message):
        run(capsys, monkeypatch, "--data", str(data), *words)


@pytest.mark.usefixtures("_short")
@pytest.mark.parametrize("name", [VIT, CNN])
def test_resumed_models_are_the_saved_ones(
    name: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["imagenet.py", name, *COMMON, "--data", str(data), "--seconds", "100"])
    args = imagenet.arguments()
    args.out = tmp_path
    with torch.random.fork_rng():
        model = imagenet.float_network(args)
    images = [batch for batch, _ in imagenet.loaders(args, model)[0]]
    made = imagenet.searched(args, model, images)[:2]
    read = imagenet.resumed(args, model, images[0])[:2]
    with torch.inference_mode():
        outputs = [network(images[0]) for network in (*made, *read)]
    assert not torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])
    assert torch.equal(outputs[1], outputs[3])
