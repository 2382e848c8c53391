"""A progress bar on stderr."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol


class Advance(Protocol):
    """Moves a bar by some steps, and says beside it what is going on."""

    def __call__(self, told: str, steps: int = 1, /) -> None: ...


class Bar(Advance, Protocol):
    """A bar that also says lines above it, which stay."""

    def say(self, line: str) -> None: ...


@contextmanager
def progress_bar(title: str, total: int | None, enabled: bool, unit: str = "step") -> Iterator[Bar]:
    """A tqdm bar over so many steps, or over nobody knows how many; none where it is not enabled."""
    if not enabled:
        yield _Unseen()
        return
    from tqdm.auto import tqdm

    with tqdm(total=total, desc=title, unit=unit) as bar:
        yield _Seen(bar)


class _Seen:
    def __init__(self, bar: Any) -> None:
        self._bar = bar

    def __call__(self, told: str, steps: int = 1, /) -> None:
        self._bar.set_postfix_str(told, refresh=steps == 0)
        self._bar.update(steps)

    def say(self, line: str) -> None:
        self._bar.write(line, file=sys.stderr)


class _Unseen:
    def __call__(self, told: str, steps: int = 1, /) -> None:
        """Moves nothing."""

    def say(self, line: str) -> None:
        """Says nothing."""
