"""Install llama-cpp-python, of which no wheel is published: build it once, lean, into the cache of AVP.

Only the libraries llama and ggml are built: no tools, no server, no vision. Called by `make llamacpp`; the last line
says what was done. The wheel is for this machine's processor.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

from avp.folders import cache_dir

VERSION = "0.3.36"
LIMIT = 45 * 60  # seconds
PARTS = ("COMMON", "TOOLS", "SERVER", "EXAMPLES", "TESTS")
FORCED = "set(LLAMA_BUILD_COMMON ON CACHE"
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]


def main() -> None:
    """Install the wheel, after building it if there is none."""
    if installed() == VERSION:
        print(f"llamacpp: {VERSION} is installed")
        return
    folder = cache_dir() / "wheels"
    wheel = next(iter(folder.glob(f"llama_cpp_python-{VERSION}-*.whl")), None) or build(folder)
    subprocess.run([*PIP, "install", "--quiet", "-c", "constraints.txt", str(wheel)], check=True, timeout=600)
    print(f"llamacpp: installed {wheel}")


def installed() -> str:
    """The version that is installed, or nothing."""
    code = "from importlib.metadata import version; print(version('llama-cpp-python'))"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False).stdout.strip()


def build(folder: Path) -> Path:
    """Build the wheel from the source distribution, into the folder in one step."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".llamacpp-", dir=folder) as scratch:
        work = Path(scratch)
        wanted = ["--no-deps", "--no-binary=llama-cpp-python", f"llama-cpp-python=={VERSION}"]
        run([*PIP, "download", "-d", scratch, *wanted], work)
        with tarfile.open(next(work.glob("llama_cpp_python-*.tar.gz"))) as archive:
            archive.extractall(work, filter="data")
        source = work / f"llama_cpp_python-{VERSION}"
        recipe = source / "CMakeLists.txt"
        text = recipe.read_text()
        if FORCED not in text:
            raise SystemExit(f"llamacpp: {recipe.name} of {VERSION} is not as expected; mend tools/llamacpp_wheel.py")
        recipe.write_text(text.replace(FORCED, "set(LLAMA_BUILD_COMMON OFF CACHE"))
        run([*PIP, "wheel", "--no-deps", "-w", str(work / "out"), str(source)], work)
        wheel = next((work / "out").glob("*.whl"))
        return wheel.replace(folder / wheel.name)


def run(command: list[str], work: Path) -> None:
    """Run a step, with a line a minute; its own words are shown if it fails."""
    options = ["-DLLAVA_BUILD=OFF", *(f"-DLLAMA_BUILD_{part}=OFF" for part in PARTS)]
    environment = os.environ | {"CMAKE_ARGS": " ".join(options)}
    log, began = work / "log", time.monotonic()
    with log.open("wb") as sink:
        step = subprocess.Popen(command, stdout=sink, stderr=sink, env=environment, start_new_session=True)
        try:
            while step.poll() is None:
                if time.monotonic() - began > LIMIT:
                    raise SystemExit(f"llamacpp: pip {command[4]} took longer than {LIMIT // 60} minutes")
                try:
                    step.wait(timeout=60)
                except subprocess.TimeoutExpired:
                    print(f"llamacpp: pip {command[4]}, {(time.monotonic() - began) / 60:.0f} min", flush=True)
        finally:
            if step.poll() is None:
                os.killpg(step.pid, signal.SIGKILL)  # pip's compilers too
                step.wait()
    if step.returncode:
        raise SystemExit(f"llamacpp: pip {command[4]} failed:\n{log.read_text(errors='replace')[-4000:]}")


if __name__ == "__main__":
    main()
