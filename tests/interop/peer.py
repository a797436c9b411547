"""The real peer, `avp==0.6.2`, in its own environment and process; only its public API is called."""

from __future__ import annotations

import json
import os
import subprocess
import threading
from base64 import b64decode, b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from avp import HuggingFaceConnector
from avp.bench.peer import add_http, environment
from avp.testing.tiny import tiny_model, tiny_tokenizer

_TIMEOUT = 180.0  # seconds for one answer
_SCRIPT = """
import base64, dataclasses, json, os, sys, warnings
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
warnings.simplefilter("ignore")
import torch
import avp
from avp.context import AVPContext
from avp.errors import HandshakeError, TransportError
from avp.fallback import JSONMessage
from avp.transport import AVPClient
torch.set_num_threads(1)
connector = avp.HuggingFaceConnector.from_pretrained(sys.argv[1], dtype=torch.float32)

class Ids:
    def __init__(self):
        self.runs = []
    def put(self, ids):
        self.runs.append(ids.flatten().tolist())
    def end(self):
        pass

def identity():
    return connector.get_model_identity().to_dict()

def think(prompt, steps):
    context = connector.think(prompt, steps=steps)
    data = context.to_bytes(session_id="s", source_agent_id="a", target_agent_id="b", model_id="m")
    return {"data": base64.b64encode(data).decode(), "seq_len": context.seq_len}

def generate(prompt, data, tokens):
    context = AVPContext.from_bytes(base64.b64decode(data)) if data else None
    ids = Ids()
    text = connector.generate(prompt, context=context, max_new_tokens=tokens, do_sample=False, streamer=ids)
    return {"text": text, "tokens": [each for run in ids.runs[1:] for each in run]}

def again(data):
    return base64.b64encode(AVPContext.from_bytes(base64.b64decode(data)).to_bytes()).decode()

def decode(data):
    try:
        message = avp.decode(base64.b64decode(data))
    except avp.AVPError as error:
        return {"error": type(error).__name__}
    found = message.metadata
    return {
        "payload": base64.b64encode(message.payload).decode(), "session_id": found.session_id, "extra": found.extra,
        "hidden_dim": found.hidden_dim, "tensor_shape": list(found.tensor_shape), "payload_type": found.payload_type,
        "dtype": found.dtype, "mode": found.mode, "compression": found.compression, "model_id": found.model_id,
    }

def encode(payload, level):
    metadata = avp.AVPMetadata(session_id="s", hidden_dim=2, tensor_shape=(2,), extra={"k": "v"})
    data = avp.encode(base64.b64decode(payload), metadata, avp.CompressionLevel[level])
    return base64.b64encode(data).decode()

def over_http(url, token, do):
    identity = connector.get_model_identity()
    with AVPClient(url, agent_id="theirs", model_identity=identity, token=token, timeout=60) as client:
        try:
            return do(client)
        except (HandshakeError, TransportError) as error:
            return {"error": type(error).__name__, "said": str(error)}

def handshake(url, token):
    def do(client):
        found = client.handshake()
        return {
            "mode": found.mode.name, "path": found.resolution_path, "session_id": found.session_id,
            "remote": found.remote_identity.to_dict(),
        }
    return over_http(url, token, do)

def transmit(url, token, data, session, named, level):
    message = avp.decode(base64.b64decode(data))
    extra = {key: value for key, value in message.metadata.extra.items() if named or key != "model_hash"}
    metadata = dataclasses.replace(message.metadata, session_id=session, extra=extra)
    def do(client):
        answer = client.transmit(message.payload, metadata, avp.CompressionLevel[level])
        return {**answer.json(), "http": answer.http_version}
    return over_http(url, token, do)

def authority(file):
    os.environ["SSL_CERT_FILE"] = file

def send_text(url, token, content, session):
    message = JSONMessage(content=content, session_id=session, source_agent_id="theirs", target_agent_id="ours")
    return over_http(url, token, lambda client: client.send_text(message).json())

functions = (identity, think, generate, again, decode, encode, handshake, transmit, send_text, authority)
calls = {each.__name__: each for each in functions}
for line in sys.stdin:
    request = json.loads(line)
    name = request.pop("call")
    print(json.dumps(calls[name](**request)), file=answers, flush=True)
"""


class PeerProcess:
    """A running peer over the model in a folder; made by `peer_over`."""

    def __init__(self, process: subprocess.Popen[str], errors: Path) -> None:
        self._process = process
        self._errors = errors

    def call(self, name: str, **arguments: object) -> Any:
        """The answer of one of the script's functions."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        watch = threading.Timer(_TIMEOUT, self._process.kill)
        watch.start()
        try:
            self._process.stdin.write(json.dumps({"call": name, **arguments}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        finally:
            watch.cancel()
        assert line, f"the peer ended: {self._errors.read_text()[-2000:]}"
        return json.loads(line)

    def think(self, prompt: object, *, steps: int) -> bytes:
        """`AVPContext.to_bytes` of what the peer thought."""
        return b64decode(self.call("think", prompt=prompt, steps=steps)["data"])

    def generate(self, prompt: object, *, data: bytes | None, tokens: int) -> tuple[str, tuple[int, ...]]:
        """Text and ids of the peer's greedy continuation from the context in `data`."""
        given = None if data is None else b64encode(data).decode()
        answer = self.call("generate", prompt=prompt, data=given, tokens=tokens)
        return answer["text"], tuple(answer["tokens"])

    def again(self, data: bytes) -> bytes:
        """The peer's frame of the context that it read from `data`."""
        return b64decode(self.call("again", data=b64encode(data).decode()))

    def decode(self, data: bytes) -> Any:
        """What the peer reads in a frame."""
        return self.call("decode", data=b64encode(data).decode())

    def handshake(self, url: str, *, token: str | None = None) -> Any:
        """What `AVPClient.handshake` made of the answer."""
        return self.call("handshake", url=url, token=token)

    def transmit(
        self,
        url: str,
        data: bytes,
        *,
        session: str = "",
        token: str | None = None,
        named: bool = True,
        level: str = "NONE",
    ) -> Any:
        """The answer to `AVPClient.transmit` of a frame's payload; without its model hash if it is not to be named."""
        given = b64encode(data).decode()
        return self.call("transmit", url=url, token=token, data=given, session=session, named=named, level=level)

    def send_text(self, url: str, content: str, *, session: str = "", token: str | None = None) -> Any:
        """The answer to `AVPClient.send_text`."""
        return self.call("send_text", url=url, token=token, content=content, session=session)

    def encode(self, payload: bytes, *, level: str) -> bytes:
        """The peer's frame of a payload."""
        return b64decode(self.call("encode", payload=b64encode(payload).decode(), level=level))


@dataclass(frozen=True)
class Both:
    """One model, loaded on both sides."""

    ours: HuggingFaceConnector
    theirs: PeerProcess
    hash: str


@contextmanager
def both_over(folder: Path, *, seed: int) -> Iterator[Both]:
    """A tiny model on both sides, saved in the folder. Raises PeerUnavailable."""
    tiny_model("llama", seed=seed).save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    ours = HuggingFaceConnector.from_pretrained(folder / "model", device="cpu", dtype="float32")
    with peer_over(folder / "model", folder / "peer.log") as theirs:
        yield Both(ours, theirs, theirs.call("identity")["model_hash"])


@contextmanager
def peer_over(model: Path, errors: Path) -> Iterator[PeerProcess]:
    """The peer over the model in a folder; its environment is built first if it is not there.

    Raises:
        PeerUnavailable: no environment could be built.
    """
    python = environment(tell=print)
    add_http(python, tell=print)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    with (
        errors.open("w") as log,
        subprocess.Popen(
            [str(python), "-I", "-c", _SCRIPT, str(model)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env={**kept, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        ) as process,
    ):
        try:
            yield PeerProcess(process, errors)
        finally:
            process.kill()
