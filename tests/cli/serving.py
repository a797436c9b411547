"""`avp` in processes of its own: commands that end, and servers that run until they are told to end."""

import json
import os
import selectors
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

from avp.testing.tiny import tiny_model, tiny_tokenizer

PATIENCE = 120.0  # seconds, for machines that are busy
COMMAND = [sys.executable, "-c", "from avp.cli import main; main()"]


def checkpoint(folder: Path, *, seed: int = 0, more_tokens: tuple[str, ...] = ()) -> Path:
    """A folder with a tiny random model and its tokenizer."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(list(more_tokens))
    tiny_model("llama", seed=seed).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def environment(**more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("AVP_TOKEN")}
    return {**kept, "OMP_NUM_THREADS": "1", **more}


def avp(
    *arguments: str | Path, stdin: str = "", env: Mapping[str, str] | None = None, ends: int = 0
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, which has this exit code."""
    done = subprocess.run(
        [*COMMAND, *map(str, arguments)],
        input=stdin,
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE,
        env=environment(**(env or {})),
    )
    assert done.returncode == ends, done.stderr
    assert "Traceback" not in done.stderr
    return done


@dataclass
class Served:
    """A server that listens."""

    process: subprocess.Popen[str]
    urls: list[str]

    def end(self, by: signal.Signals = signal.SIGTERM) -> tuple[int, str, float]:
        """Its exit code, the rest of what it said, and the seconds that ending took."""
        started = monotonic()
        self.process.send_signal(by)
        _, said = self.process.communicate(timeout=PATIENCE)
        return self.process.returncode, said, monotonic() - started


@contextmanager
def serving(*arguments: str | Path, env: Mapping[str, str] | None = None) -> Iterator[Served]:
    """`avp serve --json …` from when it listens to the end of the block."""
    command = [*COMMAND, "serve", "--json", "--store", "memory:", *map(str, arguments)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment(**(env or {}))
    )
    try:
        yield Served(process, json.loads(first_line(process))["urls"])
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate(timeout=PATIENCE)


def first_line(process: subprocess.Popen[str]) -> str:
    """The first line on stdout, if it comes in time."""
    assert process.stdout is not None
    assert process.stderr is not None
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        if selector.select(PATIENCE) and (line := process.stdout.readline()):
            return line
    process.kill()
    raise AssertionError(process.stderr.read())
