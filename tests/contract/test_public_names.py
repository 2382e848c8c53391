"""Whoever imports `cptv_ao` finds every name that its objects show, and one page lists them all."""

from __future__ import annotations

import ast
import inspect
import re
import typing
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from torch.fx import GraphModule

import cptv_ao

ROOT = Path(__file__).parents[2]


def types_in(annotation: Any) -> Iterator[type]:
    """Every class that an annotation names, `tuple[X, ...]` and `X | None` looked into."""
    if inspect.isclass(annotation) and not typing.get_args(annotation):
        yield annotation
    for part in typing.get_args(annotation):
        yield from types_in(part)


def shown_by(owner: type) -> set[type]:
    """Classes of this package among the fields and properties of a public class."""
    found: list[Any] = []
    if is_dataclass(owner):
        known = typing.get_type_hints(owner, localns={"GraphModule": GraphModule})
        found += [known[field.name] for field in fields(owner)]
    for name, member in inspect.getmembers(owner):
        if isinstance(member, property) and member.fget is not None and not name.startswith("_"):
            found.append(typing.get_type_hints(member.fget).get("return"))
    return {kind for hint in found for kind in types_in(hint) if kind.__module__.startswith("cptv_ao")}


def test_what_a_public_object_shows_is_public() -> None:
    public = {getattr(cptv_ao, name) for name in cptv_ao.__all__ if inspect.isclass(getattr(cptv_ao, name))}
    shown = {kind for owner in public for kind in shown_by(owner)}
    assert {cptv_ao.Losses, cptv_ao.SiteMove, cptv_ao.BlockResult, cptv_ao.BlockDiagnosis} <= shown
    assert sorted(kind.__name__ for kind in shown - public) == []


def test_every_name_is_there() -> None:
    assert len(set(cptv_ao.__all__)) == len(cptv_ao.__all__)
    assert [name for name in cptv_ao.__all__ if not hasattr(cptv_ao, name)] == []


def test_the_page_of_names_has_each_once() -> None:
    page = (ROOT / "docs" / "public-names.md").read_text()
    assert sorted(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)) == sorted(cptv_ao.__all__)


def test_examples_import_public_names_only() -> None:
    scripts = sorted((ROOT / "examples").glob("*.py"))
    assert len(scripts) >= 10
    for script in scripts:
        for node in ast.walk(ast.parse(script.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "cptv_ao":
                assert node.module in ("cptv_ao", "cptv_ao.callbacks", "cptv_ao.plot"), f"{script.name}: {node.module}"
                if node.module == "cptv_ao":
                    assert [alias.name for alias in node.names if alias.name not in cptv_ao.__all__] == [], script.name
            if isinstance(node, ast.Import):
                named = [alias.name for alias in node.names if alias.name.startswith("cptv_ao.")]
                assert [name for name in named if name not in ("cptv_ao.callbacks", "cptv_ao.plot")] == [], script.name


def test_public_objects_tell_of_each_field() -> None:
    """Fields are told of in the docstring, so that `help` and the API page need no source."""
    for name in cptv_ao.__all__:
        owner = getattr(cptv_ao, name)
        if inspect.isclass(owner) and is_dataclass(owner):
            told = set(
                re.findall(r"\b\w+\b", "\n".join(re.findall(r"^ {8}([\w, ]+):", owner.__doc__ or "", re.MULTILINE)))
            )
            assert [field.name for field in fields(owner) if field.name not in told] == [], name
