"""One store on disk, many processes: they share it, and none that is killed leaves half a segment."""

from __future__ import annotations

import os
import random
import select
import signal
import subprocess
import sys
from pathlib import Path

from avp.stores.disk import DiskStore
from avp.testing.store import EXACT, stored_blobs

# Puts its segments one after the other and says which are safe.
PUTS = """
import sys
from avp.stores.disk import DiskStore
from avp.testing.store import stored_blobs
store = DiskStore(sys.argv[1])
for seed in range(int(sys.argv[2]), int(sys.argv[2]) + 400):
    for blob in stored_blobs(seed=seed, tokens=600):
        store.put(blob, tenant="a")
        print(blob.entry.pages[-1], flush=True)
"""

# Puts and gets the same segments as the others do, and some of its own.
SHARES = """
import sys
from avp.stores.disk import DiskStore
from avp.testing.store import EXACT, blob_bytes, stored_blobs
store = DiskStore(sys.argv[1])
own = int(sys.argv[2])
for seed in [*range(12), *range(own, own + 4)]:
    for blob in stored_blobs(seed=seed, tokens=300):
        store.put(blob, tenant="a")
        for page in blob.entry.pages:
            back = store.get(page, tenant="a", want=EXACT).verify()
            assert b"".join(back.runs) == b"".join(blob.runs)
store.close()
"""


def run(script: str, *arguments: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", script, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def kill_after(child: subprocess.Popen[bytes], acknowledged: int, delay: float) -> list[str]:
    """Kill the child some moments after it acknowledged so many puts; all pages that it acknowledged."""
    assert child.stdout is not None
    said = b"".join(child.stdout.readline() for _ in range(acknowledged))
    select.select([], [], [], delay)
    os.kill(child.pid, signal.SIGKILL)
    rest, _ = child.communicate()
    lines = (said + rest).split(b"\n")[:-1]  # a line that was cut is no acknowledgement
    return [line.decode() for line in lines]


def test_a_process_killed_at_any_moment_leaves_whole_segments_or_none(tmp_path: Path) -> None:
    dice = random.Random(20)
    safe: set[str] = set()
    moments = [(dice.randrange(1, 25), dice.random() * 0.006) for _ in range(20)]
    for first in range(0, 20, 2):
        children = [run(PUTS, str(tmp_path / "store"), str(1000 * (first + i))) for i in range(2)]
        for i, child in enumerate(children):
            safe |= set(kill_after(child, *moments[first + i]))
        store = DiskStore(tmp_path / "store")
        pages = sorted(safe)
        assert all(store.have(pages, tenant="a", want=EXACT))
        for page in pages:
            store.get(page, tenant="a", want=EXACT).verify()
        assert list(store.verify()) == []
        store.collect()
        assert all(store.have(pages, tenant="a", want=EXACT))
        store.close()
    assert len(safe) >= 20


def test_four_processes_put_and_get_at_once(tmp_path: Path) -> None:
    children = [run(SHARES, str(tmp_path / "store"), str(100 * (i + 1))) for i in range(4)]
    for child in children:
        _, errors = child.communicate(timeout=120)
        assert child.returncode == 0, errors.decode()
    store = DiskStore(tmp_path / "store")
    assert len(list(store.entries())) == 2 * (12 + 4 * 4)
    assert list(store.verify()) == []
    assert store.collect() == 0
    for seed in range(12):
        for blob in stored_blobs(seed=seed, tokens=300):
            assert all(store.have(blob.entry.pages, tenant="a", want=EXACT))
    store.close()


def test_an_index_built_again_while_others_write_loses_nothing(tmp_path: Path) -> None:
    children = [run(SHARES, str(tmp_path / "store"), str(100 * (i + 1))) for i in range(2)]
    rebuilt = 0
    while any(child.poll() is None for child in children):
        for path in (tmp_path / "store").glob("index-*.sqlite"):
            path.unlink(missing_ok=True)
            rebuilt += 1
        select.select([], [], [], 0.05)
    for child in children:
        _, errors = child.communicate(timeout=120)
        assert child.returncode == 0, errors.decode()
    assert rebuilt > 2
    store = DiskStore(tmp_path / "store")
    assert len(list(store.entries())) == 2 * (12 + 2 * 4)
    assert list(store.verify()) == []
    store.close()
