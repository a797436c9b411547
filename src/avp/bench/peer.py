"""The peer, `avp==0.6.2` of PyPI, in an environment of its own; only its public API is called, in its own process."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from avp.errors import AVPError
from avp.folders import cache_dir

VERSION = "0.6.2"
_HTTP = "httpx[http2]"
PACKAGES = ("torch==2.13.0", f"avp[hf]=={VERSION}", "accelerate", _HTTP)
_TIMEOUT = 120.0  # seconds for one answer

# Makes a context of random KV and then, for each line "to_bytes" or "from_bytes", does that once and says the seconds.
_SCRIPT = """
import gc, json, sys, time
import torch
from transformers import DynamicCache
from avp import AVPContext
shape = json.loads(sys.argv[1])
torch.manual_seed(0)
size = (1, shape["kv_heads"], shape["tokens"], shape["head_dim"])
cache = DynamicCache()
for layer in range(shape["layers"]):
    cache.update(torch.randn(size).bfloat16(), torch.randn(size).bfloat16(), layer)
context = AVPContext(
    past_key_values=cache, model_hash="0" * 64, num_steps=0, seq_len=shape["tokens"], model_family="llama",
    hidden_dim=shape["kv_heads"] * shape["head_dim"], num_layers=shape["layers"],
)
data = context.to_bytes()
calls = {"to_bytes": context.to_bytes, "from_bytes": lambda: AVPContext.from_bytes(data)}
print(json.dumps({"bytes": len(data)}), flush=True)
for line in sys.stdin:
    gc.collect()
    started = time.perf_counter()
    result = calls[line.strip()]()
    seconds = time.perf_counter() - started
    del result
    print(json.dumps({"seconds": seconds}), flush=True)
"""


class PeerUnavailable(AVPError):
    """The peer cannot be measured here; the message is the reason."""


@dataclass(frozen=True, slots=True)
class Shape:
    """KV of `layers` layers, [kv_heads, tokens, head_dim] each for K and V."""

    layers: int = 28
    kv_heads: int = 2
    tokens: int = 4532
    head_dim: int = 128


class Peer:
    """A running process of the peer that holds one context; made by `running`."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.nbytes = int(self._answer()["bytes"])

    def seconds(self, call: str) -> float:
        """Do "to_bytes" or "from_bytes" once; the seconds that it took, told by the peer's own process.

        Raises:
            PeerUnavailable: the process ended.
        """
        if self._process.stdin is None or self._process.poll() is not None:
            raise PeerUnavailable("the peer's process has ended")
        self._process.stdin.write(call + "\n")
        self._process.stdin.flush()
        return float(self._answer()["seconds"])

    def _answer(self) -> dict[str, float]:
        watch = threading.Timer(_TIMEOUT, self._process.kill)
        watch.start()
        try:
            line = self._process.stdout.readline() if self._process.stdout else ""
        finally:
            watch.cancel()
        if not line.startswith("{"):
            self._process.kill()
            said = (self._process.stderr.read() if self._process.stderr else "").strip().splitlines()
            raise PeerUnavailable(f"the peer's process failed: {said[-1] if said else 'it said nothing'}")
        answer: dict[str, float] = json.loads(line)
        return answer


@contextmanager
def running(shape: Shape, *, tell: Callable[[str], object]) -> Iterator[Peer]:
    """The peer with a context of that shape; its environment is built first if it is not there (`tell` hears of it).

    Raises:
        PeerUnavailable: no environment could be built, or the process failed.
    """
    python = environment(tell=tell)
    given = json.dumps(asdict(shape))
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    try:
        process = subprocess.Popen(
            [str(python), "-I", "-c", _SCRIPT, given],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=variables,
        )
    except OSError as error:
        raise PeerUnavailable(f"{python} does not run: {error.strerror}") from error
    with process:
        try:
            yield Peer(process)
        finally:
            process.kill()


def environment(*, tell: Callable[[str], object]) -> Path:
    """The Python of the peer's environment in `cache_dir()`, built once (in another place, then renamed).

    Raises:
        PeerUnavailable: it could not be built; the reason is pip's.
    """
    folder = cache_dir() / f"peer-{VERSION}"
    if not folder.is_dir():
        tell(f"peer: building its environment in {folder} (once; some minutes) …")
        scratch = folder.with_name(f".{folder.name}-{os.getpid()}")
        try:
            scratch.parent.mkdir(parents=True, exist_ok=True)
            _run([sys.executable, "-m", "venv", str(scratch)])
            _install(_python(scratch), *PACKAGES)
            scratch.rename(folder)
        except OSError as error:
            raise PeerUnavailable(f"its environment could not be written: {error}") from error
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        tell("peer: its environment is ready")
    return _python(folder)


def add_http(python: Path, *, tell: Callable[[str], object]) -> None:
    """Complete an environment that was built without what the peer's HTTP client needs.

    Raises:
        PeerUnavailable: it could not be installed; the reason is pip's.
    """
    try:
        found = subprocess.run([str(python), "-I", "-c", "import h2, httpx"], capture_output=True, check=False)
        if found.returncode:
            tell(f"peer: adding {_HTTP} to its environment …")
            _install(python, _HTTP)
    except OSError as error:
        raise PeerUnavailable(f"{python} does not run: {error.strerror}") from error


def _install(python: Path, *packages: str) -> None:
    _run([str(python), "-m", "pip", "install", "--no-input", "--retries=1", *packages])


def _python(folder: Path) -> Path:
    return folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        raise PeerUnavailable(f"its environment could not be built: {said[-1] if said else command[-1]}")
