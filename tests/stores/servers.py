"""What tests need of a server that is a process of its own."""

from __future__ import annotations

import re
import select
import socket
import subprocess
import time
from pathlib import Path

import pytest

WAIT_SECONDS = 60
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_REGION": "us-east-1"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(port: int, server: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + WAIT_SECONDS
    while time.monotonic() < end and server.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            select.select([], [], [], 0.05)
        else:
            return
    pytest.fail(f"the server did not start: {re.sub(r'[^ -~]+', ' ', log.read_text())[-500:]}")
