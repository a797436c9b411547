"""Errors that a user meets between agents, each met by doing what leads to it."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import trustme

import avp
from avp.agent import Agent
from avp.connectors.huggingface import HuggingFaceConnector
from avp.direct import DirectChannel
from avp.handle import Handle
from avp.manifest import Limits
from avp.network import Remote
from avp.portal import PORTAL
from avp.protocols import Item
from avp.security import Security, Tenant
from avp.segment import Exactness
from avp.session import Quota
from avp.testing import synthetic_context
from avp.testing.echo import EchoEndpoint, ask, ask_with
from avp.testing.tiny import tiny_connector
from avp.transports.mem import MemTransport
from avp.wire import Decoder

from ..endpoint.peers import tapped
from .reproducing import reproduces

IDS = list(range(5, 105))


@cache
def one() -> HuggingFaceConnector:
    return tiny_connector("llama")


@cache
def other() -> HuggingFaceConnector:
    return tiny_connector("llama", seed=1)


@contextmanager
def served(agent: Agent, *, own: Agent | None = None, token: str | None = None) -> Iterator[Remote]:
    """An agent at a name of this process, as another one sees it."""
    with agent, avp.serve(agent, f"mem:{agent.name}") as server:
        own = own or Agent(one(), name="a", security=Security(token=token))
        with own, own.connect(server.url) as remote:
            yield remote


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# --- the handshake


@reproduces("kv: other weights:")
def other_weights() -> object:
    with served(Agent(other(), name="b")) as remote:
        return remote.hand_over(one().prefill(IDS))


@reproduces('Fix: load equal weights, or accept less (accept="text" always works between models).')
def no_mode_at_all() -> object:
    with served(Agent(one(), name="b", limits=Limits(tokens=50))) as remote:
        return remote.hand_over(one().prefill(IDS))


@reproduces("the two ends computed different agreements from the same hellos.")
def another_agreement() -> object:
    async def back(verb: str, item: Item) -> Item:
        return {**item, "agreement": {}} if verb == "have" and isinstance(item, Mapping) else item

    with Agent(one(), name="a") as a, Agent(one(), name="b") as b:
        remote, _ = tapped(a, b, back=back)
        return asyncio.run(remote.hand_over(a.prefill(IDS)))


@reproduces("tokens was announced and")
def a_context_beyond_the_model() -> object:
    layers, (layer, *_) = len(one().identity.layout.layers), one().identity.layout.layers
    long = synthetic_context(
        layers=layers, kv_heads=layer.kv_heads, head_dim=layer.head_dim, tokens=1100, dtype="float32"
    )
    segments = tuple(replace(each, engine="transformers") for each in long.segments)
    with served(Agent(one(), name="b")) as remote:
        return remote.hand_over(replace(long, model=one().identity, segments=segments))


# --- reaching it


@reproduces("cannot be reached")
def nobody_at_a_port() -> object:
    with avp.connect(f"grpc://127.0.0.1:{closed_port()}") as remote:
        return remote.hello()


@reproduces("nobody answers at unix:")
def nobody_at_a_path(tmp_path: Path) -> object:
    with avp.connect(f"unix:{tmp_path}/a.sock") as remote:
        return remote.hello()


@reproduces("nobody is served as mem:")
def nobody_of_that_name() -> object:
    with avp.connect("mem:nobody") as remote:
        return remote.hello()


class _Page(BaseHTTPRequestHandler):
    """Any other web server."""

    def do_POST(self) -> None:
        self.rfile.read1(1 << 16)
        self.send_error(405)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@reproduces("That is no AVP endpoint, or something stands before it.")
def a_web_server() -> object:
    with HTTPServer(("127.0.0.1", 0), _Page) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        try:
            with avp.connect(f"http://127.0.0.1:{server.server_port}") as remote:
                return remote.hello()
        finally:
            thread.join()


@reproduces("what was half received was thrown away.")
def a_stream_that_was_cut() -> object:
    decoder = Decoder(Limits())
    list(decoder.feed(b"J\2\0\0\0{}"))
    return decoder.finish()


@reproduces("Fix: pass a longer timeout, or look at the other end.")
def a_slow_agent() -> object:
    with served(Agent(one(), name="b")) as remote:
        return remote.hand_over("Plan the work.", timeout=1e-6)


@reproduces("no whole event or segment came within")
def a_caller_that_pauses() -> object:
    async def nothing() -> AsyncIterator[Item]:
        await asyncio.Event().wait()
        yield {}

    async def pause(agent: Agent) -> object:
        return await ask_with(DirectChannel(agent.endpoint), "hello", nothing())

    with Agent(name="b", quota=Quota(idle=0.01)) as agent:
        return asyncio.run(pause(agent))


@reproduces("the other end failed at this call by a fault of its own.")
def a_fault_of_the_endpoint() -> object:
    transport = MemTransport()

    async def crash() -> object:
        listener = await transport.serve(EchoEndpoint(), "mem:faulty", security=Security())
        try:
            return await ask(transport.connect("mem:faulty", security=Security()), "crash", {})
        finally:
            await listener.close()

    return asyncio.run(crash())


@reproduces("a blocking call was made in AVP's own event loop.")
def a_blocking_call_in_the_loop() -> object:
    async def in_the_loop() -> object:
        return avp.connect("mem:any").hello()

    return PORTAL.run(in_the_loop())


# --- who may


@reproduces("the endpoint wants a bearer token and")
def no_token() -> object:
    secure = Security(tokens={"sesame": Tenant.named("a")})
    with served(Agent(name="b", security=secure)) as remote:
        return remote.hello()


@reproduces("certificate is not trusted")
def an_unknown_authority(tmp_path: Path) -> object:
    authority, stranger = trustme.CA(), trustme.CA()
    made = authority.issue_cert("localhost")
    made.cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")
    made.private_key_pem.write_to_path(tmp_path / "key.pem")
    stranger.cert_pem.write_to_path(tmp_path / "ca.pem")
    secure = Security(cert=tmp_path / "cert.pem", key=tmp_path / "key.pem")
    trusting = Security(ca=tmp_path / "ca.pem")
    with (
        Agent(name="b", security=secure) as agent,
        avp.serve(agent, "grpcs://localhost:0") as server,
        avp.connect(server.url, security=trusting) as remote,
    ):
        return remote.hello()


@reproduces("can be reached from other machines, and nobody would have to show a token or a certificate:")
def open_to_all() -> object:
    with Agent(name="b") as agent:
        return avp.serve(agent, "grpc://0.0.0.0:0")


@reproduces("does not fetch contexts from")
def a_stranger_as_peer() -> object:
    handle = Handle("0" * 64, "https://far.example", 8, Exactness.EXACT, 60.0)
    with served(Agent(one(), name="b")) as remote:
        return remote.generate("Go on.", context=handle)


# --- handles and room


@reproduces("the handle is not known here:")
def a_revoked_handle() -> object:
    with served(Agent(one(), name="b")) as remote:
        handle = remote.hand_over(one().prefill(IDS))
        remote.revoke(handle)
        return remote.generate("Go on.", context=handle)


@reproduces("that this endpoint keeps for a tenant.")
def more_than_the_quota() -> object:
    with served(Agent(one(), name="b", quota=Quota(memory=1000))) as remote:
        return remote.hand_over(one().prefill(IDS))


@reproduces("the endpoint's memory is full of contexts that are in use or on their way.")
def full_of_what_is_in_use() -> object:
    context = one().prefill(IDS)
    with Agent(one(), name="b", quota=Quota(memory=context.nbytes * 3 // 2)) as agent, served(agent) as remote:
        handle = remote.hand_over(context)
        with agent.endpoint.desk.handles.use(str(handle), Tenant()):
            return remote.hand_over(one().prefill([4, *IDS]))


@reproduces("sessions are open, as many as this endpoint takes.")
def too_many_sessions() -> object:
    with served(Agent(one(), name="b", quota=Quota(sessions=0))) as remote:
        return remote.hand_over(one().prefill(IDS))


@reproduces("generations are under way or waiting, as many as")
def too_many_generations() -> object:
    with served(Agent(one(), name="b", quota=Quota(running=1, waiting=0))) as remote:
        stream = remote.stream("Count.", max_new_tokens=900)
        next(iter(stream))
        try:
            return remote.generate("And me?")
        finally:
            stream.close()


@reproduces("Fix: raise Limits.bytes, or send smaller segments.")
def a_segment_beyond_the_limits() -> object:
    with served(Agent(name="b", limits=Limits(bytes=1000))) as remote:
        return remote.hand_over(one().prefill(IDS))


# --- arguments


@reproduces("begins with none of the known schemes.")
def an_unknown_scheme() -> object:
    return avp.connect("pigeon://far.example")


@reproduces("names no port.")
def no_port() -> object:
    return avp.connect("grpc://127.0.0.1")


@reproduces("is being served already.")
def a_name_that_is_taken() -> object:
    with Agent(name="b") as agent, avp.serve(agent, "mem:b"):
        return avp.serve(agent, "mem:b")


@reproduces("no socket can be made at")
def no_folder_for_a_socket(tmp_path: Path) -> object:
    with Agent(name="b") as agent:
        return avp.serve(agent, f"unix:{tmp_path}/none/a.sock")


@reproduces("a unix socket's has at most 107.")
def a_long_path(tmp_path: Path) -> object:
    return avp.connect(f"unix:{tmp_path}/{'a' * 100}.sock")


@reproduces("a certificate and its key are needed.")
def no_certificate() -> object:
    with Agent(name="b") as agent:
        return avp.serve(agent, "grpcs://127.0.0.1:0")


@reproduces("has no model and cannot generate.")
def a_keeper_is_asked() -> object:
    with served(Agent(name="keeper")) as remote:
        return remote.generate("What now?")


@reproduces("a prompt can be handed over only by an agent that has a model.")
def a_prompt_without_a_model() -> object:
    with served(Agent(one(), name="b"), own=Agent(name="a")) as remote:
        return remote.hand_over("Plan the work.")


@reproduces("the context lacks some of its KV.")
def a_subset_is_handed_over() -> object:
    context = one().prefill(list(range(3, 300)))
    part = avp.Context.from_bytes(replace(context, segments=context.segments[1:]).to_bytes())
    with served(Agent(one(), name="b")) as remote:
        return remote.hand_over(part)


@reproduces("names no file of this machine.")
def a_file_elsewhere() -> object:
    return avp.connect("file://far.example/a.avp")


@reproduces("hand a context over to it first.")
def a_file_that_is_not_there(tmp_path: Path) -> object:
    with avp.connect(f"file:{tmp_path}/a.avp") as remote:
        return remote.fetch("a.avp")


@reproduces("nothing listens at")
def a_file_is_served(tmp_path: Path) -> object:
    with Agent(name="b") as agent:
        return avp.serve(agent, f"file:{tmp_path}/a.avp")
