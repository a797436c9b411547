"""docs/spec/protocol.md says what the code does: its verbs, fields, limits and bytes."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import cast

import pytest

from avp import delta, session, transfer, vocabulary, wire
from avp.agent import Agent
from avp.direct import DirectChannel
from avp.endpoint import generating, receiving
from avp.endpoint.generating import OPTIONS
from avp.errors import AVPError
from avp.greeting import _LONGEST, agreement_to_json, hello_from_json, hello_to_json
from avp.handshake import PROTOCOL, CodecOffer, Hello, Record, negotiate
from avp.manifest import Limits
from avp.protocols import Item, Meter
from avp.receipt import Receipt, receipt_to_json
from avp.security import Caller
from avp.segment import Exactness
from avp.transports.fds import FILES, REQUEST, WINDOW
from avp.wire import CONTENT_TYPE, encode_item, error_from_json, error_to_json

from .endpoint.peers import IDS, connector, run, tapped

PAGE = (Path(__file__).parents[1] / "docs/spec/protocol.md").read_text(encoding="utf-8")
OPTIONAL = {"session", "url", "handle", "ranges", "pages"}  # what no call has that leaves it at null


def rows(title: str, within: str = PAGE) -> list[list[str]]:
    """The cells of the table whose first column has that title; none if there is none."""
    found = re.findall(rf"^\| {title} \|[^\n]*\n\|[-|]+\n((?:\|[^\n]*\n)+)", within, re.M)
    assert len(found) < 2
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in "".join(found).strip().split("\n") if row]


def names(title: str, within: str = PAGE) -> list[str]:
    return [row[0].strip("`") for row in rows(title, within)]


def section(verb: str) -> str:
    return PAGE.partition(f"\n### {verb}\n")[2].partition("\n## ")[0].partition("\n### ")[0]


VERBS = names("verb")


def test_the_verbs_of_the_page_are_those_of_the_endpoint() -> None:
    with Agent() as agent:
        assert list(agent.endpoint._verbs) == VERBS == re.findall(r"^### (.*)$", PAGE, re.M)
        with pytest.raises(AVPError, match=re.escape(f"use one of {', '.join(VERBS)}.")):
            agent.endpoint.answer("sing", transfer.each([]), caller=Caller())


@cache
def recorded() -> tuple[dict[str, set[str]], dict[str, set[str]]]:
    """The fields of the events of each verb, there and back, seen while two agents use all of them."""
    asked: defaultdict[str, set[str]] = defaultdict(set)
    answered: defaultdict[str, set[str]] = defaultdict(set)

    async def there(verb: str, item: Item) -> Item:
        if isinstance(item, Mapping):
            asked[verb] |= set(item)
        return item

    async def back(verb: str, item: Item) -> Item:
        if isinstance(item, Mapping):
            answered[verb] |= set(item)
        return item

    with Agent(connector(0), name="a") as a, Agent(connector(1), name="b") as b:
        remote, _ = tapped(a, b, there=there, back=back)

        async def all_verbs() -> None:
            for _ in range(2):  # the second time nothing is missing
                handle = await remote.hand_over(a.prefill(IDS))
            await remote.stream([9], context=handle, max_new_tokens=2).result()
            await remote.on_behalf_of(remote.own).fetch(handle)
            a.store.remove(a.prefill(IDS).segments[0].pages[0], tenant="")
            await remote.fetch(handle)  # with ranges, since a page is lacking
            await remote.renew(handle)
            await remote.revoke(handle)
            await remote.measure()
            await transfer.ask(remote._channel, "vocabulary", [{"digest": b.hello().vocabulary}], Meter())

        run(all_verbs())
    return dict(asked), dict(answered)


@pytest.mark.parametrize("verb", VERBS)
def test_the_fields_of_a_verb_are_those_that_travel(verb: str) -> None:
    asked, answered = recorded()
    shown = set(names("field of the call", section(verb)))
    assert asked.get(verb, set()) <= shown
    assert shown - asked.get(verb, set()) <= OPTIONAL
    assert set(names("field of the answer", section(verb))) == answered[verb]


@pytest.mark.parametrize("verb", VERBS)
def test_a_field_that_may_be_null_may_be_left_out_and_no_other(verb: str) -> None:
    needed = {row[0].strip("`") for row in rows("field of the call", section(verb)) if "null" not in row[1]}
    with Agent(connector(0), name="b") as agent:

        async def bare() -> list[Item]:
            async with DirectChannel(agent.endpoint).call(verb, transfer.each([{}]), meter=Meter()) as answer:
                return [item async for item in answer]

        if needed - {"prompt", "options"}:
            with pytest.raises(AVPError, match=r"the call lacks|opened without a hello"):
                run(bare())
        elif verb == "generate":
            with pytest.raises(AVPError, match="there is nothing to compute"):
                run(bare())
        else:
            assert len(run(bare())) == 1


def test_the_objects_in_the_events_have_the_fields_of_the_page() -> None:
    assert names("field of a hello") == [each.name for each in fields(Hello)] == list(hello_to_json(Hello("a")))
    assert names("field of a codec") == [each.name for each in fields(CodecOffer)]
    (codec,) = rows("field of a codec")[-1:]
    assert re.findall(r"`(\w+)`", codec[2]) == [each.name for each in fields(Record)]
    both = Hello("a", connector(0).identity, "transformers", "float32")
    agreement = agreement_to_json(negotiate(both, both, tokens=5))
    assert names("field of an agreement") == list(agreement)
    assert names("field of a verdict") == list(cast("dict[str, object]", agreement["taken"]))
    assert names("field of a receipt") == list(receipt_to_json(Receipt("kv", Exactness.EXACT)))
    assert names("option") == list(OPTIONS)
    with Agent(connector(0)) as agent:
        made = agent.generate([5, 6], max_new_tokens=2)
    assert names("field of a result") == list(generating.generation_to_json(made))
    context = connector(0).prefill(IDS)
    told, _ = delta.outline_to_items(delta.outline(context, "kv", salt=b"")[0])
    (grade,) = cast("list[list[object]]", told["grades"])
    assert len(grade) == len(
        next(row[1] for row in rows("field of the call", section("have")) if "grades" in row[0]).split(",")
    )


def test_the_modes_of_a_hello_are_those_of_the_code() -> None:
    (row,) = [row for row in rows("field of a hello") if row[0] == "`modes`"]
    assert tuple(re.findall(r"`(\w+)`", row[2])) == Hello("a").modes
    assert PAGE.startswith(f"# The protocol, version {PROTOCOL}\n")
    assert f"of the protocol: {PROTOCOL}." in PAGE


def test_the_bytes_shown_are_those_that_the_writer_makes() -> None:
    (shown,) = re.findall(r"^```stream\n(.*?)\n```$", PAGE, re.M | re.S)
    data = bytes.fromhex("".join(shown.split()))
    items = list(wire.Decoder(Limits()).feed(data))
    assert items[0] == {"handle": "2f", "ttl": 60}
    assert items[1].messages == ({"role": "user", "content": "Hi"},)  # type: ignore[union-attr]
    assert b"".join(map(bytes, [*encode_item(items[0]), *encode_item(items[1]), b"E"])) == data
    assert data[: len(data) - 1].rstrip(b" ").endswith(b"}")
    assert int(re.search(r"header has\s(\d+) bytes", PAGE)[1]) == int.from_bytes(data[30:38], "little")  # type: ignore[index]
    assert f"`{CONTENT_TYPE}`" in PAGE


def test_an_error_travels_as_the_page_says() -> None:
    (shown,) = re.findall(r'^\{"error": \{(.*)\}\}$', PAGE, re.M)
    assert re.findall(r'"(\w+)":', shown) == [*error_to_json(AVPError("a")), "retry_after"]
    assert type(error_from_json({"type": "NobodyKnows", "message": "b"})).__name__ == "ConnectionFailed"


def test_the_limits_are_those_of_the_code() -> None:
    quota = session.Quota()
    shown = {row[0]: [int(each) for each in re.findall(r"\d+", row[1])] for row in rows("what")}
    assert shown == {
        "bytes of an event": [],
        "characters of a name, items of a list in a hello": [_LONGEST],
        "tokens of a vocabulary": [vocabulary._LARGEST],
        "characters of an error's message": [len(str(error_from_json({"message": "x" * 10**6, "type": "UsageError"})))],
        "seconds in `retry_after`": [int(wire._LONGEST)],
        "sessions of an endpoint": [quota.sessions],
        "seconds that a session or a handle lives after its last use": [int(quota.ttl)],
        "seconds that room is kept for missing pages": [int(receiving._PATIENCE)],
        "seconds until the caller's next item is whole": [int(quota.idle)],
        "the same, of a segment in `receive`": [int(receiving._PATIENCE), receiving._SLOWEST],
        "generations at once, and waiting": [quota.running, quota.waiting],
    }
    assert WINDOW == 2 * 4
    assert (REQUEST.header, FILES) == (64 << 10, 64)
    assert f"At most {WINDOW} items of a direction" in PAGE
    assert "four more items were taken" in PAGE


def test_a_hello_with_a_field_more_is_refused() -> None:
    with pytest.raises(AVPError, match="other fields"):
        hello_from_json({**hello_to_json(Hello("a")), "mood": "good"}, limits=Limits())
