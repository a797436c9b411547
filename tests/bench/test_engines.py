"""`avp bench engines`: how the text is cut, how logits are compared, and a small run with real engines and sockets."""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from avp.bench import engines
from avp.bench.engines_pairs import PAIRS, Pair, Share, Target, reached
from avp.bench.engines_plot import plot_engines
from avp.bench.engines_read import transformers_reader
from avp.bench.engines_run import Desk, Found, measure_group
from avp.bench.engines_task import Sizes, Task, best, cut, divergence
from avp.errors import UsageError
from avp.testing.tiny import tiny_model, tiny_tokenizer

SMALL = Sizes(window=32, judged=16, prompt=32, question=4, answer=6)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tiny")
    tiny_model("llama", seed=0).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def test_windows_and_prompts_share_no_token_and_end_within_the_text() -> None:
    task = cut(range(1000), positions=40, prompts=5, sizes=SMALL)
    assert [len(ids) for ids in task.windows] == [48] * 3
    assert [len(ids) for ids in task.prompts] == [36] * 5
    used = [token for ids in (*task.windows, *task.prompts) for token in ids]
    assert len(set(used)) == len(used)
    assert used == sorted(used)


def test_a_text_that_is_too_short_is_refused() -> None:
    with pytest.raises(UsageError, match="the text has 100 tokens and 132 are needed"):
        cut(range(100), positions=32, prompts=1, sizes=SMALL)


def test_a_task_survives_the_way_to_another_process(tmp_path: Path) -> None:
    task = cut(range(1000), positions=40, prompts=5, sizes=SMALL)
    assert Task.load(task.save(tmp_path / "task.json")) == task


def test_divergence_is_kl_over_the_whole_vocabulary() -> None:
    own = np.log(np.array([[0.5, 0.25, 0.25], [0.8, 0.1, 0.1]], np.float32))
    other = np.log(np.array([[0.25, 0.5, 0.25], [0.8, 0.1, 0.1]], np.float32)) + 3
    assert divergence(own, own) == 0
    assert divergence(own, other) == pytest.approx((0.5 * np.log(2) - 0.25 * np.log(2)) / 2, rel=1e-6)
    assert best(other) == [1, 0]


def test_pairs_are_all_ordered_ones_with_equal_weights() -> None:
    assert len(PAIRS) == 8
    assert Pair.parse("vllm>llamacpp") in PAIRS
    for text in ("vllm>vllm", "transformers>llamacpp-f32", "vllm", "vllm>gpt"):
        with pytest.raises(UsageError, match="is no pair of engines with equal weights"):
            Pair.parse(text)


def test_a_target_is_reached_or_not_and_none_is_not_mentioned() -> None:
    found = {"agreement": Share(99, 100).to_json(), "identical": Share(60, 100).to_json(), "kl": 0.002}
    assert reached(Target(agreement=0.985, identical=0.65, kl=0.001), found) == {
        "agreement": True,
        "identical": False,
        "kl": False,
    }
    assert reached(Target(), found) == {}


def test_logits_are_those_of_the_model(checkpoint: str, tmp_path: Path) -> None:
    reader = transformers_reader(checkpoint)
    ids = list(range(5, 45))
    (rows,) = reader.logits([(reader.connector.prefill(ids[:32]), tuple(ids[32:]))], tmp_path)
    with torch.no_grad():
        wanted = reader.connector.model(torch.tensor([ids])).logits[0, 32:].numpy()
    assert rows.shape == wanted.shape
    assert np.allclose(rows, wanted, atol=1e-4)


@pytest.mark.parametrize("wrong", [0, 2, 5, None])
def test_a_draft_changes_nothing_but_the_time(checkpoint: str, wrong: int | None) -> None:
    reader = transformers_reader(checkpoint)
    item = (reader.connector.prefill(list(range(5, 37))), (40, 41, 42))
    plain = reader.plain(item, count=6)
    draft = [token + (i == wrong) for i, token in enumerate(plain)]
    assert reader.greedy([item], count=6, drafts=[draft]) == [plain]


@pytest.mark.skipif(sys.platform != "linux", reason="the processes meet over unix sockets that pass memory")
def test_two_engines_in_processes_of_their_own_give_a_record_for_each_pair(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: make llamacpp")
    from ..connectors.test_llamacpp_architectures import write_model

    model = str(write_model(tmp_path / "tiny.gguf", "llama"))
    task = cut([3 + 7 * i % 250 for i in range(400)], positions=32, prompts=2, sizes=SMALL)
    places = {name: (sys.executable, model) for name in ("transformers-f32", "llamacpp-f32")}
    pairs = [pair for pair in PAIRS if pair.sender in places]
    found, steps = Found(), []

    def keep(more: Found) -> None:
        found.records.extend(more.records)
        found.engines.update(more.engines)

    with ExitStack() as stack:
        file = task.save(tmp_path / "task.json")
        measure_group(pairs, Desk(stack, tmp_path, file, places, 1, 1, steps.append, {}), keep=keep)
    assert {row["pair"] for row in found.records} == {pair.name for pair in pairs}
    assert len(found.records) == len(pairs) == 2
    assert set(found.engines) == set(places)
    for row in found.records:
        json.dumps(row)
        assert row["class"] == "bounded"
        for part in ("agreement", "identical"):
            assert row["control"][part]["share"] == 1
            assert row[part]["n"] == (32 if part == "agreement" else 2)
        assert row["control"]["kl"] < 1e-6
        assert 0 < row["kl"] < 0.01
        assert row["agreement"]["share"] > 0.8
    document = {"results": found.records}
    assert "→" in plot_engines(document, tmp_path).read_text()


def test_what_an_earlier_run_measured_is_kept_only_under_the_same_settings(tmp_path: Path) -> None:
    data = tmp_path / "text.txt"
    data.write_text("some text")
    (tmp_path / "engines.json").write_text(json.dumps({"settings": {"positions": 1}, "results": []}))
    done = CliRunner().invoke(engines.command, ["--data", str(data), "--out", str(tmp_path), "--resume"])
    assert isinstance(done.exception, UsageError)
    assert "was measured with other settings" in str(done.exception)
