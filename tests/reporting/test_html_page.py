"""The page of a report: whole, self-contained, true to the report, and safe with any name."""

from __future__ import annotations

import math
import os
import re
import stat
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from helpers.cases import Copies
from helpers.search import small_config

import cptv_ao
from cptv_ao.reporting.html_page import page

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)> $\\frac{ &amp; \"' --> ]]> 漢字"
VOID = {"meta", "br", "img", "wbr", "input", "link"}


class Parsed(HTMLParser):
    """Tags, attributes, rows and text of a page; fails where tags are not balanced."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.rows: list[list[str]] = []
        self.words = ""
        self._open: list[str] = []
        self._cell = False
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self._open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self._cell = True

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag
        self._cell = self._cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        self.words += data
        if self._cell:
            self.rows[-1][-1] += data


class Part:
    """A block of a diagnosis."""

    def __init__(self, name: str, share: float, sqnr: float | None) -> None:
        self.name, self.share, self.sqnr = name, share, sqnr
        self.loss_without, self.cosine = 0.4 * (1 - share), 0.9712


class Site:
    """A site of a diagnosis."""

    def __init__(self, name: str, share: float | None, sqnr: float | None) -> None:
        self.name, self.share, self.sqnr, self.clipped, self.used = name, share, sqnr, 0.0123, 0.5


class Diagnosis:
    loss, simulated, least = 0.4, None, 0.0
    blocks = (Part("blocks.1", 0.431, 12.34), Part("head", -0.01, None), Part("tail", math.nan, math.inf))
    sites = (Site("blocks.1.fc", 0.25, math.inf), Site("head.fc", None, None))
    advice = ("Keep blocks.1 in float.",)


@pytest.fixture(scope="module")
def report(small_cases: Copies) -> cptv_ao.Report:
    conv = small_cases["conv"]
    config = small_config(evaluations=12, passes=2, population=("output_error",), seed=3)
    cptv_ao.refine(conv.converted, conv.batches, float_model=conv.float_model, config=config, progress=False)
    return cptv_ao.report(conv.converted)


def hostile(report: cptv_ao.Report) -> cptv_ao.Report:
    return replace(
        report,
        loss=HOSTILE,
        notes=(HOSTILE,),
        stages=(HOSTILE,),
        moves=tuple(replace(move, name=HOSTILE + move.name, block=HOSTILE) for move in report.moves),
        blocks=tuple(replace(block, name=HOSTILE) for block in report.blocks),
        settings={HOSTILE: HOSTILE},
    )


def test_it_says_what_the_report_says(report: cptv_ao.Report, tmp_path: Path) -> None:
    report = replace(report, notes=("the kernels differ",))
    path = tmp_path / "report.html"
    report.save_html(path, Diagnosis())
    parsed = Parsed(path.read_text(encoding="utf-8"))
    words = parsed.words
    assert words.index("on held-out images") < words.index(report.status.value[1:]) < words.index("loss,")
    for losses in (report.before, report.after):
        assert losses.holdout is not None
        assert f"{losses.search:.5g}" in words and f"{losses.holdout:.5g}" in words
    assert all(line in words for line in (*report.notes, *report.stages))
    rows = parsed.rows
    moved = {row[0]: row for row in rows if row[0] in {move.name for move in report.moves}}
    assert len(moved) == len(report.moves)
    for move in report.moves:
        assert moved[move.name][2:] == [f"{move.moved} of {move.scales}", str(move.zero_point), move.kind, move.block]
        ends = [float(end) for end in moved[move.name][1].split(" to ")]
        assert (ends[0], ends[-1]) == pytest.approx((2**move.low, 2**move.high), rel=5e-3)
    for name in {block.name for block in report.blocks}:
        visits = [block for block in report.blocks if block.name == name]
        accepted, tried = sum(v.accepted for v in visits), sum(v.evaluations for v in visits)
        assert [
            name,
            str(len(visits)),
            f"{accepted} of {tried}",
            f"{visits[0].before:.5g}",
            f"{visits[-1].after:.5g}",
        ] in rows
    assert ["blocks.1", "43 %", "0.2276", "12.3 dB", "0.9712"] in rows
    assert ["head", "-1.0 %", "0.404", "-", "0.9712"] in rows
    assert ["tail", "-", "-", "exact", "0.9712"] in rows
    assert ["blocks.1.fc", "25 %", "exact", "1.2 %", "50 %"] in rows
    assert ["head.fc", "-", "-", "1.2 %", "50 %"] in rows
    assert Diagnosis.advice[0] in words
    assert ["seed", "3", "changed"] in rows
    assert ["holdout", "0.25", "changed"] in rows
    assert ["racing", "True", ""] in rows


def test_it_needs_no_network_and_no_script(report: cptv_ao.Report) -> None:
    text = page(report, Diagnosis(), Diagnosis())
    assert "//" not in text.replace("<!DOCTYPE", ""), "no address of anything"
    parsed = Parsed(text)
    assert {"script", "link", "iframe", "object", "img", "foreignObject"}.isdisjoint(parsed.tags)
    assert not re.search(r"@import|url\((?!#)", text)
    for name, value in parsed.attributes:
        assert not name.startswith("on")
        if name in ("src", "href", "xlink:href"):
            assert value is not None
            assert value.startswith("#")
    assert "prefers-color-scheme: dark" in text
    assert ("viewport", "width=device-width, initial-scale=1") in zip(
        [v for k, v in parsed.attributes if k == "name"],
        [v for k, v in parsed.attributes if k == "content"],
        strict=True,
    )


def test_plots_are_inside_in_the_colours_of_the_page(report: cptv_ao.Report) -> None:
    pytest.importorskip("matplotlib")
    text = page(report, Diagnosis())
    parsed = Parsed(text)
    assert parsed.tags.count("svg") == parsed.tags.count("figure") == 3
    ids = [value for name, value in parsed.attributes if name == "id"]
    assert len(ids) == len(set(ids)) > 20
    used = {value[1:] for name, value in parsed.attributes if name == "xlink:href" and value}
    used |= set(re.findall(r"url\(#([^)]+)\)", text))
    assert used
    assert used <= set(ids)
    drawn = "".join(re.findall(r"<svg.*?</svg>", text, re.DOTALL))
    assert {"var(--blue)", "var(--orange)", "currentColor"} <= set(re.findall(r"var\(--\w+\)|currentColor", drawn))
    assert set(re.findall(r"#[0-9a-fA-F]{6}", drawn)) == set(), "no colour that a dark theme would not change"
    defined = set(re.findall(r"(--\w+):", text))
    assert set(re.findall(r"var\((--\w+)\)", text)) <= defined


def test_it_is_the_same_each_time(report: cptv_ao.Report) -> None:
    assert page(report, Diagnosis()) == page(report, Diagnosis())


def test_hostile_names_are_text(report: cptv_ao.Report) -> None:
    given = hostile(report)
    bad = Diagnosis()
    bad.blocks, bad.sites, bad.advice = (Part(HOSTILE, 0.5, 1.0),), (Site(HOSTILE, 0.5, 1.0),), (HOSTILE,)
    text = page(given, bad)
    parsed = Parsed(text)
    assert {"script", "img"}.isdisjoint(parsed.tags)
    assert not any(name.startswith("on") for name, _ in parsed.attributes)
    firsts = [row[0] for row in parsed.rows]
    assert firsts.count(HOSTILE) == 4, "of block visits, of the diagnosis, of its sites, of the settings"
    assert all(HOSTILE + move.name in firsts for move in report.moves)
    assert parsed.words.count(HOSTILE) >= 3 + len(report.moves) + 4
    assert "<!--" not in text


def test_long_tables_are_folded(report: cptv_ao.Report) -> None:
    one = report.moves[0]
    many = replace(report, moves=tuple(replace(one, name=f"site {i}") for i in range(100)))
    few = replace(report, moves=(one,), settings={})
    assert page(many).count("<details>") == 2, "sites and settings"
    assert page(few).count("<details>") == 0


def test_without_matplotlib_it_has_the_tables(report: cptv_ao.Report, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    text = page(report)
    parsed = Parsed(text)
    assert "svg" not in parsed.tags
    assert "pip install 'cptv_ao[plot]'" in parsed.words
    assert report.moves[0].name in {row[0] for row in parsed.rows}


def test_a_search_that_found_nothing(report: cptv_ao.Report) -> None:
    bare = replace(
        report, status=cptv_ao.Status.UNCHANGED, moves=(), blocks=(), stages=(), history=(), settings={},
        before=replace(report.before, holdout=None), after=replace(report.before, holdout=None),
    )  # fmt: skip
    text = page(bare)
    parsed = Parsed(text)
    assert "Unchanged" in parsed.words and "no change" in parsed.words
    assert "svg" not in parsed.tags
    assert "<section></section>" not in text
    assert "held-out" not in parsed.words


@pytest.mark.parametrize("status", cptv_ao.Status)
def test_every_status_leads_the_page(report: cptv_ao.Report, status: cptv_ao.Status) -> None:
    parsed = Parsed(page(replace(report, status=status, history=(), moves=())))  # which no plot shows then
    assert "held-out images" in parsed.words.split("loss,")[0], "what was gained comes first"
    assert status.value[1:] in parsed.words


def test_it_is_written_at_once(report: cptv_ao.Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.html"
    path.write_text("the last one")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("cptv_ao.core.atomic_file.os.replace", full)
        with pytest.raises(OSError, match="No space left"):
            report.save_html(path)
    assert path.read_text() == "the last one"
    assert list(tmp_path.iterdir()) == [path]
    report.save_html(str(path))
    assert path.read_text(encoding="utf-8").endswith("</html>\n")
    with pytest.raises(FileNotFoundError):
        report.save_html(tmp_path / "absent" / "report.html")
    before = os.umask(0o022)
    try:
        report.save_html(tmp_path / "public.html")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "public.html").stat().st_mode) == 0o644, "others may read it, as any new file"


@pytest.mark.slow
def test_the_example_writes_what_it_says(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    pytest.importorskip("timm")
    script = Path(__file__).parents[2] / "examples" / "plots.py"
    command = [sys.executable, "-W", "ignore", str(script), "--seconds", "4", "--out", "here"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    files = {path.name for path in (tmp_path / "here").iterdir()}
    assert files == {"report.html", "search.jsonl"} | {
        f"{name}.png" for name in ("losses", "movement", "sensitivity", "codes_given", "codes_refined", "codes_output")
    }
    assert {f"wrote here/{name}" for name in files} <= set(done.stdout.splitlines())
    assert {path.name for path in tmp_path.iterdir()} == {"here"}
    parsed = Parsed((tmp_path / "here" / "report.html").read_text(encoding="utf-8"))
    assert parsed.tags.count("svg") == 3
    assert "blocks.0.attn.qkv.weight" in {row[0] for row in parsed.rows}
