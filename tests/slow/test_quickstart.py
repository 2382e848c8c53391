"""The quickstart, as a newcomer runs it: on real images it must give accuracy back."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "examples" / "quickstart.py"


def test_quickstart_gives_accuracy_back(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--seeds", "1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    found = {row[1]: [float(cell) for cell in row[2:5]] for row in rows if row[:1] == ["0"]}
    assert list(found) == ["quantized", "refined"], done.stdout
    accuracy, agreement, loss = range(3)
    assert found["refined"][accuracy] > found["quantized"][accuracy]
    assert found["refined"][agreement] > found["quantized"][agreement]
    assert found["refined"][loss] < found["quantized"][loss]
    assert "cptv_ao.refine: improved" in done.stdout
    assert list(tmp_path.iterdir()) == []
