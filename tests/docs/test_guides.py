"""Every transport and every store that comes with AVP has its place in the guides."""

from __future__ import annotations

import re

import pytest

from avp import registry

from . import pages

GUIDES = pages.ROOT / "docs" / "guides"
STORES = (GUIDES / "stores.md").read_text()
ALSO = {"https": "http", "grpcs": "grpc", "rediss": "redis"}  # the same with TLS


@pytest.mark.parametrize("scheme", registry.names("avp.transports"))
def test_a_transport_has_a_guide_that_shows_a_hand_over_to_its_urls(scheme: str) -> None:
    page = GUIDES / f"transport-{ALSO.get(scheme, scheme)}.md"
    assert f"{scheme}:" in page.read_text()
    assert any("hand_over" in block.text for block in pages.blocks(page, "python"))


@pytest.mark.parametrize("scheme", registry.names("avp.stores"))
def test_a_store_has_a_section_that_shows_its_url(scheme: str) -> None:
    section = STORES.partition(f"\n## {ALSO.get(scheme, scheme)}\n")[2].partition("\n## ")[0]
    assert f"`{scheme}:" in section


def test_no_guide_is_of_a_transport_that_there_is_not() -> None:
    named = {re.fullmatch(r"transport-(\w+)\.md", page.name) for page in GUIDES.iterdir()} - {None}
    assert {found[1] for found in named if found} == {
        ALSO.get(scheme, scheme) for scheme in registry.names("avp.transports")
    }
