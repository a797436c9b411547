"""vLLM as processes of their own, for tests: offline engines that are asked line by line, and servers."""

from __future__ import annotations

import json
import os
import socket
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from time import monotonic
from typing import Any

import httpx2

PROMPT = slice(0, 1000)  # of a prose of 2,000 ids
ANSWER = 10  # tokens
POSITIONS = range(1001, 1201)  # where next tokens are compared, behind a context of PROMPT
HERE = Path(__file__).parent
PATIENCE = 600.0  # seconds; an engine starts in 8 on an idle machine, and in 150 on a busy one


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(HERE.parents[1] / "src"), "HF_HUB_OFFLINE": "1"}


@dataclass(frozen=True)
class Said:
    """What a request gave."""

    ids: tuple[int, ...]
    cached: int
    ttft: float
    seconds: float  # of the whole call
    hooked: float  # of these, within the plug-in
    avp: dict[str, Any] | None


class Process:
    """An offline engine in another process."""

    def __init__(self, process: subprocess.Popen[str], log: Path) -> None:
        self.process, self.log = process, log
        self._said: SimpleQueue[str] = SimpleQueue()
        Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("@"):
                self._said.put(line[1:])
        self._said.put("")

    def call(self, value: object) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(value) + "\n")
        self.process.stdin.flush()
        answer = self._said.get(timeout=PATIENCE)
        assert answer, f"vLLM ended; its log ends with:\n{self.log.read_text()[-4000:]}"
        return json.loads(answer)

    def generate(
        self, *prompts: Sequence[int], count: int = 1, params: dict[str, Any] | None = None, salt: str | None = None
    ) -> list[Said]:
        given = [{"prompt_token_ids": list(ids), **({"cache_salt": salt} if salt else {})} for ids in prompts]
        call = {"do": "generate", "prompts": given, "count": count, "params": params}
        return [
            Said(tuple(each["ids"]), each["cached"], each["ttft"], each["seconds"], each["hooked"], each["avp"])
            for each in self.call(call)
        ]

    def hits(self) -> int:
        """Positions that vLLM itself counts as come from outside."""
        return int(self.call({"do": "hits"}))

    def plug(self, sides: bool) -> None:
        """Put the plug-in's two sides in or out."""
        self.call({"do": "plug", "sides": sides})

    def reset(self) -> None:
        """Have vLLM forget its own prefix cache."""
        assert self.call({"do": "reset"})


@contextmanager
def offline(
    python: str, model: Path, extra: dict[str, str] | None, log: Path, *, longest: int = 1536
) -> Iterator[Process]:
    """An engine, with the plug-in unless `extra` is None; at the end it finishes its saves."""
    with (
        log.open("w") as errors,
        subprocess.Popen(
            [python, str(HERE / "in_vllm.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            bufsize=1,
            env=environment(),
        ) as started,
    ):
        process = Process(started, log)
        try:
            assert process.call({"model": str(model), "extra": extra, "longest": longest}) == "ready"
            yield process
            assert started.stdin is not None
            started.stdin.close()
            started.wait(PATIENCE)
        finally:
            started.kill()


@contextmanager
def served(python: str, model: Path, extra: dict[str, str], log: Path) -> Iterator[str]:
    """The URL of a `vllm serve` with the plug-in."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    transfer = {
        "kv_connector": "AVPKVConnector",
        "kv_connector_module_path": "avp.connectors.vllm_plugin",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": extra,
    }
    command = [str(Path(python).parent / "vllm"), "serve", str(model), "--host", "127.0.0.1", "--port", str(port)]
    command += ["--dtype", "float32", "--enforce-eager", "--block-size", "32", "--max-model-len", "1536"]
    command += ["--enable-prompt-tokens-details", "--kv-transfer-config", json.dumps(transfer)]
    env = {**environment(), "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "OMP_WAIT_POLICY": "passive"}
    with log.open("w") as out, subprocess.Popen(command, stdout=out, stderr=out, env=env) as process:
        url = f"http://127.0.0.1:{port}"
        try:
            _wait(url, process, log)
            yield url
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()


def _wait(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    until = monotonic() + PATIENCE
    transport = httpx2.HTTPTransport(retries=0)
    with httpx2.Client(transport=transport, timeout=5.0) as client:
        while monotonic() < until and process.poll() is None:
            try:
                if client.get(f"{url}/health").status_code == 200:
                    return
            except httpx2.TransportError:
                pass
            try:
                process.wait(0.5)
            except subprocess.TimeoutExpired:
                continue
    raise AssertionError(f"vLLM did not start; its log ends with:\n{log.read_text()[-4000:]}")
