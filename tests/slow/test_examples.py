"""The examples run as a newcomer runs them, with small settings, and print what their first lines promise.

The quickstart and the ImageNet script have test files of their own.
"""

from __future__ import annotations

import gzip
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("timm", reason="the networks of the examples are timm's")
import workloads

EXAMPLES = Path(workloads.__file__).parent
# Test accuracy moves by this much without a reason: a short search promises no more than not to lose it.
NOISE = 0.01


def run(folder: Path, name: str, *words: str, seconds: float = 5) -> str:
    """What an example prints, run from a folder that is not its own; it must end well and leave nothing there."""
    done = call(folder, name, "--seconds", str(seconds), *words)
    assert done.returncode == 0, done.stderr[-2000:]
    assert list(folder.iterdir()) == []
    return done.stdout


def call(folder: Path, name: str, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXAMPLES / name), *words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)


def column(output: str, head: str = "model ") -> dict[str, float]:
    """The first column of the table of models, by name: the rows after the one that starts with `head`."""
    lines = output.split(f"\n{head}", 1)[1].splitlines()[1:]
    rows = [re.match(r"(.+?)\s{2,}(\d\.\d{4})", line) for line in lines]
    return {row[1]: float(row[2]) for row in rows if row}


@pytest.fixture(scope="module")
def fashion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first images of Fashion-MNIST, in files as the Debian package has them."""
    if not workloads.FASHION_MNIST.is_dir():
        pytest.skip("needs the Debian package dataset-fashion-mnist")
    folder = tmp_path_factory.mktemp("fashion")
    for path in workloads.FASHION_MNIST.glob("*-ubyte.gz"):
        with gzip.open(path) as file:
            head = file.read(16 if "images" in path.name else 8)
            count = 3000
            body = file.read(count * (28 * 28 if "images" in path.name else 1))
        (folder / path.name).write_bytes(gzip.compress(head[:4] + struct.pack(">i", count) + head[8:] + body, 1))
    return folder


def test_fashion_mnist(tmp_path: Path, fashion: Path) -> None:
    # 3 of them are enough on an idle machine, 5 were not on a busy one.
    output = run(tmp_path, "fashion_mnist.py", "--data", str(fashion), seconds=20)
    found = column(output)
    assert list(found) == ["quantized", "refined"]
    assert found["refined"] > found["quantized"] + NOISE  # 2 bits leave much to gain
    share = re.search(r"^(\d+) % of what quantization took is back$", output, re.MULTILINE)
    assert share
    assert 0 < int(share[1]) < 100


def test_fashion_mnist_says_where_the_images_are_to_be_had(tmp_path: Path) -> None:
    done = call(tmp_path, "fashion_mnist.py", "--data", "nowhere")
    assert done.returncode == 1
    assert "found no such folder; run: apt-get install dataset-fashion-mnist" in done.stderr
    assert "Traceback" not in done.stderr


def test_custom(tmp_path: Path) -> None:
    output = run(tmp_path, "custom.py", seconds=15)  # 3 were not enough on a busy machine
    assert re.search(r"^margin, \d+ search images", output, re.MULTILINE)
    found = column(output)
    assert list(found) == ["quantized", "refined, defaults", "refined, own"]
    assert min(found["refined, defaults"], found["refined, own"]) > found["quantized"] - NOISE


def test_the_own_blocks_of_custom_cut_each_block_in_two(vit_w3: object) -> None:
    import custom

    import cptv_ao
    from cptv_ao.core.blocks import find_blocks

    sites = cptv_ao.find_sites(vit_w3.converted).values()  # type: ignore[attr-defined]
    names = [block.name for block in find_blocks(sites, custom.halves)]
    assert names[0] == "stem"
    assert names[-1] == "head"
    assert names[1:-1] == [f"blocks.{i}.{half}" for i in range(4) for half in ("attn", "mlp")]


def test_cnn(tmp_path: Path) -> None:
    output = run(tmp_path, "cnn.py", "--images", "30", "--test-images", "50", seconds=3)
    assert "batch norms with an activation taken apart" in output
    before, after = re.search(r"(\d+) sites without the recipe, (\d+) with it", output).groups()  # type: ignore[union-attr]
    assert int(after) < int(before)
    found = column(output)
    assert list(found) == ["stock", "recipe", "recipe and refine"]
    assert found["recipe and refine"] > found["recipe"] - 0.05  # 50 crops: two of them and a half


def test_pt2e(tmp_path: Path) -> None:
    pytest.importorskip("torchao", reason="PT2E is torchao's")
    output = run(tmp_path, "pt2e.py")
    found = column(output)
    assert list(found) == ["quantized", "refined", "refined, loaded"]
    assert found["refined"] > found["quantized"]
    assert found["refined, loaded"] == found["refined"]
    assert output.endswith("the loaded model gives the same outputs, bit for bit\n")
