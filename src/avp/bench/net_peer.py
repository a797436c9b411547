"""The peer's own HTTP client and server, `avp==0.6.2`, each in a process of its own, with the same bytes as payload."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median

from avp.bench.net_agent import receiving
from avp.bench.net_context import in_arena
from avp.bench.net_far import Far, FarFailed, running
from avp.bench.net_transfer import wire_bytes
from avp.bench.peer import VERSION, PeerUnavailable, Shape, environment
from avp.bench.perf_figure import Figure, Target, compare, rounds, speed
from avp.context import Context

PEER = Target(
    f"AVPClient.transmit of avp=={VERSION} to its create_app under uvicorn, the same bytes as payload, its time / time "
    "of the hand-over over HTTP",
    at_least=3.0,
)
_EXTRA = f"avp[server]=={VERSION}"

_SERVER = """
import json, socket, sys
import uvicorn
from avp.transport import create_app
async def handler(message):
    return {"received": len(message.payload)}
listening = socket.socket()
listening.bind(("127.0.0.1", 0))
print(json.dumps({"port": listening.getsockname()[1]}), flush=True)
uvicorn.Server(uvicorn.Config(create_app(handler), log_level="error")).run(sockets=[listening])
"""
_CLIENT = """
import gc, json, sys, time
from avp.transport import AVPClient
from avp.types import AVPMetadata, PayloadType
client = AVPClient("http://127.0.0.1:" + sys.argv[1], timeout=120.0)
with open(sys.argv[2], "rb") as file:
    payload = file.read()
metadata = AVPMetadata(payload_type=PayloadType.KV_CACHE)
print(json.dumps({"bytes": len(payload)}), flush=True)
for line in sys.stdin:
    gc.collect()
    started = time.perf_counter()
    received = client.transmit(payload, metadata).json()["received"]
    seconds = time.perf_counter() - started
    print(json.dumps({"value": seconds if received == len(payload) else None}), flush=True)
"""


def peer_http(shape: Shape, folder: Path, *, n: int, peer: str | None, tell: Callable[[str], object]) -> list[Figure]:
    """Both by turns; `peer` is the reason not to measure it. The payload is written to a file in `folder`."""
    if peer is not None:
        return [Figure("http_peer", PEER, not_measured=peer)]
    context = in_arena(shape)
    try:
        with receiving() as receiver, _client(context, folder, tell=tell) as client:
            clocks = {"avp": receiver.clock(context, "http"), "peer": lambda: client.number("transmit")}
            seconds = rounds(clocks, n)
            size = int(str(client.ready["bytes"]))
    except (PeerUnavailable, FarFailed) as error:
        return [Figure("http_peer", PEER, not_measured=str(error))]
    detail: dict[str, object] = {"bytes": size}
    for name, values in seconds.items():
        detail |= {f"{name}_seconds": median(values), f"{name}_GB_per_s": speed(size, values)}
    return [compare("http_peer", seconds["peer"], seconds["avp"], PEER, **detail)]


@contextmanager
def _client(context: Context, folder: Path, *, tell: Callable[[str], object]) -> Iterator[Far]:
    """The peer's client, connected to the peer's server.

    Raises:
        PeerUnavailable: no environment could be built. FarFailed: one of the two did not come up.
    """
    python = environment(tell=tell)
    _complete(python, tell=tell)
    path = folder / "payload"
    path.write_bytes(wire_bytes(context))
    with ExitStack() as stack:
        server = stack.enter_context(running([str(python), "-I", "-c", _SERVER], bare=True))
        command = [str(python), "-I", "-c", _CLIENT, str(server.ready["port"]), str(path)]
        yield stack.enter_context(running(command, bare=True))


def _complete(python: Path, *, tell: Callable[[str], object]) -> None:
    """Add what the peer's server needs to its environment."""
    try:
        found = subprocess.run(
            [str(python), "-I", "-c", "import fastapi, uvicorn, httpx"], capture_output=True, check=False
        )
        if found.returncode == 0:
            return
        tell(f"peer: adding {_EXTRA} to its environment …")
        command = [str(python), "-m", "pip", "install", "--no-input", "--retries=1", _EXTRA]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise PeerUnavailable(f"{python} does not run: {error.strerror}") from error
    if done.returncode:
        said = (done.stdout + done.stderr).strip().splitlines()
        raise PeerUnavailable(f"its server could not be installed: {said[-1] if said else 'pip said nothing'}")
