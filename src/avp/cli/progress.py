"""How far fetching and converting a model is, on stderr: bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, ProgressColumn, SpinnerColumn, Task, TaskID, TextColumn
from rich.progress import Progress as Bars
from rich.text import Text

from avp.connectors import models
from avp.connectors.models import BuiltinModel, Progress
from avp.registry import missing_extra

_MIB = 1 << 20


def ensure_model(name: str) -> None:
    """Fetch and convert the built-in model `name` if it is not there yet; any other name is left to the connector.

    Raises:
        ModelNotFound: it could not be fetched.
        MissingExtra: a library that the conversion needs is not installed.
    """
    if name in models.BUILTIN and not models.converted(name).is_dir():
        get_model(name)


def get_model(name: str) -> Path:
    """Fetch and convert the built-in model `name`, where that is still to do; show its licence; return its folder.

    Raises:
        ModelNotFound: no built-in model has that name, or it could not be fetched.
        MissingExtra: a library that the conversion needs is not installed.
    """
    model = models.builtin(name)
    with stages(model.title) as progress:
        progress("libraries", 0, 0)
        try:
            from avp.connectors import gguf
        except ImportError as error:
            raise missing_extra(error, feature=f"making {model.title} ready") from error
        progress("libraries", 1, 1)
        folder = gguf.convert(models.fetch(name, progress=progress), models.converted(name), progress=progress)
    _show_licence(model)
    return folder


@contextmanager
def stages(title: str) -> Iterator[Progress]:
    """Show the stages that the yielded `Progress` hears, on stderr, under this title.

    A stage that goes from nothing to all without a step between has no bytes to show: it gets a spinner and its time.
    """
    console = Console(file=sys.stderr)
    if not sys.stderr.isatty() or console.is_dumb_terminal:
        yield _Lines(title)
        return
    # The file is named: conversion puts another sys.stderr in place for a while.
    columns = (
        SpinnerColumn(finished_text="✓"),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        _Amount(),
        _Rate(),
    )
    with Bars(*columns, console=console) as bars:
        yield _Stages(title, bars=bars)


class _Lines:
    """One line when a stage begins, one when it is done."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._began: dict[str, float] = {}
        self._stepped: set[str] = set()
        self._ended: set[str] = set()

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage not in self._began:
            self._began[stage] = time.monotonic()
            click.echo(f"{self._title}: {stage} …", err=True)
        if 0 < done < total:
            self._stepped.add(stage)
        elif done and stage not in self._ended:  # all there may be told twice: by the last look, and by the end
            self._ended.add(stage)
            seconds = time.monotonic() - self._began[stage]
            amount = f"{total / _MIB:.1f} MiB, {_rate(total, seconds)}, " if stage in self._stepped else ""
            click.echo(f"{self._title}: {stage} done ({amount}{seconds:.1f} s)", err=True)


class _Stages:
    """A bar for each stage; without a total, that is a spinner, until the stage tells a number between none and all."""

    def __init__(self, title: str, *, bars: Bars) -> None:
        self._title = title
        self._bars = bars
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage not in self._tasks:
            self._tasks[stage] = self._bars.add_task(f"{self._title}: {stage}", total=None, counted=False)
        task = self._tasks[stage]
        if 0 < done < total:
            self._bars.update(task, completed=done, total=total, counted=True)
        elif done:
            self._bars.update(task, completed=done, total=total)


class _Amount(ProgressColumn):
    """Bytes done and to do, of a stage that counts them."""

    def __init__(self) -> None:
        super().__init__()
        self._bytes = DownloadColumn(binary_units=True)

    def render(self, task: Task) -> Text:
        return self._bytes.render(task) if task.fields["counted"] else Text("")


class _Rate(ProgressColumn):
    """Bytes per second over the whole stage, and its seconds so far."""

    def render(self, task: Task) -> Text:
        seconds = task.finished_time if task.finished_time is not None else task.elapsed or 0.0
        rate = f"{_rate(int(task.completed), seconds)} " if task.fields["counted"] else ""
        return Text(f"{rate}{seconds:.0f} s", style="progress.data.speed")


def _rate(amount: int, seconds: float) -> str:
    return f"{amount / _MIB / max(seconds, 1e-3):.1f} MiB/s"


def _show_licence(model: BuiltinModel) -> None:
    """Say the licence; terms beyond it are shown once, and once more after the model was removed and fetched again."""
    click.echo(f"{model.title}: licence {model.licence}", err=True)
    if not model.terms:
        return
    terms = models.terms(model.name)
    shown = terms.with_suffix(".shown")
    if shown.exists():
        return
    place = f"They lie at {terms}." if terms.is_file() else "They are where you took its GGUF file from."
    click.echo(f"{model.title} has terms of its own, the {model.licence}. {place}", err=True)
    click.echo("Using the model means accepting them.", err=True)
    with suppress(OSError):
        shown.touch()
