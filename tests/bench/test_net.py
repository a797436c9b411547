"""`avp bench net`: the figures it gives and how they are made, with real processes. Nothing here looks at a time."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from avp.bench import net, net_disk, net_far, net_peer, net_transfer
from avp.bench.net_agent import receiving
from avp.bench.net_context import in_arena
from avp.bench.net_copy import copying
from avp.bench.net_far import FarFailed
from avp.bench.peer import Shape
from avp.bench.perf_figure import Figure
from avp.bench.perf_lossless import TEXT
from avp.bench.perf_wire import synthetic
from avp.errors import UsageError
from avp.shared import SharedTensors
from avp.testing.tiny import tiny_model, tiny_tokenizer

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="passes memory files and reads /proc")
SMALL = Shape(layers=2, kv_heads=2, tokens=400, head_dim=64)
KV = 2 * 2 * 2 * 400 * 64 * 2  # bytes


def _by_name(figures: list[Figure]) -> dict[str, Figure]:
    return {figure.name: figure for figure in figures}


def _script(text: str) -> list[str]:
    return [sys.executable, "-c", text]


def test_a_context_in_an_arena_is_the_plain_one_in_memory_that_can_be_passed() -> None:
    shared, plain = in_arena(SMALL), synthetic(SMALL)
    assert all(isinstance(segment.tensors, SharedTensors) for segment in shared.segments)
    assert shared.to_bytes() == plain.to_bytes()


def test_unix_figures_share_their_rounds_and_pass_or_copy_the_same_bytes() -> None:
    figures = _by_name(net_transfer.unix(SMALL, n=2))
    assert list(figures) == ["unix", "unix_huge_pages", "unix_first", "unix_copied"]
    assert {len(figure.ratios) for figure in figures.values()} == {2}
    sizes = {figure.detail["bytes"] for figure in figures.values()}
    assert sizes == {len(net_transfer.wire_bytes(in_arena(SMALL)))}
    assert figures["unix_first"].reached is None


def test_http_and_grpc_stand_beside_the_plain_copy_of_the_same_run() -> None:
    figures = _by_name(net_transfer.tcp(SMALL, n=1))
    assert list(figures) == ["http", "grpc"]
    assert {"http_seconds", "grpc_seconds", "huge_seconds", "pages_seconds"} <= set(figures["http"].detail)
    assert figures["http"].detail == figures["grpc"].detail


def test_every_round_begins_with_a_receiver_that_knows_nothing() -> None:
    context = in_arena(SMALL)
    with receiving() as receiver:
        clock = receiver.clock(context, "http")
        clock()
        handle = receiver.hand_over(context, "http")
        assert handle.receipt is not None
        assert handle.receipt.bytes_reused == 0
        assert handle.receipt.bytes_sent > KV


def test_the_second_hand_over_sends_the_pages_that_are_new() -> None:
    figures = _by_name(net_transfer.delta(SMALL, n=2))
    assert list(figures) == ["delta_bytes_http", "delta_time_http", "delta_bytes_grpc", "delta_time_grpc"]
    page = KV // 400 * 32
    for name in ("http", "grpc"):
        sent = figures[f"delta_bytes_{name}"].detail
        assert 2 * page < sent["second_bytes"] < 3 * page + 20_000  # type: ignore[operator]
        ratio = sent["second_bytes"] / sent["first_bytes"]  # type: ignore[operator]
        assert figures[f"delta_bytes_{name}"].ratios == (ratio, ratio)


def test_memory_is_that_of_new_processes_beyond_the_context() -> None:
    shape = Shape(layers=2, kv_heads=2, tokens=8192, head_dim=128)
    shape_bytes = 2 * 2 * 2 * 8192 * 128 * 2
    figures = _by_name(net_transfer.memory(shape, n=1))
    assert list(figures) == ["memory_unix", "memory_http", "memory_grpc"]
    for figure in figures.values():
        assert figure.ratios == (figure.detail["extra_bytes"] / 20e6,)  # type: ignore[operator]
        assert figure.detail["extra_bytes"] > -0.2 * shape_bytes  # type: ignore[operator] # what came is resident


def test_a_plain_copy_writes_all_bytes_and_waits_for_the_answer() -> None:
    with copying() as copies:
        for kind in ("unix", "tcp"):
            for memory in ("huge", "pages"):
                assert copies.clock(kind, memory, [b"x" * 100_000, b"y"])() > 0


def test_the_disk_figures_put_and_get_every_segment(tmp_path: Path) -> None:
    figures = _by_name(net_disk.disk(SMALL, tmp_path, n=2))
    assert list(figures) == ["disk_put", "disk_get", "disk_get_read"]
    assert {len(figure.ratios) for figure in figures.values()} == {2}
    assert not list(tmp_path.iterdir())


def test_the_first_token_is_the_same_after_a_hand_over_and_a_prefill(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    plan = net.Plan(("ttft",), str(tmp_path), TEXT, tokens=64, prompt=4, rounds=1)
    (figure,) = net.measure(plan, tmp_path, tell=lambda line: None)
    assert figure.detail["same_first_token"] is True
    assert (figure.detail["context_tokens"], figure.detail["prompt_tokens"]) == (64, 4)


def test_a_peer_that_is_not_wanted_or_does_not_run_is_not_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (figure,) = net_peer.peer_http(SMALL, tmp_path, n=1, peer="no peer", tell=lambda line: None)
    assert (figure.value, figure.not_measured) == (None, "no peer")
    monkeypatch.setenv("AVP_CACHE", str(tmp_path))
    (tmp_path / "peer-0.6.2" / "bin").mkdir(parents=True)
    (figure,) = net_peer.peer_http(SMALL, tmp_path, n=1, peer=None, tell=lambda line: None)
    assert figure.value is None
    assert "does not run" in figure.not_measured


def test_another_process_that_fails_gives_its_last_words() -> None:
    with pytest.raises(FarFailed, match="no such thing"), net_far.running(_script("raise SystemExit('no such thing')")):
        pass
    with pytest.raises(FarFailed, match="does not run"), net_far.running(["/no/such/program"]):
        pass


def test_another_process_answers_until_it_ends() -> None:
    text = "import sys; print('{}', flush=True); print('{\"value\": 3}' if input() else '', flush=True)"
    with net_far.running(_script(text)) as far:
        assert far.number("anything") == 3.0
        with pytest.raises(FarFailed):
            far.ask("anything")


def test_the_command_writes_one_document_of_figures(tmp_path: Path) -> None:
    given = ["--only", "peer", "--no-peer", "--out", str(tmp_path), "--json"]
    shown = CliRunner().invoke(net.command, given, catch_exceptions=False)
    found = json.loads((tmp_path / "net.json").read_text())
    assert json.loads(shown.stdout) == found
    assert (found["benchmark"], found["settings"]["rounds"]) == ("net", 7)
    (row,) = found["results"]
    assert (row["name"], row["value"], row["not_measured"]) == ("http_peer", None, "switched off with --no-peer")


def test_an_unknown_figure_is_refused_by_name() -> None:
    with pytest.raises(UsageError, match="speed"):
        CliRunner().invoke(net.command, ["--only", "speed"], catch_exceptions=False)
