"""Memory that pages really take: of writing and loading a file, each in a fresh process, and of KV in shared mappings.

VmHWM counts every resident page, those of mapped files too; RssAnon only memory that is the process's own.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from statistics import median

from avp.bench.peer import Shape
from avp.bench.perf_figure import Figure, Target
from avp.bench.perf_wire import synthetic
from avp.context import Context
from avp.errors import AVPError

BOTH = Target("bytes of the payload; peak growth of resident memory, writing + verified loading", at_most=1.1)
MAPPED = Target("bytes of the payload; peak growth of resident memory, mapped load", at_most=0.02)
NO_LINUX = "memory is read from /proc, which only Linux has"
_STEPS = ("save", "load", "load_verified")


def memory(shape: Shape, *, n: int) -> list[Figure]:
    """Extra peak memory of `save` and `load`, beyond the context's own."""
    if sys.platform != "linux":
        return [
            Figure(name, target, not_measured=NO_LINUX)
            for name, target in (("memory", BOTH), ("memory_mapped", MAPPED))
        ]
    with tempfile.TemporaryDirectory(prefix="avp-perf-") as folder:
        path = Path(folder) / "context.avp"
        runs = {step: [_in_process(step, path, shape) for _ in range(n)] for step in _STEPS}
        payload = path.stat().st_size
    detail: dict[str, object] = {"payload_bytes": payload}
    for step, found in runs.items():
        for key in found[0]:
            detail[f"{step}_{key}"] = median(run[key] for run in found)
    total = {step: [run["peak_growth"] / payload for run in found] for step, found in runs.items()}
    both = tuple(a + b for a, b in zip(total["save"], total["load_verified"], strict=True))
    return [Figure("memory", BOTH, both, detail), Figure("memory_mapped", MAPPED, tuple(total["load"]), detail)]


def _in_process(step: str, path: Path, shape: Shape) -> dict[str, int]:
    command = [sys.executable, "-m", "avp.bench.perf_memory", step, str(path), json.dumps(asdict(shape))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode:
        raise AVPError(f"step {step} failed in its process: {done.stderr[-800:]} Fix: run it by hand: {command[1:4]}.")
    found: dict[str, int] = json.loads(done.stdout)
    return found


def _step(step: str, path: Path, shape: Shape) -> dict[str, int]:
    """Run one step here; bytes of peak growth, all pages and private ones apart."""
    if step == "save":
        context = synthetic(shape)
        return _growth(lambda: context.save(path))
    verify = "now" if step == "load_verified" else "use"
    return _growth(lambda: Context.load(path, verify=verify))


def _growth(call: Callable[[], object]) -> dict[str, int]:
    before = status()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from here
    private = [before["RssAnon"]]
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.001):
            private.append(status()["RssAnon"])

    watcher = threading.Thread(target=watch)
    watcher.start()
    kept = call()
    after = status()
    done.set()
    watcher.join()
    del kept
    return {
        "peak_growth": max(after["VmHWM"] - before["VmRSS"], 0),
        "peak_growth_private": max(*private, after["RssAnon"]) - before["RssAnon"],
        "growth_mapped": after["RssFile"] - before["RssFile"],
    }


def status() -> dict[str, int]:
    """Bytes of this process's memory, by the names of /proc/self/status."""
    text = Path("/proc/self/status").read_text()
    return {name: int(kb) * 1024 for name, kb in re.findall(r"^(Vm\w+|Rss\w+):\s+(\d+) kB", text, re.MULTILINE)}


def resident() -> int:
    """Bytes of this process's pages, a page shared with others counted in part (Pss); exact, unlike VmRSS."""
    return _kilobytes("Pss", Path("/proc/self/smaps_rollup").read_text())


def kv_pages() -> dict[str, int]:
    """Bytes of the pages behind all arenas of this process.

    `mapped` counts each page once, however many mappings show it (the sum of Pss). `files`, the pages of the files in
    RAM, and `private`, those that forks wrote, count the same from the other side.
    """
    blocks = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(), flags=re.MULTILINE)
    arenas = [block for block in blocks if "/memfd:avp-kv" in block.partition("\n")[0]]
    inodes: dict[int, int] = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            if os.readlink(f"/proc/self/fd/{name}").startswith("/memfd:avp-kv"):
                found = os.stat(f"/proc/self/fd/{name}")
                inodes[found.st_ino] = found.st_blocks * 512
        except FileNotFoundError:
            continue
    return {
        "mapped": sum(_kilobytes("Pss", block) for block in arenas),
        "private": sum(_kilobytes("Anonymous", block) for block in arenas),
        "files": sum(inodes.values()),
    }


def _kilobytes(name: str, text: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


if __name__ == "__main__":
    print(json.dumps(_step(sys.argv[1], Path(sys.argv[2]), Shape(**json.loads(sys.argv[3])))))  # noqa: T201 - the answer
