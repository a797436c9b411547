import subprocess
import sys
from pathlib import Path

from avp.cli import _COMMANDS

DOCS = Path(__file__).parents[2] / "docs"


def test_the_committed_page_is_what_the_commands_say() -> None:
    script = [sys.executable, str(DOCS / "make_cli.py"), "--print"]
    made = subprocess.run(script, capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    assert (DOCS / "cli.md").read_text() == made.stdout, "Fix: python docs/make_cli.py"


def test_the_page_has_every_command() -> None:
    headings = (DOCS / "cli.md").read_text().splitlines()
    assert [f"### avp {name}" for name in sorted(_COMMANDS)] == [line for line in headings if line.startswith("### ")]
