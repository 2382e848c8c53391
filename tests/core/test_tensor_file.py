"""Files of tensors and JSON data: what is written is read, and every damage is told."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.damage import check_damaged
from safetensors.torch import save_file

from cptv_ao.core.errors import ScalesFileError
from cptv_ao.core.tensor_file import read_file, write_file

TENSORS = {
    "scale": torch.rand(5, generator=torch.Generator().manual_seed(0)).double(),
    "codes": torch.ones(2, 3).char(),
}
DATA = {"name": "blocks.0", "losses": [0.1, None], "sites": {"a": 1}}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_file(tmp_path / "file", TENSORS, DATA)
    return tmp_path / "file"


def test_what_is_written_is_read(path: Path) -> None:
    tensors, data = read_file(path)
    assert tensors.keys() == TENSORS.keys()
    assert all(torch.equal(tensors[key], value) and tensors[key].dtype == value.dtype for key, value in TENSORS.items())
    assert data == {"version": 1, **DATA}


def test_a_view_is_written_as_it_looks(tmp_path: Path) -> None:
    turned = torch.arange(6.0).reshape(2, 3).T
    write_file(tmp_path / "file", {"a": turned}, {})
    assert torch.equal(read_file(tmp_path / "file")[0]["a"], turned)


def test_the_same_content_is_the_same_file(path: Path, tmp_path: Path) -> None:
    write_file(tmp_path / "again", TENSORS, DATA)
    assert (tmp_path / "again").read_bytes() == path.read_bytes()


def test_every_damage_is_told(path: Path) -> None:
    check_damaged(path.read_bytes())


def test_a_file_of_somebody_else_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "other")
    with pytest.raises(ScalesFileError, match="not one that cptv_ao wrote"):
        read_file(tmp_path / "other")
    with pytest.raises(ScalesFileError, match="something that is no file"):
        read_file(tmp_path)
