"""HTTPS: who is trusted, both ways."""

from __future__ import annotations

import asyncio
import ssl
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import pytest
import trustme

from avp.errors import AccessDenied, AVPError, ConnectionFailed, UsageError
from avp.protocols import Meter, Transport
from avp.security import Security, Tenant
from avp.testing.echo import EchoEndpoint, ask, failure, large_blob
from avp.testing.transport import TransportConformance
from avp.transports.http import SECURE, TRANSPORT, HttpTransport

from .http_tools import Relay, Stranger, open_raw, run, serving

QUICK = HttpTransport("https", grace=0.2, head=2.0)


class Keys:
    """Authorities and the certificates that they signed, as files."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._authority, self._other = trustme.CA(), trustme.CA()
        self.ca, self.other_ca = folder / "ca.pem", folder / "other.pem"
        self._authority.cert_pem.write_to_path(str(self.ca))
        self._other.cert_pem.write_to_path(str(self.other_ca))
        self.server = self._issue(self._authority, "127.0.0.1")
        self.misnamed = self._issue(self._authority, "elsewhere.example")
        self.client = self._issue(self._authority, "client@example.org")
        self.stranger = self._issue(self._other, "stranger@example.org")

    def _issue(self, authority: trustme.CA, name: str) -> tuple[Path, Path]:
        issued = authority.issue_cert(name)
        cert, key = self._folder / f"{name}.pem", self._folder / f"{name}.key"
        issued.cert_chain_pems[0].write_to_path(str(cert))
        issued.private_key_pem.write_to_path(str(key))
        return cert, key


@cache
def keys() -> Keys:
    return Keys(Path(mkdtemp(prefix="avp-keys-")))


def shows(pair: tuple[Path, Path], *, ca: Path | None = None) -> Security:
    return Security(cert=pair[0], key=pair[1], ca=ca)


class TestHttps(TransportConformance):
    def transport(self) -> Transport:
        return QUICK

    def address(self, tmp_path: Path) -> str:
        return "https://127.0.0.1:0"

    def security(self) -> tuple[Security, Security]:
        return shows(keys().server), Security(ca=keys().ca)


class TestHttpsWithCertificatesBothWays(TestHttps):
    def security(self) -> tuple[Security, Security]:
        return shows(keys().server, ca=keys().ca), shows(keys().client, ca=keys().ca)


class TestHttpsHttp2(TestHttps):
    def security(self) -> tuple[Security, Security]:
        server, client = super().security()
        return replace(server, http2=True), replace(client, http2=True)


async def _fails(server: Security, client: Security) -> AVPError:
    endpoint = EchoEndpoint()
    async with serving(endpoint, security=server, rules=QUICK) as url:
        channel = SECURE.connect(url, security=client)
        error = await failure(ask(channel, "echo", large_blob()))
        assert not endpoint.started.is_set()
        await channel.close()
    return error


@pytest.mark.parametrize("http2", [False, True])
def test_a_server_that_cannot_be_verified_is_not_talked_to(http2: bool) -> None:
    async def scenario() -> None:
        for server, client, why in (
            (shows(keys().server), Security(), "unable to get local issuer|self.signed"),
            (shows(keys().server), Security(ca=keys().other_ca), "unable to get local issuer|self.signed"),
            (shows(keys().misnamed), Security(ca=keys().ca), "IP address mismatch"),
        ):
            error = await _fails(replace(server, http2=http2), replace(client, http2=http2, token="secret"))
            assert isinstance(error, AccessDenied)
            with pytest.raises(AccessDenied, match=why):
                raise error

    run(scenario())


@pytest.mark.parametrize("http2", [False, True])
def test_a_client_without_the_right_certificate_is_refused(http2: bool) -> None:
    async def scenario() -> None:
        server = replace(shows(keys().server, ca=keys().ca), http2=http2)
        for client in (Security(ca=keys().ca), shows(keys().stranger, ca=keys().ca)):
            error = await _fails(server, replace(client, http2=http2))
            # The server's alert may be outrun by a reset.
            assert isinstance(error, AccessDenied | ConnectionFailed)
            assert "certificate" in str(error)

    run(scenario())


def test_a_client_certificate_alone_authenticates_and_a_token_says_the_tenant() -> None:
    async def scenario() -> None:
        for tokens, token, name in (({}, None, ""), ({"t": Tenant.named("a")}, "t", "a")):
            server = replace(shows(keys().server, ca=keys().ca), tokens=tokens)
            assert server.authenticates
            async with serving(EchoEndpoint(security=server), security=server, rules=QUICK) as url:
                channel = SECURE.connect(url, security=replace(shows(keys().client, ca=keys().ca), token=token))
                assert (await ask(channel, "who")) == [{"tenant": name, "address": "127.0.0.1"}]
                await channel.close()

    run(scenario())


def test_the_meter_counts_what_is_encrypted() -> None:
    async def scenario() -> None:
        async with serving(EchoEndpoint(), security=shows(keys().server), rules=QUICK) as url, Relay(url) as relay:
            channel, meter = (
                SECURE.connect(relay.url.replace("http:", "https:"), security=Security(ca=keys().ca)),
                Meter(),
            )
            await ask(channel, "echo", large_blob(), meter=meter)
            assert (meter.sent, meter.received) == (relay.sent, relay.received)
            await channel.close()

    run(scenario())


def test_a_client_that_asks_for_http2_takes_http1_where_there_is_no_other() -> None:
    async def scenario() -> None:
        async with serving(EchoEndpoint(), security=shows(keys().server), rules=QUICK) as url, Relay(url) as relay:
            security = Security(ca=keys().ca, http2=True)
            channel = SECURE.connect(relay.url.replace("http:", "https:"), security=security)
            for n in range(3):
                assert await ask(channel, "echo", {"n": n}) == [{"n": n}]
            assert relay.connections == 1
            await channel.close()

    run(scenario())


def test_https_to_a_server_of_http_fails_and_the_other_way_round() -> None:
    async def scenario() -> None:
        async with serving(EchoEndpoint()) as url:
            channel = SECURE.connect(url.replace("http:", "https:"), security=Security(ca=keys().ca))
            assert isinstance(await failure(ask(channel, "echo")), ConnectionFailed)
        async with serving(EchoEndpoint(), security=shows(keys().server), rules=QUICK) as url:
            channel = TRANSPORT.connect(url.replace("https:", "http:"), security=Security())
            assert isinstance(await failure(ask(channel, "echo")), ConnectionFailed)
        async with Stranger(b"") as url:
            channel = SECURE.connect(url.replace("http:", "https:"), security=Security(ca=keys().ca))
            with pytest.raises(ConnectionFailed, match="during the TLS handshake"):
                await ask(channel, "echo")

    run(scenario())


def test_a_handshake_that_does_not_go_on_is_ended() -> None:
    async def scenario() -> None:
        rules = replace(QUICK, head=0.2)
        async with serving(EchoEndpoint(), security=shows(keys().server), rules=rules) as url:
            reader, writer = await open_raw(url)
            writer.write(b"\x16\x03\x01")
            assert await reader.read() == b""
            writer.close()

    run(scenario())


def test_certificates_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    (tmp_path / "bad.pem").write_text("no certificate")
    for security in (Security(ca=tmp_path / "none.pem"), Security(cert=tmp_path / "bad.pem", ca=keys().ca)):
        with pytest.raises(UsageError, match=r"a certificate cannot be used .*\.pem"):
            SECURE.connect("https://127.0.0.1", security=security)

    async def scenario() -> None:
        for security, why in (
            (Security(), "needs a certificate"),
            (Security(cert=keys().server[0], key=keys().client[1]), "cannot be used"),
        ):
            with pytest.raises(UsageError, match=why):
                await SECURE.serve(EchoEndpoint(), "https://127.0.0.1:0", security=security)

    run(scenario())


def test_old_tls_is_refused() -> None:
    async def scenario() -> None:
        async with serving(EchoEndpoint(), security=shows(keys().server), rules=QUICK) as url:
            port = int(url.rpartition(":")[2])
            context = ssl.create_default_context(cafile=keys().ca)
            context.set_ciphers("DEFAULT:@SECLEVEL=0")
            context.maximum_version = context.minimum_version = ssl.TLSVersion.TLSv1_2
            context.set_ciphers("AES128-SHA")  # no forward secrecy
            with pytest.raises((ssl.SSLError, ConnectionError)):
                await asyncio.open_connection("127.0.0.1", port, ssl=context)

    run(scenario())
