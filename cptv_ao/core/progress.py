"""A progress bar on stderr."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Advance(Protocol):
    """Moves a bar by some steps, and says beside it what is going on."""

    def __call__(self, told: str, steps: int = 1, /) -> None: ...


@contextmanager
def progress_bar(title: str, total: int | None, enabled: bool) -> Iterator[Advance]:
    """A tqdm bar over so many steps, or over nobody knows how many; none where it is not enabled."""
    if not enabled:
        yield _unseen
        return
    from tqdm.auto import tqdm

    with tqdm(total=total, desc=title, unit="step") as bar:

        def advance(told: str, steps: int = 1, /) -> None:
            bar.set_postfix_str(told, refresh=False)
            bar.update(steps)

        yield advance


def _unseen(told: str, steps: int = 1, /) -> None:
    """Moves nothing."""
