"""`python -m cptv_ao`, run as people run it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.command_line import FACTORY, ROOT, output, run

import cptv_ao
from cptv_ao.__main__ import main


def load(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(folder))
    namespace: dict[str, Any] = {"__name__": "factory"}
    exec(FACTORY, namespace)
    return namespace


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_inspect(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "factory.py:converted"]) == 0
    printed = capsys.readouterr().out
    sites = cptv_ao.find_sites(load(here, monkeypatch)["converted"]())
    assert printed.startswith(str(sites) + "\n")
    table = printed[len(str(sites)) :].split()
    assert table[:4] == ["block", "sites", "weights", "scales"]
    assert table[table.index("blocks.1") :][:4] == ["blocks.1", "2", "1", "17"]


@pytest.mark.slow
def test_diagnose(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same as the call; a pair or --float, a module's name or a file's, an object or a function."""
    spaces = load(folder, monkeypatch)
    model, float_model = spaces["pair"]()
    found = cptv_ao.diagnose(model, spaces["batches"], float_model=float_model, progress=False)
    by_pair = output(folder, "diagnose", "factory.py:pair", "--data", "factory:batches", "--json", "found.json")
    assert by_pair == f"{found}\n"
    assert json.loads((folder / "found.json").read_text()) == found.to_dict()
    given = ["factory:Holder.net", "--data", "factory:labelled", "--float", str(folder / "factory.py:float_model")]
    quiet = run(folder, "diagnose", *given, "--quiet")
    assert (quiet.stdout, quiet.stderr) == (by_pair, "")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_plan(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    model, float_model = load(here, monkeypatch)["pair"]()
    batches = load(here, monkeypatch)["batches"]
    found = cptv_ao.plan(model, batches, float_model=float_model, budget=0.5, progress=False)
    given = ["plan", "factory.py:pair", "--data", "factory.py:batches", "--budget", "0.5", "--quiet"]
    assert main([*given, "--json", str(here / "plan.json")]) == 0
    assert capsys.readouterr().out == f"{found}\n"
    assert json.loads((here / "plan.json").read_text()) == found.to_dict()


@pytest.mark.slow
def test_refine(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file holds what the call finds."""
    given = ["refine", "factory.py:pair", "--data", "factory.py:batches", "--paper", "3", "--seed", "5"]
    printed = output(folder, *given, "--out", "found.safetensors", "--json", "report.json", "--checkpoint", "state")
    assert printed.startswith("cptv_ao.refine: ")
    report = json.loads((folder / "report.json").read_text())
    assert (report["loss"], report["seed"]) == ("infonce", 5)
    assert (folder / "state").exists()

    spaces = load(folder, monkeypatch)
    model, float_model = spaces["pair"]()
    config = cptv_ao.RefineConfig.paper(3, seed=5)
    refined = cptv_ao.refine(model, spaces["batches"], float_model=float_model, config=config, progress=False)
    assert report["after"]["search"] == cptv_ao.report(refined).after.search
    fresh = cptv_ao.load_scales(spaces["converted"](), folder / "found.safetensors")
    assert torch.equal(fresh(spaces["batches"][0]), refined(spaces["batches"][0]))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_seconds(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["refine", "factory.py:pair", "--data", "factory.py:batches", "--seconds", "1e-2", "--out", "scales"]
    assert main([*given, "--quiet", "--json", "r.json"]) == 0
    assert capsys.readouterr().out.startswith("cptv_ao.refine: ")
    told = json.loads((here / "r.json").read_text())
    assert told["settings"]["max_seconds"] == "0.01"
    # On a slow machine they pay for nothing, and it is not begun.
    assert told["status"] == "BUDGET" or "max_seconds=0.01 pays for nothing here" in told["notes"][0]
    assert (here / "scales").exists()


DATA = ("--data", "factory.py:batches")
OUT = ("--out", "scales.safetensors")
MISTAKES = {
    "no command": ((), "the following arguments are required: {inspect,diagnose,plan,refine}"),
    "no data": (("diagnose", "factory.py:pair"), "required: --data"),
    "no out": (("refine", "factory.py:pair", *DATA), "required: --out"),
    "no such module": (("inspect", "nowhere.at.all:pair"), "no module 'nowhere.at.all' here or among the installed"),
    "no such file": (("inspect", "nowhere.py:pair"), "nowhere.py: no such file"),
    "no such name": (("inspect", "factory.py:missing"), "factory.py has no 'missing'"),
    "no name": (("inspect", "factory.py"), "expected package.module:name or path/to/file.py:name"),
    "an empty name": (("inspect", "factory.py:"), "expected package.module:name or path/to/file.py:name"),
    "a relative module": (("inspect", ".factory:pair"), "no module '.factory'"),
    "an argument": (("inspect", "factory.py:needs"), "called without arguments (missing a required argument: 'what')"),
    "a float model": (("inspect", "factory.py:float_model"), "(a GraphModule) or a pair (converted model, float mode"),
    "batches as the model": (("inspect", "factory.py:batches"), "got (Tensor, Tensor, Tensor, Tensor)"),
    "a prepared model": (("inspect", "factory.py:prepared"), "expected a converted model, got one that is only prep"),
    "a model as data": (("diagnose", "factory.py:pair", "--data", "factory.py:float_model"), "an iterable of batches"),
    "data as float": (
        ("diagnose", "factory.py:pair", *DATA, "--float", "factory:batches"),
        "(an nn.Module), got tuple",
    ),
    "one tensor": (
        ("diagnose", "factory.py:pair", "--data", "beside:CLASSES"),
        "expected an iterable of batches, got i",
    ),
    "a reference model": (("refine", "factory.py:reference", *DATA, *OUT), "got a reference model"),
    "no attention": (("refine", "factory.py:plain", *DATA, *OUT, "--paper", "3"), "searches attention layers (*attn*)"),
    "seconds": (("refine", "factory.py:pair", *DATA, *OUT, "--seconds", "-1"), "expected a finite number > 0, got -1"),
    "a budget": (("plan", "factory.py:pair", *DATA, "--budget", "5"), "expected a share, above 0 and up to 1, got 5"),
    "seed": (("refine", "factory.py:pair", *DATA, *OUT, "--seed", "x"), "expected an integer >= 0, got x"),
    "bits": (("refine", "factory.py:pair", *DATA, *OUT, "--paper", "9"), "invalid choice: 9"),
    "no folder": (
        ("refine", "factory.py:pair", *DATA, "--out", "no/scales"),
        "the folder no does not exist; create it first",
    ),
    "a folder": (
        ("diagnose", "factory.py:pair", *DATA, "--json", "."),
        "expected the path of a file, got the folder .",
    ),
    "seconds without end": (
        ("refine", "factory.py:pair", *DATA, *OUT, "--seconds", "1e999"),
        "a finite number > 0, got",
    ),
    "seconds in words": (
        ("refine", "factory.py:pair", *DATA, *OUT, "--seconds", "one"),
        "a finite number > 0, got one",
    ),
    "no number": (("refine", "factory.py:pair", *DATA, *OUT, "--seconds", "nan"), "a finite number > 0, got nan"),
    "a device": (("refine", "factory.py:pair", *DATA, "--out", "/dev/full"), "of a file, got a device, /dev/full"),
    "its own output": (("refine", "factory.py:pair", *DATA, "--out", "/dev/stdout"), "--out: "),
    "one file": (("refine", "factory.py:pair", *DATA, *OUT, "--json", OUT[1]), "--out and --json are the same file"),
    "by another spelling": (
        ("refine", "factory.py:pair", *DATA, *OUT, "--checkpoint", f"./{OUT[1]}"),
        "--out and --checkpoint are the same file",
    ),
    "its symlink": (("refine", "factory.py:pair", *DATA, "--out", "a", "--json", "to_a"), "--out and --json are the s"),
    "its hard link": (
        ("refine", "factory.py:pair", *DATA, *OUT, "--checkpoint", "beside.py", "--json", "hard"),
        "--checkpoint and --json are the same file",
    ),
    "the model's code": (("refine", "factory.py:pair", *DATA, "--out", "factory.py"), "would overwrite factory.py"),
    "the data's code": (
        ("diagnose", "nowhere:pair", "--data", "factory:batches", "--json", "./factory.py"),
        "--json would overwrite factory.py, which factory:batches is in",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_mistake_is_told_in_one_line(here: Path, mistake: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, told = MISTAKES[mistake]
    (here / "to_a").symlink_to("a")
    os.link(here / "beside.py", here / "hard")
    before = {path.name: path.lstat().st_ino for path in here.iterdir()}
    try:
        code: Any = main(list(arguments))
    except SystemExit as left:
        code = left.code
    printed = capsys.readouterr()
    assert code == 2
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert line.startswith("cptv_ao: error: ")
    assert told in line
    after = {path.name: path.lstat().st_ino for path in here.iterdir() if path.name != "__pycache__"}
    assert after == before, "nothing was written"


@pytest.mark.slow
def test_a_mistake_ends_the_process_with_2(folder: Path) -> None:
    done = run(folder, "inspect", "nowhere:model")
    assert done.returncode == 2
    assert done.stderr == "cptv_ao: error: no module 'nowhere' here or among the installed packages\n"


def test_a_fault_in_the_users_code_keeps_its_traceback(here: Path) -> None:
    (here / "broken.py").write_text("import a_module_that_is_not_there\n")
    with pytest.raises(ModuleNotFoundError, match="a_module_that_is_not_there"):
        main(["inspect", "broken.py:model"])


def test_a_file_named_like_a_module_that_is_loaded(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "torch.py").write_text("model = 1\n")
    assert main(["inspect", "torch.py:model"]) == 2
    assert "another module is called 'torch' already; rename the file" in capsys.readouterr().err


@pytest.mark.slow
def test_the_example_of_the_help_works_when_pasted(folder: Path) -> None:
    told = output(folder, "--help")
    example = told[told.index("cat > tiny.py") : told.index("(-W ignore")]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1", PATH=path)
    example = example.replace("--seconds 10", "--seconds 1")
    done = subprocess.run(["bash", "-e", "-c", example], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("cptv_ao.diagnose: kl ")
    assert "cptv_ao.refine: " in done.stdout
    assert (folder / "scales.safetensors").exists()


@pytest.mark.parametrize("command", ["inspect", "diagnose", "refine"])
def test_each_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main([command, "--help"])
    assert left.value.code == 0
    told = capsys.readouterr().out
    assert told.startswith(f"usage: python -m cptv_ao {command}")
    assert "MODEL" in told


HEADS = """\
import torch
from torch import nn
from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

import cptv_ao

batches = torch.randn(64, 16, generator=torch.Generator().manual_seed(0)).split(16)


class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk, self.classes, self.age = nn.Linear(16, 16), nn.Linear(16, 5), nn.Linear(16, 1)

    def forward(self, x):
        x = self.trunk(x).relu()
        return {"classes": self.classes(x), "age": self.age(x), "label": self.classes(x).argmax(1)}


def pair():
    torch.manual_seed(0)
    net = Heads().eval()
    model = prepare_fx(net, cptv_ao.qconfig_mapping(weight_bits=4), (batches[0],))
    for images in batches:
        model(images)
    return convert_fx(model), net
"""


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_network_of_several_outputs(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "heads.py").write_text(HEADS)
    given = ["heads.py:pair", "--data", "heads.py:batches", "--quiet", "--json", "found.json"]
    for command, more, before in (("diagnose", [], "loss"), ("refine", ["--out", "scales.safetensors"], "before")):
        seconds = ["--seconds", "3"] if command == "refine" else []
        assert main([command, *given, *more, *seconds]) == 0
        found = json.loads((here / "found.json").read_text())
        assert [one["name"] for one in found["outputs"]] == ["classes", "age"]
        assert all(one[before] for one in found["outputs"])
        printed = capsys.readouterr().out
        assert "\nclasses " in printed and "\nage " in printed and "outputs left out: label (int64)" in printed
    sys.modules.pop("heads")
