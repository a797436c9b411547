"""HTTP."""

from __future__ import annotations

from pathlib import Path

from avp.protocols import Transport
from avp.security import Security
from avp.testing.transport import TransportConformance
from avp.transports.http import HttpTransport

QUICK = HttpTransport(grace=0.2)


class TestHttp1(TransportConformance):
    def transport(self) -> Transport:
        return QUICK

    def address(self, tmp_path: Path) -> str:
        return "http://127.0.0.1:0"


class TestHttp2(TestHttp1):
    def security(self) -> tuple[Security, Security]:
        return Security(http2=True), Security(http2=True)
