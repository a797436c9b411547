"""Write docs/cli.md: the help page of every command, as click prints it.

python docs/make_cli.py            # writes docs/cli.md
python docs/make_cli.py --print    # prints it instead
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import click

from avp.cli import cli

PAGE = Path(__file__).parent / "cli.md"
WIDTH = 80
MISSING = "**Not importable where this page was made**"
INTRODUCTION = """\
# Command line

`pip install "avp[cli]"` brings the `avp` command; commands that run a model need `avp[hf]`. This page is made by
`docs/make_cli.py` from the commands themselves, and a test keeps it so.

Answers go to stdout, progress to stderr. An error is one message, without a traceback, and exit code 2.
"""


def page() -> str:
    """The whole page."""
    return "\n".join([INTRODUCTION, *sections(cli, parent=None, name="avp")])


def sections(command: click.Command, *, parent: click.Context | None, name: str) -> Iterator[str]:
    """The section of a command, then those of its subcommands; one that cannot be imported has only its heading."""
    context = click.Context(command, parent=parent, info_name=name, terminal_width=WIDTH, max_content_width=WIDTH)
    depth = "#" * (context.command_path.count(" ") + 2)
    text = "\n".join(line.rstrip() for line in command.get_help(context).splitlines())
    yield f"{depth} {context.command_path}\n\n```text\n{text}\n```\n"
    if isinstance(command, click.Group):
        for each in command.list_commands(context):
            try:
                subcommand = command.get_command(context, each)
            except (ImportError, AttributeError) as error:
                yield f"{depth}# {context.command_path} {each}\n\n{MISSING}: {error}\n"
                continue
            if subcommand is None:
                raise LookupError(f"{context.command_path} lists {each} but does not have it")
            yield from sections(subcommand, parent=context, name=each)


def main() -> None:
    """Write or print the page; exit code 1 if a command is missing from it."""
    text = page()
    if sys.argv[1:] == ["--print"]:
        sys.stdout.write(text)
    else:
        PAGE.write_text(text)
    if MISSING in text:
        sys.exit("a command could not be imported: see the page")


if __name__ == "__main__":
    main()
