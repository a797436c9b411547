"""The benchmarks of real engines, on next to nothing: they run, and their own control holds."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from avp.bench.engines import command as engines

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: make llamacpp")
pytestmark = pytest.mark.real


def test_two_engines_on_float32_weights_meet_over_a_wire(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Anna keeps the red key in the kitchen drawer, and Ben the blue one under the mat. " * 400)
    asked = ["--data", str(text), "--pairs", "transformers-f32>llamacpp-f32", "--positions", "10", "--prompts", "1"]
    done = CliRunner().invoke(engines, [*asked, "--plain", "0", "--out", str(tmp_path)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert "transformers-f32>llamacpp-f32" in done.output
    assert json.loads((tmp_path / "engines.json").read_text())
