"""Do latent steps help? A password in the prompt, recalled after nothing, after noise, and after each method's steps.

Every arm sees the same prompts and the same question; only what lies between differs. Noise is the control: a method
that lies within the noise arm's interval has shown nothing.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import click
import torch
from transformers.utils.logging import disable_progress_bar

from avp.bench.results import environment, wilson, write_json
from avp.connectors.huggingface import HuggingFaceConnector

ARMS = ("no context", "zero steps", "noise", "norm", "soft", "ridge")
_WORDS = (
    "amber",
    "birch",
    "cobalt",
    "delta",
    "ember",
    "falcon",
    "garnet",
    "harbor",
    "indigo",
    "juniper",
    "kestrel",
    "lagoon",
)
_PLACES = (
    "the garage",
    "the safe",
    "the office",
    "the archive",
    "the cellar",
    "the boat",
    "the server room",
    "the studio",
)


@dataclass(frozen=True, slots=True)
class Item:
    """One prompt and the password that it holds."""

    prompt: str
    question: str
    password: str


def items(count: int, *, seed: int) -> list[Item]:
    """Prompts of some 60 tokens with two passwords each, one of which is asked for."""
    draw = random.Random(seed)
    made: list[Item] = []
    for _ in range(count):
        places = draw.sample(_PLACES, 2)
        passwords = [f"{draw.choice(_WORDS)}-{draw.randint(100, 999)}" for _ in places]
        told = " ".join(f"The password of {place} is {word}." for place, word in zip(places, passwords, strict=True))
        asked = draw.randrange(2)
        made.append(
            Item(
                f"Remember this. {told} Think about it.", f"What is the password of {places[asked]}?", passwords[asked]
            )
        )
    return made


def recall(connector: HuggingFaceConnector, item: Item, arm: str, *, steps: int, new_tokens: int) -> bool:
    """Whether the answer holds the password."""
    context = None
    if arm == "zero steps":
        context = connector.think(item.prompt, steps=0)
    elif arm != "no context":
        context = connector.think(item.prompt, steps=steps, method=arm)
    answer = connector.generate(item.question, context=context, max_new_tokens=new_tokens)
    return item.password in answer


@click.command()
@click.option("--model", default="smollm2", show_default=True, help="Built-in name, folder, .gguf file or hub id.")
@click.option("--limit", default=100, show_default=True, help="Prompts in each arm.")
@click.option("--steps", default=20, show_default=True, help="Latent steps.")
@click.option("--new-tokens", default=20, show_default=True, help="Tokens of an answer at most.")
@click.option("--arms", default=",".join(ARMS), show_default=True, help="Arms to run, with commas.")
@click.option("--seed", default=0, show_default=True, help="Seed of prompts and noise.")
@click.option("--out", type=click.Path(path_type=Path), default=None, help="Folder for latent.json.")
@click.option("--json", "as_json", is_flag=True, help="Print the JSON document on standard output.")
def command(
    model: str, limit: int, steps: int, new_tokens: int, arms: str, seed: int, out: Path | None, as_json: bool
) -> None:
    """Recall of a password after zero steps, noise and latent steps by each method."""
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    disable_progress_bar()
    connector = HuggingFaceConnector.from_pretrained(model)
    asked = items(limit, seed=seed)
    torch.manual_seed(seed)
    rows: list[dict[str, object]] = []
    for arm in arms.split(","):
        hits = [
            recall(connector, item, arm, steps=steps, new_tokens=new_tokens)
            for item in track(asked, description=arm, console=console)
        ]
        low, high = wilson(sum(hits), len(hits))
        rows.append({"arm": arm, "hits": sum(hits), "n": len(hits), "low": low, "high": high, "recalled": hits})
        console.print(f"{arm}: {sum(hits)} of {len(hits)} ({low:.0%} to {high:.0%})")
    document: dict[str, object] = {
        "benchmark": "latent",
        "settings": {"model": model, "limit": limit, "steps": steps, "new_tokens": new_tokens, "seed": seed},
        "environment": environment(),
        "arms": rows,
    }
    if out is not None:
        write_json(document, out / "latent.json", echo=click.echo)
    if as_json:
        write_json(document, None, echo=click.echo)
