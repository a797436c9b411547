"""`avp bench perf`: the figures it gives and how they are made. Nothing here looks at a time."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from avp.bench import peer, perf, perf_memory, perf_wire
from avp.bench.peer import PeerUnavailable, Shape
from avp.bench.perf_engine import Sizes
from avp.bench.perf_figure import Figure, Target, compare, rounds
from avp.bench.perf_lossless import TEXT, real_text
from avp.bench.perf_plot import plot_perf
from avp.connectors.huggingface import HuggingFaceConnector
from avp.errors import UsageError
from avp.testing.tiny import tiny_connector

SMALL = Shape(layers=2, kv_heads=2, tokens=40, head_dim=8)
SIZES = Sizes(
    context=64, prompt=4, new_tokens=3, lengths=(16, 64), short=2, forks=3, fork_tokens=4, fork_prompts=(4, 1)
)
SCHEMA = {
    "name": str,
    "value": (float, type(None)),
    "target": (float, type(None)),
    "bound": str,
    "unit": str,
    "reached": (bool, type(None)),
    "n": int,
    "low": (float, type(None)),
    "high": (float, type(None)),
    "control": str,
    "detail": dict,
    "not_measured": (str, type(None)),
}
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def _plan(*names: str, peer: str | None = "no peer in tests") -> perf.Plan:
    return perf.Plan(names, "tiny", TEXT, peer, SMALL, SIZES, rounds=2, processes=1)


def _load(model: str, dtype: str) -> HuggingFaceConnector:
    return tiny_connector()


def _measure(*names: str) -> dict[str, Figure]:
    return {figure.name: figure for figure in perf.measure(_plan(*names), load=_load, tell=lambda line: None)}


def _fixed(seconds: list[float], order: list[str], name: str) -> Callable[[], float]:
    left = iter(seconds)

    def clock() -> float:
        order.append(name)
        return next(left)

    return clock


def test_a_figure_is_the_median_of_the_ratios_of_its_rounds() -> None:
    figure = compare("x", [6.0, 2.0, 9.0], [2.0, 1.0, 1.0], Target("y", at_least=3.0), bytes=5)
    assert (figure.value, figure.spread, figure.reached) == (3.0, (2.0, 9.0), True)
    assert figure.detail == {"bytes": 5}
    assert compare("x", [2.0], [1.0], Target("y", at_most=1.5)).reached is False
    assert compare("x", [2.0], [1.0], Target("y")).reached is None


def test_rounds_turn_the_order_and_leave_out_the_warm_ones() -> None:
    order: list[str] = []
    clocks = {"a": _fixed([9.0, 1.0, 2.0], order, "a"), "b": _fixed([9.0, 3.0, 4.0], order, "b")}
    assert rounds(clocks, 2) == {"a": (1.0, 2.0), "b": (3.0, 4.0)}
    assert order == ["b", "a", "a", "b", "b", "a"]


def test_wire_figures_follow_the_schema_and_say_why_the_peer_is_missing() -> None:
    plan = _plan("to_bytes", "from_bytes")
    figures = list(perf.measure(plan, load=_load, tell=lambda line: None))
    document = perf.document(figures, plan)
    assert document["benchmark"] == "perf"
    results = document["results"]
    assert isinstance(results, list)
    for row in results:
        assert {name: type(value) for name, value in row.items()}.keys() == SCHEMA.keys()
        assert all(isinstance(row[name], kind) for name, kind in SCHEMA.items())
        assert row["unit"] == "ratio"
    by_name = {row["name"]: row for row in results}
    assert list(by_name) == [
        "to_bytes",
        "to_bytes_peer",
        "from_bytes",
        "load",
        "from_bytes_verified",
        "load_verified",
        "from_bytes_peer",
    ]
    missing = by_name["to_bytes_peer"]
    assert (missing["value"], missing["reached"], missing["n"]) == (None, None, 0)
    assert missing["not_measured"] == "no peer in tests"
    size = len(perf_wire.synthetic(SMALL).to_bytes())
    assert by_name["to_bytes"]["detail"]["bytes"] == size > 40 * 2 * 2 * 2 * 2 * 8
    assert json.loads(json.dumps(document)) == document


@LINUX
def test_memory_counts_a_file_of_the_right_size_in_processes_of_their_own() -> None:
    figures = perf_memory.memory(Shape(layers=2, kv_heads=2, tokens=2048, head_dim=64), n=1)
    assert [figure.name for figure in figures] == ["memory", "memory_mapped"]
    detail = figures[0].detail
    assert detail["payload_bytes"] > 2 * 2 * 2 * 2048 * 64 * 2  # type: ignore[operator]
    assert {"save_peak_growth", "load_verified_peak_growth_private", "load_growth_mapped"} <= set(detail)


def test_first_token_is_the_same_from_context_bytes_and_prefill() -> None:
    figures = _measure("ttft")
    assert list(figures) == ["ttft", "ttft_transformers", "ttft_bytes"]
    assert figures["ttft"].detail["same_first_token"] is True
    assert len(figures["ttft"].ratios) == 2


def test_decoding_is_compared_token_for_token_at_each_length() -> None:
    figures = _measure("decode")
    assert figures["decode"].detail["same_tokens"] is True
    rows = figures["decode_growth"].detail["lengths"]
    assert isinstance(rows, list)
    assert [row["context_tokens"] for row in rows] == [16, 64]


@LINUX
def test_fan_out_counts_the_same_pages_from_both_sides() -> None:
    figures = _measure("fanout")
    assert list(figures) == ["fanout", "fanout_1"]
    detail = figures["fanout"].detail
    assert detail["own_positions"] == 4 + 4 - 1
    both = detail["private_bytes"] + detail["files_bytes"]  # type: ignore[operator]
    assert both - 8192 <= detail["mapped_bytes"] <= both  # type: ignore[operator] - Pss is cut to kilobytes
    assert detail["ideal_bytes"] == detail["context_bytes"] // 64 * (64 + 3 * 7)  # type: ignore[operator]


def test_the_lossless_figure_gives_back_every_bit() -> None:
    figure = _measure("lossless")["lossless_float32"]
    assert figure.detail["bit_identical"] is True
    assert figure.detail["raw_bytes"] == 64 * 4 * 2 * 2 * 16 * 4
    assert figure.reached is None
    assert figure.value == figure.detail["stored_bytes"] / figure.detail["raw_bytes"]  # type: ignore[operator]
    assert len(figure.detail["zstd_levels"]) == 6  # type: ignore[arg-type]


def test_text_comes_from_the_file_that_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert real_text(None) == TEXT
    path = tmp_path / "text.txt"
    path.write_text("words")
    assert real_text(path) == "words"


def test_a_peer_that_does_not_run_is_not_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AVP_CACHE", str(tmp_path))
    python = peer._python(tmp_path / f"peer-{peer.VERSION}")
    python.parent.mkdir(parents=True)
    figure = perf_wire.to_bytes(SMALL, n=1, peer=None, tell=lambda line: None)[1]
    assert figure.value is None
    assert "does not run" in figure.not_measured


@LINUX
def test_a_peer_that_fails_gives_its_last_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AVP_CACHE", str(tmp_path))
    python = peer._python(tmp_path / f"peer-{peer.VERSION}")
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\necho no such module >&2\nexit 1\n")
    python.chmod(0o755)
    figure = perf_wire.to_bytes(SMALL, n=1, peer=None, tell=lambda line: None)[1]
    assert figure.value is None
    assert "no such module" in figure.not_measured


@LINUX
def test_a_peer_answers_call_by_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AVP_CACHE", str(tmp_path))
    python = peer._python(tmp_path / f"peer-{peer.VERSION}")
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\necho '{\"bytes\": 9}'\nwhile read call; do echo '{\"seconds\": 0.5}'; done\n")
    python.chmod(0o755)
    figure = perf_wire.to_bytes(SMALL, n=3, peer=None, tell=lambda line: None)[1]
    assert (figure.detail["peer_bytes"], figure.detail["peer_seconds"], len(figure.ratios)) == (9, 0.5, 3)


def test_an_environment_that_cannot_be_built_is_left_out_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AVP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "executable", "/bin/false")
    told: list[str] = []
    with pytest.raises(PeerUnavailable, match="could not be"):
        peer.environment(tell=told.append)
    assert len(told) == 1
    assert not list((tmp_path / "cache").iterdir())


def test_the_command_measures_only_what_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[perf.Plan] = []

    def measure(plan: perf.Plan, *, load: perf.Load, tell: Callable[[str], object]) -> list[Figure]:
        asked.append(plan)
        return [Figure("to_bytes", perf_wire.TO_BYTES, (0.7, 0.8)), Figure("p", Target("c"), not_measured="no network")]

    monkeypatch.setattr(perf, "measure", measure)
    given = ["--only", "to_bytes", "--no-peer", "--out", str(tmp_path)]
    shown = CliRunner().invoke(perf.command, given, catch_exceptions=False)
    assert asked[0].names == ("to_bytes",)
    assert asked[0].peer == "switched off with --no-peer"
    assert "not measured" in shown.stdout
    assert json.loads((tmp_path / "perf.json").read_text())["results"][0]["value"] == 0.75
    assert (tmp_path / "perf.svg").read_text().startswith("<?xml")
    as_json = CliRunner().invoke(perf.command, [*given[:3], "--json"], catch_exceptions=False)
    assert json.loads(as_json.stdout)["results"][1]["not_measured"] == "no network"


def test_an_unknown_figure_is_refused_by_name() -> None:
    with pytest.raises(UsageError, match="speed"):
        CliRunner().invoke(perf.command, ["--only", "speed"], catch_exceptions=False)


def test_the_plot_holds_ratios_and_lengths(tmp_path: Path) -> None:
    rows = [{"context_tokens": n, "avp_seconds_per_token": 0.1, "transformers_seconds_per_token": 0.1} for n in (1, 2)]
    figures = [
        Figure("decode_growth", Target("c", at_most=1.05), (1.0,), {"lengths": rows}),
        Figure("load", Target("c", at_least=20.0), (10.0,)),
    ]
    text = plot_perf(figures, tmp_path).read_text()
    assert "decode_growth" in text
    assert "DynamicCache" in text
