"""One agent in a process of its own: reads a job from standard input, writes its context to a file and its figures to
standard output. `python -m avp.bench.hop`; see `chain._process_hops`."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

from avp.bench.chain import relay_hop
from avp.bench.results import Settings
from avp.connectors.huggingface import HuggingFaceConnector
from avp.context import Context


def main() -> None:
    """Run the job."""
    job = json.load(sys.stdin)
    settings = Settings(**{**job["settings"], "modes": tuple(job["settings"]["modes"])})
    connector = HuggingFaceConnector.from_pretrained(settings.model)
    context = Context.load(job["context"]) if job["context"] else None
    hop, after = relay_hop(connector, context, job["prompt"], agent=job["agent"], steps=job["steps"], settings=settings)
    after.save(job["save"])
    sys.stdout.write("\n" + json.dumps(asdict(hop)) + "\n")


if __name__ == "__main__":
    main()
