"""Another process of a benchmark: it answers a line of JSON with a line of JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import IO

from avp.errors import AVPError

TIMEOUT = 300.0  # seconds for one answer
Given = Mapping[str, object]


class FarFailed(AVPError):
    """The other process ended, or never answered; the message holds its last words."""


class Far:
    """The near end. Made by `running`; `ready` is what it said first."""

    def __init__(self, process: subprocess.Popen[str], errors: IO[str], timeout: float) -> None:
        self._process, self._errors, self._timeout = process, errors, timeout
        self.ready = self._answer()

    def ask(self, call: str, given: Given | None = None) -> Mapping[str, object]:
        """What it answers to a call.

        Raises:
            FarFailed: it has ended.
        """
        if self._process.stdin is None or self._process.poll() is not None:
            raise FarFailed("the other process of the benchmark has ended. Fix: look at what it said on stderr.")
        self._process.stdin.write(json.dumps({"call": call, **(given or {})}) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def number(self, call: str, given: Given | None = None) -> float:
        """The `value` of its answer. Raises as `ask`."""
        return float(str(self.ask(call, given)["value"]))

    def _answer(self) -> Mapping[str, object]:
        watch = threading.Timer(self._timeout, self._process.kill)
        watch.start()
        try:
            line = self._process.stdout.readline() if self._process.stdout else ""
        finally:
            watch.cancel()
        if not line.startswith("{"):
            self._process.kill()
            self._process.wait()
            self._errors.seek(0)
            said = self._errors.read().strip().splitlines()
            last = said[-1] if said else "it said nothing"
            raise FarFailed(f"the other process of the benchmark failed: {last}. Fix: run the command in it by hand.")
        answer: Mapping[str, object] = json.loads(line)
        return answer


@contextmanager
def running(command: Sequence[str], *, bare: bool = False, timeout: float = TIMEOUT) -> Iterator[Far]:
    """A process of that command, ended behind the block; `bare`: without Python's variables of this environment.
    timeout: seconds for one answer.

    Raises:
        FarFailed: it did not come up.
    """
    variables = {name: value for name, value in os.environ.items() if not (bare and name.startswith("PYTHON"))}
    with tempfile.TemporaryFile("w+") as errors:
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=variables
            )
        except OSError as error:
            raise FarFailed(f"{command[0]} does not run: {error.strerror}. Fix: check its path.") from error
        with process:
            try:
                yield Far(process, errors, timeout)
            finally:
                process.kill()


def answer_calls(ready: Given, calls: Mapping[str, Callable[[Given], Given]]) -> None:
    """The far end: say that all is ready, then answer every line until there are no more."""
    sys.stdout.write(json.dumps(ready) + "\n")
    sys.stdout.flush()
    for line in sys.stdin:
        given: Given = json.loads(line)
        sys.stdout.write(json.dumps(calls[str(given["call"])](given)) + "\n")
        sys.stdout.flush()
