"""gRPC over TLS: the laws of a transport, who is trusted, and certificates that are none."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import trustme

from avp.errors import AccessDenied, ConnectionFailed, UsageError
from avp.protocols import Transport
from avp.security import Security
from avp.testing.echo import EchoEndpoint, ask, failure
from avp.testing.transport import TransportConformance
from avp.transports.grpc import SECURE, TRANSPORT

from .grpc_tools import opened, run


@dataclass(frozen=True)
class Certificates:
    """Files of an authority that is trusted, one that is not, and what they signed."""

    ca: Path
    other: Path
    server: tuple[Path, Path]
    client: tuple[Path, Path]
    stranger: tuple[Path, Path]

    def serving(self, *, mutual: bool = False) -> Security:
        return Security(ca=self.ca if mutual else None, cert=self.server[0], key=self.server[1])

    def calling(self, own: tuple[Path, Path] | None = None) -> Security:
        return Security(ca=self.ca, cert=own and own[0], key=own and own[1])


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    folder = tmp_path_factory.mktemp("certificates")
    ours, theirs = trustme.CA(), trustme.CA()

    def issue(ca: trustme.CA, stem: str, *names: str) -> tuple[Path, Path]:
        found, cert, key = ca.issue_cert(*names), folder / f"{stem}.crt", folder / f"{stem}.key"
        cert.write_bytes(b"".join(part.bytes() for part in found.cert_chain_pems))
        found.private_key_pem.write_to_path(str(key))
        return cert, key

    for ca, name in ((ours, "ca.crt"), (theirs, "other.crt")):
        ca.cert_pem.write_to_path(str(folder / name))
    return Certificates(
        folder / "ca.crt",
        folder / "other.crt",
        issue(ours, "server", "127.0.0.1", "localhost"),
        issue(ours, "client", "an-agent"),
        issue(theirs, "stranger", "an-agent"),
    )


class TestGrpcs(TransportConformance):
    @pytest.fixture(autouse=True)
    def _certificates(self, certificates: Certificates) -> None:
        self.certificates = certificates

    def transport(self) -> Transport:
        return SECURE

    def address(self, tmp_path: Path) -> str:
        return "grpcs://127.0.0.1:0"

    def security(self) -> tuple[Security, Security]:
        return self.certificates.serving(), self.certificates.calling()


class TestMutualTls(TestGrpcs):
    def security(self) -> tuple[Security, Security]:
        return self.certificates.serving(mutual=True), self.certificates.calling(self.certificates.client)


def test_a_client_without_the_right_certificate_is_not_served(certificates: Certificates) -> None:
    async def scenario() -> None:
        for own in (None, certificates.stranger):
            both = certificates.serving(mutual=True), certificates.calling(own)
            async with opened(*both, transport=SECURE) as (endpoint, channel, _):
                error = await failure(ask(channel, "who"))
                assert type(error) is ConnectionFailed
                assert "client certificates" in str(error)
                assert not endpoint.started.is_set()

    run(scenario)


def test_a_server_whose_certificate_another_authority_signed_is_not_trusted(certificates: Certificates) -> None:
    async def scenario() -> None:
        for client in (Security(ca=certificates.other), Security()):
            async with opened(certificates.serving(), client, transport=SECURE) as (endpoint, channel, _):
                error = await failure(ask(channel, "who"))
                assert type(error) is AccessDenied
                assert "Fix: give the authority" in str(error)
                assert not endpoint.started.is_set()

    run(scenario)


def test_tls_and_plain_do_not_meet(certificates: Certificates) -> None:
    async def scenario() -> None:
        async with opened(certificates.serving(), transport=SECURE) as (_, _, listener):
            plain = TRANSPORT.connect(listener.url.replace("grpcs", "grpc"), security=Security())
            assert type(await failure(ask(plain, "who"))) is ConnectionFailed
            await plain.close()
        async with opened() as (_, _, listener):
            secure = SECURE.connect(listener.url.replace("grpc", "grpcs"), security=certificates.calling())
            assert type(await failure(ask(secure, "who"))) is ConnectionFailed
            await secure.close()

    run(scenario)


def test_certificates_that_would_do_nothing_are_refused(certificates: Certificates) -> None:
    async def scenario() -> None:
        for security in (certificates.serving(), Security(ca=certificates.ca)):
            with pytest.raises(UsageError, match="grpc:// knows no certificates"):
                await TRANSPORT.serve(EchoEndpoint(), "grpc://127.0.0.1:0", security=security)

    run(scenario)


def test_files_that_are_no_certificates_are_named(certificates: Certificates, tmp_path: Path) -> None:
    cert, key = certificates.server
    wrong = [
        (Security(), "a certificate and its key are needed"),
        (Security(cert=cert), "a certificate and its key are needed"),
        (Security(cert=cert, key=certificates.client[1]), "are no certificate and its key"),
        (Security(cert=cert, key=tmp_path / "none"), "are no certificate and its key"),
        (Security(cert=cert, key=key, ca=key), "holds no authorities"),
        (Security(cert=cert, key=key, ca=tmp_path / "none"), "holds no authorities"),
    ]

    async def scenario() -> None:
        for security, message in wrong:
            with pytest.raises(UsageError, match=message):
                await SECURE.serve(EchoEndpoint(), "grpcs://127.0.0.1:0", security=security)

    run(scenario)
    for security, message in wrong[1:]:
        with pytest.raises(UsageError, match=message):
            SECURE.connect("grpcs://127.0.0.1:1", security=security)
