"""docs/benchmarks.md is made from the committed JSON."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_page_is_what_the_json_says() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "docs" / "make_benchmarks.py"), "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
