"""Which addresses are this machine's alone, and who may listen beyond it."""

from __future__ import annotations

from pathlib import Path

import pytest

from avp.errors import UsageError
from avp.security import Security, Tenant
from avp.transports.address import authority, host_and_port, is_loopback, refuse_open


@pytest.mark.parametrize(
    ("url", "found"),
    [
        ("http://127.0.0.1:8420", ("127.0.0.1", 8420)),
        ("http://127.0.0.1:0/path", ("127.0.0.1", 0)),
        ("grpc://[::1]:50051", ("::1", 50051)),
        ("https://Example.org:443", ("example.org", 443)),
    ],
)
def test_host_and_port_are_read_from_a_url(url: str, found: tuple[str, int]) -> None:
    assert host_and_port(url) == found


def test_a_port_that_is_not_named_is_the_default_or_is_asked_for() -> None:
    assert host_and_port("https://example.org", default=443) == ("example.org", 443)
    assert host_and_port("http://example.org:0", default=80) == ("example.org", 0)
    with pytest.raises(UsageError, match=r"names no port\. Fix:"):
        host_and_port("http://example.org")


@pytest.mark.parametrize("url", ["http://", "http:a", "http://a:b", "http://a:70000", "http://[::1", "mem:a", ""])
def test_what_names_no_host_or_no_number_is_refused(url: str) -> None:
    with pytest.raises(UsageError, match="Fix: write it as scheme://host:port"):
        host_and_port(url)


def test_an_ipv6_address_is_written_in_brackets() -> None:
    assert authority("::1", 80) == "[::1]:80"
    assert authority("localhost", 80) == "localhost:80"


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "::1", "localhost", "LOCALHOST.", "::ffff:127.0.0.1"])
def test_loopback_is_known(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize(
    "host",
    [
        "0.0.0.0",
        "::",
        "10.0.0.1",
        "128.0.0.1",
        "example.org",
        "localhost.example.org",
        "127.0.0.1.example.org",
        "127.1",
        "",
    ],
)
def test_anything_else_is_beyond_this_machine(host: str) -> None:
    assert not is_loopback(host)


def test_a_server_beyond_loopback_must_know_who_calls() -> None:
    with pytest.raises(UsageError, match=r"can be reached from other machines.*--token.*--insecure"):
        refuse_open("http://0.0.0.0:80", security=Security())
    with pytest.raises(UsageError, match="other machines"):
        refuse_open("http://example.org", security=Security(token="mine"))


def test_tokens_client_certificates_or_a_plain_word_open_it() -> None:
    refuse_open("http://0.0.0.0:80", security=Security(tokens={"t": Tenant()}))
    refuse_open("http://0.0.0.0:80", security=Security(ca=Path("ca.pem")))
    refuse_open("http://0.0.0.0:80", security=Security(insecure=True))
    refuse_open("http://[::1]:80", security=Security())
