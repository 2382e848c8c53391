"""What the sdist and the wheel in the folder DIST hold, and that the installed wheel refines: packaged.py DIST.

Run it with `python -I`, so that the installed package is found, not the checkout."""

import re
import subprocess
import sys
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path

import torch
from torch import nn
from torch.ao.quantization import get_default_qconfig_mapping
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

import cptv_ao

DIST = Path(sys.argv[1])

[sdist], [wheel] = DIST.glob("*.tar.gz"), DIST.glob("*.whl")
with tarfile.open(sdist) as archive:
    held = {name.partition("/")[2] for name in archive.getnames()}
wanted = ["README.md", "LICENSE", "CHANGELOG.md", "setup.py", "docs/index.md", "tests/conftest.py", "examples/cnn.py"]
assert [name for name in wanted if name not in held] == []
assert [name for name in held if "__pycache__" in name or name.startswith("examples/benchmarks/results/cells")] == []

told = metadata.metadata("cptv_ao")
with zipfile.ZipFile(wheel) as archive:
    names = archive.namelist()
assert {name.split("/")[0] for name in names} == {"cptv_ao", f"cptv_ao-{told['Version']}.dist-info"}
assert "cptv_ao/py.typed" in names and any(name.endswith("LICENSE") for name in names)

text = told.get_payload()
assert "refine" in text and re.findall(r"\]\((?!https?:)[^)]*\)", text) == []  # an index has nothing beside the text

assert "site-packages" in cptv_ao.__file__, cptv_ao.__file__
torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10)).eval()
images = [torch.randn(8, 3, 8, 8) for _ in range(4)]
prepared = prepare_fx(model, get_default_qconfig_mapping("x86"), (images[0],))
for batch in images:
    prepared(batch)
quantized = convert_fx(prepared)
config = cptv_ao.RefineConfig(gradient_steps=5, passes=1, evaluations=4)
quantized = cptv_ao.refine(quantized, images, float_model=model, config=config, progress=False)
report = cptv_ao.report(quantized)
assert report.after.search <= report.before.search and report.evaluations > 0
assert quantized(images[0]).shape == (8, 10)

shown = subprocess.run([sys.executable, "-I", "-m", "cptv_ao", "--help"], capture_output=True, text=True, check=True)
assert "diagnose" in shown.stdout
print(*(f"{path.name}: {path.stat().st_size:,} bytes;" for path in (sdist, wheel)), str(report).splitlines()[0])
