"""The URL of a store: schemes, sizes, durations; strict."""

from __future__ import annotations

import pytest

from avp.errors import UsageError
from avp.stores import open_store
from avp.stores.memory import MemoryStore
from avp.stores.settings import Settings


@pytest.mark.parametrize(
    ("text", "size"), [("1", 1), ("17B", 17), ("2KiB", 2048), ("500MiB", 500 * 2**20), ("4GiB", 2**32), ("1TiB", 2**40)]
)
def test_a_size_is_a_whole_number_and_a_unit(text: str, size: int) -> None:
    assert Settings.of(f"memory:?budget={text}", known=("budget",)).size("budget") == size


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("5m", 300), ("12h", 43200), ("7d", 604800)])
def test_a_duration_is_a_whole_number_and_a_unit(text: str, seconds: int) -> None:
    assert Settings.of(f"disk:?ttl={text}", known=("ttl",)).seconds("ttl") == seconds


@pytest.mark.parametrize("text", ["0", "-1", "1.5GiB", "4GB", "4gib", "GiB", "4%20GiB", "1e9", "٣GiB", "9" * 30])
def test_anything_else_is_no_size(text: str) -> None:
    with pytest.raises(UsageError, match=r"budget: .* is no amount\. Fix: write a whole number above 0"):
        Settings.of(f"memory:?budget={text}", known=("budget",)).size("budget")


@pytest.mark.parametrize("text", ["7", "0s", "1w", "d", "1.5h", "-1s"])
def test_anything_else_is_no_duration(text: str) -> None:
    with pytest.raises(UsageError, match=r"ttl: .* is no amount"):
        Settings.of(f"disk:?ttl={text}", known=("ttl",)).seconds("ttl")


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("memory:?bugdet=4GiB", "no setting 'bugdet'. Fix: use only budget"),
        ("memory:?budget=1GiB&budget=2GiB", "twice, or empty"),
        ("memory:?budget=", "twice, or empty"),
        ("memory:?budget", "cannot be read"),
    ],
)
def test_a_setting_that_is_not_known_or_not_clear_is_refused(url: str, problem: str) -> None:
    with pytest.raises(UsageError) as raised:
        Settings.of(url, known=("budget",))
    assert problem in str(raised.value)


def test_what_is_not_given_is_none() -> None:
    settings = Settings.of("disk:/a%20b", known=("ttl", "budget"))
    assert (settings.path, settings.size("budget"), settings.seconds("ttl")) == ("/a b", None, None)


def test_a_store_is_opened_by_the_scheme_of_its_url() -> None:
    store = open_store("memory:?budget=1MiB")
    assert isinstance(store, MemoryStore)
    assert store.budget == 2**20


def test_a_url_without_a_scheme_or_of_an_unknown_one_is_refused() -> None:
    with pytest.raises(UsageError, match=r"no URL of a store\. Fix: begin it with a scheme"):
        open_store("/var/lib/store")
    with pytest.raises(UsageError, match="no store is named 'ftp'"):
        open_store("ftp://host")
