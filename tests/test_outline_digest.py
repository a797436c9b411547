"""What is told of a context beside its KV is checked as its KV is."""

from __future__ import annotations

from dataclasses import replace

import pytest

from avp.context import Context, Turn
from avp.delta import outline, outline_from_items, outline_to_items
from avp.errors import BundleError
from avp.segment import LATENT

from .samples import described, kv_context

SAID = (Turn({"role": "user", "content": "hé"}, (0, 40)),)
CONTEXT = kv_context(range(40), pending=(3,), turns=SAID, template={"date": "today"})
LATE = kv_context([*range(38), LATENT, LATENT], turns=SAID)


@pytest.mark.parametrize("context", [CONTEXT, LATE], ids=["ids", "latent"])
def test_an_outline_is_what_was_told(context: Context) -> None:
    event, skeleton = outline_to_items(outline(context, "kv", salt=b"s")[0])
    found = outline_from_items(event, Context.from_bytes(skeleton.to_bytes()), salt=b"s")
    assert described(found.skeleton) == described(replace(context, segments=()))


@pytest.mark.parametrize(
    ("context", "came"),
    [
        (CONTEXT, replace(CONTEXT, turns=(Turn({"role": "user", "content": "he"}, (0, 40)),))),
        (CONTEXT, replace(CONTEXT, turns=(Turn({"role": "user", "content": "hé"}, (0, 39)),))),
        (CONTEXT, replace(CONTEXT, turns=(*SAID, *SAID))),
        (CONTEXT, replace(CONTEXT, template={"date": "tomorrow"})),
        (CONTEXT, replace(CONTEXT, tokens=(*range(40), 4))),
        (LATE, replace(LATE, tokens=(*range(37), 99, LATENT, LATENT))),
    ],
    ids=["content", "opaque", "turns", "template", "pending", "id-beside-latent-ones"],
)
def test_an_outline_that_was_changed_on_its_way_is_refused(context: Context, came: Context) -> None:
    event, _ = outline_to_items(outline(context, "kv", salt=b"")[0])
    with pytest.raises(BundleError, match="messages or ids are not those that were sent"):
        outline_from_items(event, replace(came, segments=()), salt=b"")
