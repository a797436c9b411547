"""A vLLM that generates from token ids: a server at a URL, or an engine in this process."""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from types import MappingProxyType
from typing import TYPE_CHECKING, Protocol, cast

import httpx2

from avp.connectors.options import Sampling
from avp.connectors.vllm_jobs import FIELD
from avp.errors import AccessDenied, AVPError, Busy, ConnectionFailed, MissingExtra, TimedOut, UsageError

if TYPE_CHECKING:
    from vllm import LLM

_NOTHING: Mapping[str, object] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Ask:
    """One generation; `tail` keeps the prompt's last page too, though it is not full."""

    ids: tuple[int, ...]
    sampling: Sampling
    tail: bool = False

    def to_json(self) -> dict[str, object]:
        """The sampling as vLLM's API spells it; what the model's own generation config would fill in is set."""
        how = self.sampling
        return {
            "max_tokens": how.max_new_tokens,
            "min_tokens": min(how.min_new_tokens, how.max_new_tokens),
            "temperature": how.temperature,
            "top_p": how.top_p,
            "top_k": 0,
            "repetition_penalty": 1.0,
            "stop": list(how.stop),
            "seed": how.seed,
            "include_stop_str_in_output": True,
        }

    @property
    def params(self) -> dict[str, object]:
        """What the plug-in is asked."""
        return {FIELD: {"wait": True, "tail": self.tail}}


@dataclass(frozen=True, slots=True)
class Answer:
    """A generation, or a piece of one: text, ids, why it ended, and what was said of the prompt's cached positions.

    `report` is the plug-in's own; vLLM leaves it out of streams. `cached` is vLLM's count.
    """

    text: str = ""
    ids: tuple[int, ...] = ()
    ended: str = ""
    report: Mapping[str, object] = field(default_factory=lambda: _NOTHING)
    cached: int | None = None


class Engine(Protocol):
    """What answers."""

    @property
    def max_positions(self) -> int:
        """The longest sequence that it takes."""
        ...

    def complete(self, ask: Ask) -> Answer:
        """The whole generation."""
        ...

    def stream(self, ask: Ask) -> Generator[Answer, None, None]:
        """The generation in pieces; closing it ends it early."""
        ...

    def close(self) -> None:
        """Let go of it."""
        ...


class Server:
    """`vllm serve`, by its OpenAI API."""

    def __init__(self, url: str, *, token: str | None, timeout: float) -> None:
        """Raises ConnectionFailed, AccessDenied: it cannot be reached, or wants another token."""
        self.url = url.rstrip("/")
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._client = httpx2.Client(headers=headers, timeout=httpx2.Timeout(timeout, connect=10.0))
        with self._faults():
            models = _checked(self._client.get(f"{self.url}/v1/models")).json()
        try:
            self._model = str(models["data"][0]["id"])
            self.max_positions = int(models["data"][0]["max_model_len"])
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise ConnectionFailed(
                f"{self.url} names no model of vLLM. Fix: pass the URL of a `vllm serve`, without /v1."
            ) from error

    def complete(self, ask: Ask) -> Answer:
        """One request."""
        with self._faults():
            return _answer(_checked(self._client.post(f"{self.url}/v1/completions", json=self._body(ask))).json())

    def stream(self, ask: Ask) -> Generator[Answer, None, None]:
        """One request whose answer comes as server-sent events."""
        body = {**self._body(ask), "stream": True, "stream_options": {"include_usage": True}}
        with self._faults(), self._client.stream("POST", f"{self.url}/v1/completions", json=body) as response:
            if response.is_error:
                response.read()
            for line in _checked(response).iter_lines():
                data = line.removeprefix("data:").strip()
                if line.startswith("data:") and data != "[DONE]":
                    yield _answer(json.loads(data))

    def close(self) -> None:
        """End the connections."""
        self._client.close()

    def _body(self, ask: Ask) -> dict[str, object]:
        return {
            "model": self._model,
            "prompt": list(ask.ids),
            "return_token_ids": True,
            "kv_transfer_params": ask.params,
            **ask.to_json(),
        }

    @contextmanager
    def _faults(self) -> Iterator[None]:
        """httpx2's errors as ours."""
        try:
            yield
        except httpx2.TimeoutException as error:
            raise TimedOut(f"{self.url} did not answer in time. Fix: pass a longer timeout.") from error
        except (httpx2.HTTPError, httpx2.InvalidURL, ValueError) as error:
            if isinstance(error, AVPError):
                raise
            raise ConnectionFailed(
                f"{self.url} cannot be used: {error}. Fix: start `vllm serve`, and pass its URL."
            ) from error


def _checked(response: httpx2.Response) -> httpx2.Response:
    """The response, if it is no refusal."""
    if not response.is_error:
        return response
    said = " ".join(response.text.split())[:300]
    if response.status_code in (401, 403):
        raise AccessDenied(f"vLLM refuses: {said}. Fix: pass the token of its --api-key.")
    if response.status_code in (429, 503):
        raise Busy(f"vLLM has too much to do: {said}. Fix: try again.")
    if response.status_code < 500:
        raise UsageError(f"vLLM refuses the request: {said}. Fix: see what it says.")
    raise ConnectionFailed(f"vLLM failed ({response.status_code}): {said}. Fix: see its log.")


def _answer(value: Mapping[str, object]) -> Answer:
    """A completion, or one event of a stream, out of its JSON."""
    try:
        if "error" in value:
            raise ConnectionFailed(f"vLLM failed: {str(value['error'])[:300]}. Fix: see its log.")
        choices = cast("list[dict[str, object]]", value["choices"])
        choice = choices[0] if choices else {}
        params = cast("Mapping[str, Mapping[str, object]]", value.get("kv_transfer_params") or {})
        return Answer(
            str(choice.get("text") or ""),
            tuple(cast("Sequence[int]", choice.get("token_ids") or ())),
            str(choice.get("finish_reason") or ""),
            params.get(FIELD) or _NOTHING,
            _cached(value.get("usage")),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ConnectionFailed(
            f"an answer came that is none of vLLM's: {str(value)[:200]}. Fix: pass the URL of a `vllm serve`."
        ) from error


def _cached(usage: object) -> int | None:
    details = usage.get("prompt_tokens_details") if isinstance(usage, dict) else None
    found = details.get("cached_tokens") if isinstance(details, dict) else None
    return found if isinstance(found, int) else None


class Offline:
    """A vLLM engine in this process. One generation at a time."""

    def __init__(self, model: Path, *, extra: Mapping[str, str], dtype: str, max_positions: int) -> None:
        """Raises MissingExtra: vLLM is not installed here."""
        try:
            from vllm.config import KVTransferConfig

            from vllm import LLM
        except ImportError as error:
            raise MissingExtra(
                "an offline engine needs vllm, which is not installed here. Fix: use the environment of vLLM "
                "(docs/guides/vllm.md), or a URL."
            ) from error
        self.max_positions = max_positions
        self._lock = Lock()
        self._llm: LLM = LLM(
            model=str(model),
            dtype=dtype,
            block_size=32,
            max_model_len=max_positions,
            enforce_eager=True,
            kv_transfer_config=KVTransferConfig(
                kv_connector="AVPKVConnector",
                kv_connector_module_path="avp.connectors.vllm_plugin",
                kv_role="kv_both",
                kv_load_failure_policy="recompute",
                kv_connector_extra_config=dict(extra),
            ),
        )

    def complete(self, ask: Ask) -> Answer:
        """One call of the engine."""
        from vllm import SamplingParams

        sampling = SamplingParams(**ask.to_json(), extra_args={"kv_transfer_params": ask.params})
        with self._lock:
            done = self._llm.generate([{"prompt_token_ids": list(ask.ids)}], sampling, use_tqdm=False)[0]
        output = done.outputs[0]
        report = (done.kv_transfer_params or {}).get(FIELD, _NOTHING)
        return Answer(output.text, tuple(output.token_ids), output.finish_reason or "", report, done.num_cached_tokens)

    def stream(self, ask: Ask) -> Generator[Answer, None, None]:
        """All of it at once, when it is there."""
        yield self.complete(ask)

    def close(self) -> None:
        """End the engine: what is being saved is saved."""
        self._llm.llm_engine.engine_core.shutdown()
