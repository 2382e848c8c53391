"""Sphinx: `pip install -e '.[docs]' && python -m sphinx -W -b html docs build/docs`, then open build/docs/index.html.

The pages are Markdown; the API reference is made of `cptv_ao.__all__` and the docstrings, so that no name is forgotten.
"""

from __future__ import annotations

import inspect
import warnings
from types import ModuleType
from typing import Any

import cptv_ao

project = "cptv_ao"
author = "the authors of cptv_ao"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = "cptv_ao"
html_show_copyright = html_show_sourcelink = False
myst_heading_anchors = 3
default_role = "literal"  # single backticks in the docstrings are code
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
exclude_patterns = ["_build"]


def entry(name: str) -> tuple[str, str]:
    """The heading that a public name stands under, and the directive that documents it."""
    found = getattr(cptv_ao, name)
    if isinstance(found, ModuleType):
        return "Modules", f".. automodule:: {found.__name__}\n   :members:"
    if inspect.isclass(found) and issubclass(found, BaseException):
        return "Errors and warnings", f".. autoexception:: cptv_ao.{name}\n   :show-inheritance:"
    if inspect.isclass(found):
        return "Classes", f".. autoclass:: cptv_ao.{name}\n   :members:"
    if callable(found):
        return "Functions", f".. autofunction:: cptv_ao.{name}"
    return "Values", f".. autodata:: cptv_ao.{name}"


def reference() -> str:
    """The body of the API page, in Markdown: every name of `cptv_ao.__all__`, under its heading."""
    entries = [entry(name) for name in sorted(cptv_ao.__all__, key=str.lower)]
    parts = []
    for heading in ("Functions", "Classes", "Values", "Modules", "Errors and warnings"):
        directives = [directive for under, directive in entries if under == heading]
        if directives:
            parts += [f"## {heading}", *(f"```{{eval-rst}}\n{directive}\n```" for directive in directives)]
    return "\n\n".join(parts)


def fill(app: Any, page: str, source: list[str]) -> None:
    """Put the reference in its place on the page `api`."""
    if page == "api":
        source[0] = source[0].replace("<!-- reference -->", reference())


def setup(app: Any) -> None:
    warnings.simplefilter("ignore")  # of torch.ao, when the lazy names of cptv_ao are loaded
    app.connect("source-read", fill)
