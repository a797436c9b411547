"""The command line: one module per command group, imported when the command is run."""

from __future__ import annotations

import importlib
import sys
from types import MappingProxyType
from typing import cast

from avp.errors import AVPError, MissingExtra
from avp.registry import missing_extra

try:
    import click
except ImportError as error:
    raise missing_extra(error, feature="the avp command") from error

# command -> "module:attribute" and the line shown in the list of commands.
_COMMANDS = MappingProxyType(
    {
        "ask": ("avp.cli.ask:ask", "Ask another agent, and go on from a context that it keeps."),
        "bench": ("avp.cli.bench:bench", "Measure: chains of agents, bytes, seconds, memory."),
        "demo": ("avp.cli.demo:demo", "Four agents, four ways to hand over, side by side."),
        "explain": ("avp.cli.explain:explain", "What is possible between two agents, and what it costs."),
        "fetch": ("avp.cli.handles:fetch", "Write the context of a handle to a file."),
        "hello": ("avp.cli.hello:hello", "What another agent says of itself."),
        "inspect": ("avp.cli.inspect:inspect", "Show what a bundle holds, from its header alone."),
        "models": ("avp.cli.models:models", "List, get and remove the models that need no hub."),
        "renew": ("avp.cli.handles:renew", "Begin the time of a handle again."),
        "revoke": ("avp.cli.handles:revoke", "End a handle."),
        "send": ("avp.cli.send:send", "Hand a context, or a prompt, over to another agent."),
        "serve": ("avp.cli.serve:serve", "Serve a model as an agent."),
        "store": ("avp.cli.store:store", "Look after a store of segments."),
    }
)


class _Lazy(click.Group):
    """Imports a command when it is asked for, so that `avp --help` needs no torch."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module, attribute = _COMMANDS[cmd_name][0].split(":")
        try:
            return cast(click.Command, vars(importlib.import_module(module))[attribute])
        except MissingExtra:
            raise
        except ImportError as error:
            if (error.name or "").partition(".")[0] == "avp":
                raise
            raise missing_extra(error, feature=f"avp {cmd_name}") from error

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in sorted(_COMMANDS.items())])


@click.group(cls=_Lazy)
@click.version_option(package_name="avp")
def cli() -> None:
    """AVP: LLM agents hand over their KV-cache instead of text."""


def main() -> None:
    """Entry point of the `avp` command: errors of ours are one message and exit code 2, without a traceback."""
    try:
        sys.exit(cli(standalone_mode=False) or 0)
    except click.Abort:
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except AVPError as error:
        click.echo(f"{type(error).__name__}: {error}", err=True)
        sys.exit(2)
