"""What `Server` makes of servers that refuse, break off, or are no vLLM."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

import avp
from avp.connectors.options import Sampling
from avp.connectors.vllm_engine import Ask, Server
from avp.connectors.vllm_run import Run, VLLMStream, complete

MODELS = {"data": [{"id": "m", "max_model_len": 64}]}
ASK = Ask((1, 2, 3), Sampling(4, 0, 0.0, 1.0, ("x",), 7), tail=True)


@contextmanager
def answering(*answers: tuple[int, bytes], models: object = MODELS) -> Iterator[tuple[str, list[dict[str, object]]]]:
    """A server that gives these answers to completions, one after the other; and what it was asked."""
    asked: list[dict[str, object]] = []
    left = list(answers)

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            return

        def _say(self, status: int, data: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self) -> None:
            self._say(200, json.dumps(models).encode())

        def do_POST(self) -> None:
            asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            asked[-1]["authorization"] = self.headers.get("Authorization")
            self._say(*left.pop(0))

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", asked
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def connected(*answers: tuple[int, bytes]) -> Iterator[Server]:
    with answering(*answers) as (url, _):
        server = Server(url, token=None, timeout=20)
        yield server
        server.close()


def completion(**more: object) -> bytes:
    choice = {"text": "hi", "token_ids": [5, 6], "finish_reason": "length"}
    return json.dumps({"choices": [choice], **more}).encode()


def test_a_request_holds_ids_the_whole_sampling_and_what_is_asked_of_the_plug_in() -> None:
    with answering((200, completion(kv_transfer_params={"avp": {"computed": 4}}))) as (url, asked):
        server = Server(url + "/", token="t", timeout=20)
        assert server.max_positions == 64
        answer = server.complete(ASK)
        server.close()
    assert (answer.text, answer.ids, answer.ended, answer.report) == ("hi", (5, 6), "length", {"computed": 4})
    assert asked[0]["prompt"] == [1, 2, 3]
    assert asked[0]["authorization"] == "Bearer t"
    assert asked[0]["kv_transfer_params"] == {"avp": {"wait": True, "tail": True}}
    assert (asked[0]["temperature"], asked[0]["repetition_penalty"], asked[0]["seed"]) == (0.0, 1.0, 7)


@pytest.mark.parametrize(
    ("status", "error", "words"),
    [
        (400, avp.UsageError, "refuses the request: too long"),
        (401, avp.AccessDenied, "token of its --api-key"),
        (429, avp.Busy, "too much to do"),
        (503, avp.Busy, "too much to do"),
        (500, avp.ConnectionFailed, "failed \\(500\\): too long"),
    ],
)
def test_refusals_are_errors_of_ours(status: int, error: type[avp.AVPError], words: str) -> None:
    with connected((status, b"too long"), (status, b"too long")) as server:
        with pytest.raises(error, match=words):
            server.complete(ASK)
        with pytest.raises(error, match=words):
            list(server.stream(ASK))


@pytest.mark.parametrize("answer", [b"<html>", b"[]", b"{}", b'{"choices": 3}', b'{"error": "broke"}'])
def test_an_answer_that_is_none_of_vllms_is_refused(answer: bytes) -> None:
    with connected((200, answer)) as server, pytest.raises(avp.ConnectionFailed):
        server.complete(ASK)


@pytest.mark.parametrize("models", [{}, {"data": []}, {"data": [{"id": "m"}]}, [], 3])
def test_a_server_that_is_no_vllm_is_noticed_at_once(models: object) -> None:
    with answering(models=models) as (url, _), pytest.raises(avp.ConnectionFailed, match="names no model"):
        Server(url, token=None, timeout=20)


def test_no_server_is_a_failed_connection() -> None:
    with pytest.raises(avp.ConnectionFailed, match="start `vllm serve`"):
        Server("http://127.0.0.1:1", token=None, timeout=20)


EVENTS = b"\n\n".join(
    b"data: " + json.dumps(value).encode()
    for value in (
        {"choices": [{"text": "a", "token_ids": [1]}]},
        {"choices": [{"text": "b", "token_ids": [2], "finish_reason": "stop"}]},
        {"choices": [], "usage": {"prompt_tokens_details": {"cached_tokens": 2}}},
    )
)


def test_a_stream_comes_in_pieces_and_ends_with_vllms_count_of_cached_tokens() -> None:
    with connected((200, EVENTS + b"\n\ndata: [DONE]\n\n")) as server:
        runs: list[Run] = []
        stream = VLLMStream(server, ASK, runs.append)  # type: ignore[arg-type]
        assert list(stream) == ["a", "b"]
        _ = stream.result
    assert (runs[0].answer.ids, runs[0].answer.ended) == ((1, 2), "stop")
    assert runs[0].counts(3, 0) == (2, 2, ())


def test_what_vllm_does_not_count_is_said_to_be_unknown() -> None:
    with connected((200, completion())) as server:
        run = complete(server, ASK)
    cached, computed, reasons = run.counts(100, 64)
    assert (cached, computed) == (0, 101)
    assert "--enable-prompt-tokens-details" in reasons[0]
    assert "vLLM took 0 of 64 positions" in reasons[1]
