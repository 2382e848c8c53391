"""Models and data for the command line, from `package.module:name` or `path/to/file.py:name`."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Iterable
from operator import attrgetter
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn
from torch.fx import GraphModule


class UserError(Exception):
    """Something that the user can put right; the text is one line for stderr."""


def load_model(spec: str) -> tuple[GraphModule, nn.Module | None]:
    """A converted model and, where the factory returns a pair, its float model.

    Raises:
        UserError: no such module or name, or it gives something else.
    """
    made = _load(spec)
    pair = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(pair[0], GraphModule) or not (pair[1] is None or isinstance(pair[1], nn.Module)):
        got = f"({', '.join(type(part).__name__ for part in made)})" if isinstance(made, tuple) else type(made).__name__
        raise UserError(
            f"{spec}: expected a converted model (a GraphModule) or a pair (converted model, float model), got {got}"
        )
    return pair


def load_float_model(spec: str) -> nn.Module:
    """A float model.

    Raises:
        UserError: no such module or name, or it gives something else.
    """
    made = _load(spec)
    if not isinstance(made, nn.Module):
        raise UserError(f"{spec}: expected a float model (an nn.Module), got {type(made).__name__}")
    return made


def load_data(spec: str) -> Iterable[Any]:
    """An iterable of batches.

    Raises:
        UserError: no such module or name, or it gives something else.
    """
    made = _load(spec)
    if not isinstance(made, Iterable) or isinstance(made, str):
        raise UserError(f"{spec}: expected an iterable of batches, got {type(made).__name__}")
    return made


def _load(spec: str) -> Any:
    """The object of this name, or what the function of this name returns when it is called without arguments."""
    source, colon, name = spec.rpartition(":")
    if not (source and colon and name):
        raise UserError(f"{spec}: expected package.module:name or path/to/file.py:name")
    module = _module(source)
    try:
        found = attrgetter(name)(module)
    except AttributeError:
        raise UserError(f"{spec}: {source} has no {name!r}") from None
    if isinstance(found, nn.Module) or not callable(found):
        return found
    try:
        inspect.signature(found).bind()
    except TypeError as error:
        raise UserError(f"{spec}: expected something to be called without arguments ({error})") from None
    return found()


def _module(source: str) -> ModuleType:
    if not source.endswith(".py"):
        return _imported(source, f"no module {source!r} here or among the installed packages")
    path = Path(source).resolve()
    if not path.is_file():
        raise UserError(f"{source}: no such file")
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))  # as if it were run: what lies beside it can be imported
    module = _imported(path.stem, f"{source}: cannot be imported as {path.stem!r}; a name without dots can")
    if Path(str(getattr(module, "__file__", ""))).resolve() != path:
        raise UserError(f"{source}: another module is called {path.stem!r} already; rename the file")
    return module


def _imported(name: str, otherwise: str) -> ModuleType:
    """An import that fails further down is a fault in the user's code, whose traceback is wanted."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            raise UserError(otherwise) from None
        raise
    except (ValueError, TypeError) as error:  # an empty part, a relative name
        raise UserError(f"{otherwise} ({error})") from None
