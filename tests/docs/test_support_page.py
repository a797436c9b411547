"""docs/support.md is made from the results of the conformance tests."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_page_is_what_the_results_say() -> None:
    command = [sys.executable, str(ROOT / "docs" / "make_support.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_connector_has_rows_and_no_law_is_broken() -> None:
    rows = json.loads((ROOT / "docs" / "bench" / "support.json").read_text())["rows"]
    assert {row["connector"] for row in rows} == {"huggingface", "llamacpp", "vllm"}
    assert [row for row in rows if row["failed"]] == []
