"""An environment of the peer that lacks its HTTP client is completed; one that has it is left alone."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from avp.bench.peer import PeerUnavailable, add_http

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the Python that stands for the peer's is a script")


def python(folder: Path, *, has_it: bool, installs: bool = True) -> Path:
    """What stands for a Python: it notes what it is asked to install."""
    path = folder / "python"
    path.write_text(
        "#!/bin/sh\n"
        f'if [ "$1" = -I ]; then exit {0 if has_it else 1}; fi\n'
        f'echo "$@" >> {folder / "asked"}; echo no network >&2; exit {0 if installs else 1}\n'
    )
    path.chmod(0o755)
    return path


def test_what_is_missing_is_installed_and_told(tmp_path: Path) -> None:
    told: list[str] = []
    add_http(python(tmp_path, has_it=False), tell=told.append)
    assert (tmp_path / "asked").read_text().split()[:3] == ["-m", "pip", "install"]
    assert "httpx[http2]" in (tmp_path / "asked").read_text()
    assert len(told) == 1


def test_what_is_there_is_left_alone(tmp_path: Path) -> None:
    told: list[str] = []
    add_http(python(tmp_path, has_it=True), tell=told.append)
    assert not (tmp_path / "asked").exists()
    assert told == []


def test_without_a_network_the_reason_is_pips(tmp_path: Path) -> None:
    with pytest.raises(PeerUnavailable, match="no network"):
        add_http(python(tmp_path, has_it=False, installs=False), tell=print)
    with pytest.raises(PeerUnavailable, match="does not run"):
        add_http(tmp_path / "nowhere", tell=print)
