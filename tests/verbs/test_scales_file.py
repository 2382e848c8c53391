"""Scales in files: into a fresh conversion of the same model, and nowhere else."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import nets
from helpers.cases import Case
from helpers.damage import changed, check_damaged, flipped
from helpers.search import small_config
from helpers.state import everything, weights
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.fx import GraphModule

import cptv_ao
from cptv_ao.core.tensor_file import read_file


def refined(case: Case) -> Tensor:
    """Refine the case's model; its outputs."""
    config = small_config(evaluations=3, gradient_steps=8)
    cptv_ao.refine(case.converted, case.batches, float_model=case.float_model, config=config, progress=False)
    assert cptv_ao.report(case.converted).moves
    return case.converted(case.batches[0])


def test_a_fresh_conversion_gets_the_scales(case: Case, tmp_path: Path) -> None:
    fresh = case.copy().converted
    wanted = refined(case)
    cptv_ao.save_scales(case.converted, tmp_path / "scales.safetensors")
    assert not torch.equal(fresh(case.batches[0]), wanted)
    assert cptv_ao.load_scales(fresh, tmp_path / "scales.safetensors") is fresh
    assert torch.equal(fresh(case.batches[0]), wanted)
    assert [path.name for path in tmp_path.iterdir()] == ["scales.safetensors"], "nothing temporary is left"


def test_a_model_that_was_not_refined_is_saved_and_loaded_too(conv: Case, tmp_path: Path) -> None:
    given = conv.converted(conv.batches[0])
    cptv_ao.save_scales(conv.converted, tmp_path / "given")
    refined(conv)
    cptv_ao.load_scales(conv.converted, tmp_path / "given")
    assert torch.equal(conv.converted(conv.batches[0]), given)


def test_another_model_is_refused(conv: Case, functional: Case, tmp_path: Path) -> None:
    cptv_ao.save_scales(conv.converted, tmp_path / "conv")
    given = functional.converted(functional.batches[0])
    with pytest.raises(cptv_ao.ScalesFileError, match=r"conv is of another model: site 0 is .*'name': .* there and"):
        cptv_ao.load_scales(functional.converted, tmp_path / "conv")
    assert torch.equal(functional.converted(functional.batches[0]), given)


def test_the_same_network_of_other_parameters_is_refused(tmp_path: Path) -> None:
    """Codes and biases come with the file; what was left in float does not."""

    def converted(seed: int) -> GraphModule:
        float_model = nets.seeded(lambda: nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 4)), seed)
        mapping = nets.mapping().set_module_name("1", None)
        return nets.quantize(float_model, [nets.images(16, 6)], mapping=mapping)[1]

    one, again, other = converted(0), converted(0), converted(1)
    cptv_ao.save_scales(one, tmp_path / "scales")
    cptv_ao.load_scales(again, tmp_path / "scales")
    before = everything(other)
    with pytest.raises(cptv_ao.ScalesFileError, match=r"of another model: 1.weight holds other numbers there"):
        cptv_ao.load_scales(other, tmp_path / "scales")
    assert everything(other) == before


def test_a_shorter_model_is_refused(tmp_path: Path) -> None:
    layers = [nn.Linear(6, 6), nn.Linear(6, 6)]
    one, two = (
        nets.quantize(nets.seeded(lambda n=n: nn.Sequential(*layers[:n])), [nets.images(4, 6)])[1] for n in (1, 2)
    )
    cptv_ao.save_scales(two, tmp_path / "two")
    with pytest.raises(cptv_ao.ScalesFileError, match="another model: it has 5 sites, this one 3"):
        cptv_ao.load_scales(one, tmp_path / "two")


def drop(tensors: dict[str, Tensor], _: Any) -> None:
    del tensors["fc1.weight.codes"]


def reshape(tensors: dict[str, Tensor], _: Any) -> None:
    tensors["fc1.weight.scale"] = tensors["fc1.weight.scale"][:3].clone()


def poison(tensors: dict[str, Tensor], _: Any) -> None:
    tensors["fc1.weight.scale"][2] = float("nan")


def negate(tensors: dict[str, Tensor], _: Any) -> None:
    tensors["fc1.output.scale"].neg_()


def float_codes(tensors: dict[str, Tensor], _: Any) -> None:
    tensors["fc1.weight.codes"] = tensors["fc1.weight.codes"].float()


def version(_: Any, data: dict[str, Any]) -> None:
    data["version"] = 99


def no_sites(_: Any, data: dict[str, Any]) -> None:
    del data["sites"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (drop, r"fc1.weight.codes: expected torch.int8 of shape \(12, 128\), got nothing"),
        (reshape, r"fc1.weight.scale: expected torch.float64 of shape \(12,\), got .*\(3,\)"),
        (poison, r"fc1.weight: weight scale must be finite and > 0, got nan in channel 2"),
        (negate, "fc1.output: activation scale must be finite and > 0"),
        (float_codes, "fc1.weight.codes: expected torch.int8 .*, got torch.float32"),
        (version, "expected version 1, got 99"),
        (no_sites, "expected the site table of a model, found none"),
    ],
)
def test_a_wrong_file_changes_nothing(conv: Case, tmp_path: Path, change: Any, told: str) -> None:
    path = tmp_path / "scales"
    cptv_ao.save_scales(conv.converted, path)
    changed(path, change)
    given = conv.converted(conv.batches[0])
    with pytest.raises(cptv_ao.CptvError, match=told):
        cptv_ao.load_scales(conv.converted, path)
    assert torch.equal(conv.converted(conv.batches[0]), given)


@pytest.mark.parametrize("size", [0, 4, 200, -10])
def test_a_truncated_file_is_refused(conv: Case, tmp_path: Path, size: int) -> None:
    path = tmp_path / "scales"
    cptv_ao.save_scales(conv.converted, path)
    whole = path.read_bytes()
    path.write_bytes(whole[:size])
    with pytest.raises(cptv_ao.ScalesFileError, match="not a whole safetensors file"):
        cptv_ao.load_scales(conv.converted, path)


@pytest.mark.parametrize("content", [b"\x80\x04garbage" * 50, b"\xff" * 64, json.dumps({"a": 1}).encode()])
def test_a_garbled_file_is_refused(conv: Case, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "scales").write_bytes(content)
    with pytest.raises(cptv_ao.ScalesFileError, match="not a whole safetensors file"):
        cptv_ao.load_scales(conv.converted, tmp_path / "scales")


def test_a_file_with_one_bit_turned_is_refused(conv: Case, tmp_path: Path) -> None:
    cptv_ao.save_scales(conv.converted, tmp_path / "scales")
    whole, given = (tmp_path / "scales").read_bytes(), weights(conv.converted)
    check_damaged(whole)
    for bad in flipped(whole, 20, seed=2):
        (tmp_path / "scales").write_bytes(bad)
        with pytest.raises(cptv_ao.ScalesFileError):
            cptv_ao.load_scales(conv.converted, tmp_path / "scales")
    assert weights(conv.converted) == given


def test_the_same_scales_are_the_same_file(conv: Case, tmp_path: Path) -> None:
    for name in ("a", "b"):
        cptv_ao.save_scales(conv.converted, tmp_path / name)
    content = (tmp_path / "a").read_bytes()
    assert content == (tmp_path / "b").read_bytes()
    read_elsewhere = load_file(tmp_path / "a")
    assert torch.equal(read_elsewhere["fc1.weight.codes"], conv.converted.fc1.weight().int_repr())


def test_files_without_a_checksum_are_refused(tmp_path: Path) -> None:
    save_file({"a": torch.ones(3)}, tmp_path / "old", {"cptv_ao": json.dumps({"version": 1, "sites": []})})
    with pytest.raises(cptv_ao.ScalesFileError, match="checksum"):
        read_file(tmp_path / "old")


@pytest.mark.parametrize(
    "header",
    [
        b"[]",
        b"3",
        b"null",
        b'{"__metadata__": 3}',
        b'{"__metadata__": {"cptv_ao": 3}}',
        b'{"__metadata__": {"cptv_ao": "["}}',
        b'{"__metadata__": {"cptv_ao": "' + b"[" * 100_000 + b'"}}',
        b"[" * 100_000,
        b'{"__metadata__": {"cptv_ao": "{\\"version\\": 1}"}}',
    ],
)
def test_odd_headers_are_refused(tmp_path: Path, header: bytes) -> None:
    (tmp_path / "odd").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(cptv_ao.ScalesFileError, match="odd: "):
        read_file(tmp_path / "odd")


def test_a_file_of_something_else_is_refused(conv: Case, tmp_path: Path) -> None:
    save_file({"a": torch.ones(3)}, tmp_path / "other")
    with pytest.raises(cptv_ao.ScalesFileError, match="not one that cptv_ao wrote"):
        cptv_ao.load_scales(conv.converted, tmp_path / "other")
    with pytest.raises(FileNotFoundError):
        cptv_ao.load_scales(conv.converted, tmp_path / "absent")


def test_an_old_file_stays_when_writing_fails(conv: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "scales"
    cptv_ao.save_scales(conv.converted, path)
    before = path.read_bytes()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("cptv_ao.verbs.scales_file.os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        cptv_ao.save_scales(conv.converted, path)
    assert path.read_bytes() == before
    assert [found.name for found in tmp_path.iterdir()] == ["scales"]


def test_copies_share_nothing(conv: Case, tmp_path: Path) -> None:
    other = copy.deepcopy(conv.converted)
    refined(conv)
    cptv_ao.save_scales(conv.converted, tmp_path / "scales")
    cptv_ao.load_scales(other, tmp_path / "scales")
    wanted = conv.converted(conv.batches[0])
    other.fc1.scale *= 2
    assert torch.equal(conv.converted(conv.batches[0]), wanted)
