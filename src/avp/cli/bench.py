"""`avp bench …`: each benchmark is a module of `avp.bench` with a click command named `command`."""

from __future__ import annotations

import click

from avp.bench import chain, engines, latent, llamacpp, net, perf


@click.group()
def bench() -> None:
    """Measure AVP, with its baselines in the same run. Every benchmark writes one JSON document."""


bench.add_command(chain.command, "chain")
bench.add_command(latent.command, "latent")
bench.add_command(perf.command, "perf")
bench.add_command(net.command, "net")
bench.add_command(engines.command, "engines")
bench.add_command(llamacpp.command, "llamacpp")
