"""The errors of docs/troubleshooting.md, by heading: what to do to meet each."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

REPRODUCTIONS: dict[str, Callable[[Path, pytest.MonkeyPatch], object]] = {}


def reproduces(heading: str) -> Callable[[Callable[..., object]], Callable[..., object]]:
    """Register a function of at most these two arguments, which raises the error of that heading."""

    def register(function: Callable[..., object]) -> Callable[..., object]:
        assert heading not in REPRODUCTIONS
        count = function.__code__.co_argcount
        REPRODUCTIONS[heading] = lambda *given: function(*given[:count])
        return function

    return register
