"""`avp demo`, on a tiny checkpoint."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from avp.testing.tiny import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def demo(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "from avp.cli import main; main()", "demo", "--max-new-tokens", "6", *options],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "COLUMNS": "200"},
    )


def test_the_demo_shows_what_each_mode_computes_and_says_that_exact_is_exact(checkpoint: Path) -> None:
    done = demo("--model", str(checkpoint), "--agents", "3", "--fixed-length")
    assert done.returncode == 0, done.stderr
    for words in ("positions computed", "AVP exact relay", "AVP latent", "EOS is suppressed", "peak KV"):
        assert words in done.stdout
    assert "Exact: all 18 tokens of the exact relay equal those of text + prefix cache." in " ".join(
        done.stdout.split()
    )


def test_the_demo_prints_one_json_document(checkpoint: Path) -> None:
    done = demo("--model", str(checkpoint), "--agents", "2", "--question", "How many?", "--json")
    document = json.loads(done.stdout)
    assert document["question"] == "How many?"
    assert [run["mode"] for run in document["runs"]] == ["text", "prefix", "exact", "latent"]
    assert document["runs"][2]["same_as_prefix"] is True
    assert document["saved"]["text"] == {"positions_saved": 0.0, "speed_up": 1.0}
    assert "A turn ends where it ends" in done.stderr


def test_a_model_that_is_not_there_is_one_line_and_exit_code_two() -> None:
    done = demo("--model", "nobody/nothing")
    assert done.returncode == 2
    assert "ModelNotFound" in done.stderr
    assert "Traceback" not in done.stderr
