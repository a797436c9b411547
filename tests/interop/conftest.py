"""The real peer beside our own connector, started once for all tests that ask for it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from avp.bench.peer import PeerUnavailable

from .peer import Both, both_over


@pytest.fixture(scope="package")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Both]:
    try:
        with both_over(tmp_path_factory.mktemp("peer"), seed=3) as found:
            yield found
    except PeerUnavailable as error:
        pytest.skip(f"the peer avp==0.6.2 cannot be installed here: {error}")
