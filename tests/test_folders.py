"""Where AVP keeps what it made."""

from __future__ import annotations

import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from avp.folders import cache_dir, machine_secret


def test_the_secret_of_a_machine_is_made_once_and_is_for_its_owner_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AVP_CACHE", str(tmp_path / "cache"))
    with ThreadPoolExecutor(8) as pool:
        found = set(pool.map(lambda _: machine_secret(), range(8)))
    assert len(found) == 1
    assert len(found.pop()) == 32
    assert stat.S_IMODE((cache_dir() / "secret").stat().st_mode) == 0o600
    assert [path.name for path in cache_dir().iterdir()] == ["secret"]


def test_two_machines_have_two_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = set()
    for name in ("one", "two"):
        monkeypatch.setenv("AVP_CACHE", str(tmp_path / name))
        found.add(machine_secret())
    assert len(found) == 2
