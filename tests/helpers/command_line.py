"""`python -m cptv_ao` in a folder with a module that makes models and batches."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


FACTORY = """\
import torch
from torch import nn
from torch.ao.quantization.quantize_fx import convert_fx, convert_to_reference_fx, prepare_fx

import cptv_ao
from beside import CLASSES

batches = torch.randn(64, 16, generator=torch.Generator().manual_seed(0)).split(16)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = nn.Linear(16, 16)

    def forward(self, x):
        return self.attn(x).relu()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(16, CLASSES)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def float_model():
    torch.manual_seed(0)
    return Net().eval()


def prepared(make=float_model):
    made = prepare_fx(make(), cptv_ao.qconfig_mapping(weight_bits=3), (batches[0],))
    for images in batches:
        made(images)
    return made


def converted():
    return convert_fx(prepared())


def reference():
    return convert_to_reference_fx(prepared())


def plain():
    return convert_fx(prepared(lambda: nn.Sequential(nn.Linear(16, 4))))


def pair():
    return converted(), float_model()


def labelled():
    for images in batches:
        yield images, None


def needs(what):
    return what


class Holder:
    net = converted()
"""


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1", COLUMNS="120")
    command = [sys.executable, "-W", "ignore", "-m", "cptv_ao", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def output(folder: Path, *arguments: str) -> str:
    done = run(folder, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout
