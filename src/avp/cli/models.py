"""`avp models …`: the models that need no hub, here and to be had."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass

import click
from rich.console import Console
from rich.table import Table

from avp.cli.progress import get_model
from avp.connectors import models as catalogue

_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class _Row:
    """One built-in model; sizes are bytes, and `path` is where its checkpoint lies or would lie."""

    name: str
    title: str
    licence: str
    chat: bool
    installed: bool
    converted: bool
    download_bytes: int
    disk_bytes: int
    path: str


@click.group(invoke_without_command=True)
@click.pass_context
def models(ctx: click.Context) -> None:
    """The models that need no hub: list them (the default), get one, remove one."""
    if ctx.invoked_subcommand is None:
        ctx.invoke(list_models, as_json=False)


@models.command("list")
@click.option("--json", "as_json", is_flag=True, help="One JSON list.")
def list_models(*, as_json: bool) -> None:
    """List the models: licence, size, whether they are here."""
    rows = _rows()
    if as_json:
        click.echo(json.dumps([asdict(row) for row in rows], indent=2))
        return
    table = Table(box=None, pad_edge=False)
    for heading in ("NAME", "MODEL", "LICENCE", "KIND", "DOWNLOAD", "HERE"):
        table.add_column(heading, justify="right" if heading == "DOWNLOAD" else "left")
    for row in rows:
        kind = "chat" if row.chat else "base"
        table.add_row(row.name, row.title, row.licence, kind, f"{row.download_bytes / _MIB:.0f} MiB", _here(row))
    Console(file=sys.stdout).print(table)


@models.command("get")
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of the path.")
def get(name: str, *, as_json: bool) -> None:
    """Fetch the model NAME and print where it lies.

    It is downloaded and made a transformers checkpoint; what is there already is not fetched again. Progress, licence
    and terms go to stderr.
    """
    folder = get_model(name)
    if as_json:
        click.echo(json.dumps(asdict(next(row for row in _rows() if row.name == name)), indent=2))
    else:
        click.echo(str(folder))


@models.command("remove")
@click.argument("name")
def remove(name: str) -> None:
    """Delete all files of the model NAME."""
    freed = catalogue.remove(name)
    click.echo(f"{name}: {freed / _MIB:.1f} MiB freed" if freed else f"{name}: was not here")


def _rows() -> list[_Row]:
    here = {model.name: size for model, size in catalogue.installed()}
    return [
        _Row(
            model.name,
            model.title,
            model.licence,
            model.chat,
            model.name in here,
            catalogue.converted(model.name).is_dir(),
            model.download_size,
            here.get(model.name, 0),
            str(catalogue.converted(model.name)),
        )
        for model in catalogue.BUILTIN.values()
    ]


def _here(row: _Row) -> str:
    if not row.installed:
        return "no"
    return f"{row.disk_bytes / _MIB:.0f} MiB" + ("" if row.converted else " GGUF")
