"""A whole context as one file over HTTP, in ranges."""

from __future__ import annotations

from dataclasses import dataclass, field

from avp.errors import HandleExpired
from avp.security import Caller
from avp.testing.echo import EchoEndpoint, large_blob

from .http_tools import get, raw, run, serving


@dataclass
class Shelf(EchoEndpoint):
    runs: tuple[bytes, ...] = field(default=())

    def __post_init__(self) -> None:
        super().__init__()

    async def bundle(self, handle: str, *, caller: Caller) -> tuple[bytes | memoryview, ...]:
        if handle != "h1":
            raise HandleExpired("no such handle. Fix: make one.")
        return self.runs


BUNDLE = b"".join(large_blob().runs)
RANGES = {
    "bytes=0-": (206, 0, len(BUNDLE)),
    "bytes=10-19": (206, 10, 20),
    "bytes=1048570-1048600": (206, 1048570, 1048601),
    f"bytes={len(BUNDLE) - 1}-": (206, len(BUNDLE) - 1, len(BUNDLE)),
    "bytes=-5": (206, len(BUNDLE) - 5, len(BUNDLE)),
    "bytes=-999999999999": (206, 0, len(BUNDLE)),
    "bytes=5-999999999999": (206, 5, len(BUNDLE)),
    f"bytes={len(BUNDLE)}-": (416, 0, 0),
    "bytes=-0": (416, 0, 0),
    "bytes=20-10": (200, 0, len(BUNDLE)),
    "bytes=0-1,5-6": (200, 0, len(BUNDLE)),
    "bytes=-": (200, 0, len(BUNDLE)),
    "lines=1-2": (200, 0, len(BUNDLE)),
    "bytes=" + "9" * 5000 + "-": (200, 0, len(BUNDLE)),
}


def test_a_context_is_downloaded_in_ranges() -> None:
    async def scenario() -> None:
        async with serving(Shelf(runs=(BUNDLE[:100], b"", BUNDLE[100:70000], BUNDLE[70000:]))) as url:
            whole = await get(url, "/avp/v1/contexts/h1")
            assert (whole.status, whole.body, whole.fields["accept-ranges"]) == (200, BUNDLE, "bytes")
            tag = whole.fields["etag"]
            for asked, (status, start, stop) in RANGES.items():
                answer = await get(url, "/avp/v1/contexts/h1", f"Range: {asked}\r\n".encode())
                assert (answer.status, answer.body) == (status, BUNDLE[start:stop]), asked
                assert answer.fields["etag"] == tag
                if status == 206:
                    assert answer.fields["content-range"] == f"bytes {start}-{stop - 1}/{len(BUNDLE)}"
                if status == 416:
                    assert answer.fields["content-range"] == f"bytes */{len(BUNDLE)}"
            same = await get(url, "/avp/v1/contexts/h1", f"Range: bytes=5-9\r\nIf-Range: {tag}\r\n".encode())
            other = await get(url, "/avp/v1/contexts/h1", b'Range: bytes=5-9\r\nIf-Range: "other"\r\n')
            assert (same.status, same.body, other.status, other.body) == (206, BUNDLE[5:10], 200, BUNDLE)
            head = await raw(url, b"HEAD /avp/v1/contexts/h1 HTTP/1.1\r\nHost: x\r\n\r\n")
            assert (head.status, head.fields["content-length"], head.body) == (200, str(len(BUNDLE)), b"")
            gone = await get(url, "/avp/v1/contexts/h2")
            assert (gone.status, gone.json["error"]["type"]) == (404, "HandleExpired")
        async with serving(Shelf(runs=(b"other",))) as url:
            short = await get(url, "/avp/v1/contexts/h1")
            assert (short.body, short.fields["etag"] == tag) == (b"other", False)

    run(scenario())
