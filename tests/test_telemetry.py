"""Spans: told to whoever listens, in whatever thread, and written as a trace."""

from __future__ import annotations

import json
import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from avp.telemetry import Span, Trace, listening, log_spans, span


def test_a_span_is_told_when_it_ends_to_those_who_listen_then() -> None:
    first, second = Trace(), Trace()
    with span("before"):
        pass
    with listening(first):
        with listening(second), span("both", n=1):
            assert not first.spans
        with span("one"):
            pass
    with span("after"):
        pass
    assert [each.name for each in first.spans] == ["both", "one"]
    assert [each.name for each in second.spans] == ["both"]
    assert dict(first.spans[0].attributes) == {"n": 1}
    assert first.spans[0].stop <= first.spans[1].start


def test_a_span_that_ends_in_an_error_is_told_and_the_error_goes_on() -> None:
    trace = Trace()
    with listening(trace), pytest.raises(KeyError), span("broken"):
        raise KeyError("x")
    assert [each.name for each in trace.spans] == ["broken"]


def test_a_listener_that_was_added_twice_is_told_until_it_is_removed() -> None:
    trace = Trace()
    with listening(trace), listening(trace), span("twice"):
        pass
    with span("after"):
        pass
    assert [each.name for each in trace.spans] == ["twice", "twice"]


def test_spans_overlap_where_both_are_under_way() -> None:
    def at(start: float, stop: float) -> Span:
        return Span("x", start, stop, {}, 0)

    assert at(0, 2).overlaps(at(1, 3))
    assert at(1, 3).overlaps(at(0, 2))
    assert at(0, 9).overlaps(at(4, 5))
    assert not at(0, 1).overlaps(at(1, 2))


def test_threads_come_and_go_as_listeners_while_others_work() -> None:
    def work(number: int) -> int:
        trace = Trace()
        for _ in range(100):
            with listening(trace), span("mine", number=number):
                pass
        return sum(each.attributes["number"] == number for each in trace.spans)

    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(work, range(6))) == [100] * 6
    outside = Trace()
    with listening(outside), span("still"):
        pass
    assert len(outside.spans) == 1


def test_a_trace_is_a_file_that_trace_viewers_open(tmp_path: Path) -> None:
    trace = Trace()
    with listening(trace), span("outer", bytes=5, path=tmp_path), span("inner"):
        pass
    trace.save(tmp_path / "trace.json")
    inner, outer = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert (inner["name"], outer["name"], outer["ph"]) == ("inner", "outer", "X")
    assert outer["ts"] <= inner["ts"]
    assert outer["ts"] + outer["dur"] >= inner["ts"] + inner["dur"]
    assert outer["args"] == {"bytes": "5", "path": str(tmp_path)}


def test_spans_go_to_the_log_at_debug(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "avp"), listening(log_spans), span("send", start=32):
        pass
    assert caplog.records[-1].name == "avp"
    assert "send" in caplog.text
    assert "'start': 32" in caplog.text
