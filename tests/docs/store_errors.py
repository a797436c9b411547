"""Errors of stores, and of libraries that are not installed, each met by doing what leads to it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from moto.server import ThreadedMotoServer

import avp
from avp.blob import Blob, seal
from avp.segment import Want
from avp.testing import synthetic_context

from .reproducing import REPRODUCTIONS, reproduces

OURS = Want("synthetic", "bfloat16")


def blob() -> Blob:
    context = synthetic_context()
    assert context.model is not None
    return seal(context.model, context.segments[0])


def page() -> str:
    return synthetic_context().segments[0].pages[0]


def _kept(folder: Path) -> Path:
    """A store on disk with one segment; its file."""
    store = avp.open_store(f"disk:{folder}")
    store.put(blob(), tenant="")
    store.close()
    (file,) = folder.rglob("*.avp")
    return file


@reproduces("is not the one that was written.")
def a_damaged_header(tmp_path: Path) -> object:
    file = _kept(tmp_path)
    file.write_bytes(file.read_bytes().replace(b"synthetic", b"Synthetic", 1))
    return avp.open_store(f"disk:{tmp_path}").get(page(), tenant="", want=OURS)


@reproduces("is empty. Fix: run")
def an_emptied_file(tmp_path: Path) -> object:
    _kept(tmp_path).write_bytes(b"")
    return avp.open_store(f"disk:{tmp_path}").get(page(), tenant="", want=OURS)


@reproduces("the store holds no KV of page")
def a_page_of_another_tenant(tmp_path: Path) -> object:
    _kept(tmp_path)
    return avp.open_store(f"disk:{tmp_path}").get(page(), tenant="b", want=OURS)


@reproduces("does not fit a store of at most")
def a_small_budget(tmp_path: Path) -> object:
    avp.open_store(f"disk:{tmp_path}?budget=1KiB").put(blob(), tenant="")
    return None


@reproduces("choose a folder on a local disk that works (disk:/path).")
def a_file_in_place_of_the_folder(tmp_path: Path) -> object:
    (tmp_path / "store").touch()
    return avp.open_store(f"disk:{tmp_path}/store")


REPRODUCTIONS["is no URL of a store."] = lambda *_: avp.open_store("kept")
REPRODUCTIONS["no store is named"] = lambda *_: avp.open_store("tape:/dev/st0")
REPRODUCTIONS["this store has no setting"] = lambda *_: avp.open_store("memory:?size=4GiB")
REPRODUCTIONS["is no amount."] = lambda *_: avp.open_store("memory:?budget=4GB")
REPRODUCTIONS["Fix: start it, or correct the store's URL."] = lambda *_: avp.open_store("redis://127.0.0.1:1/0").have(
    [page()], tenant="", want=OURS
)


@reproduces("and region are right, and that AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY may read and write it.")
def a_bucket_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> object:
    del tmp_path
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        store = avp.open_store(f"s3://nowhere/avp?endpoint=http://{host}:{port}&region=us-east-1")
        store.put(blob(), tenant="")
    finally:
        server.stop()
    return None


LIBRARIES = {
    "http": (("anyio", "httpcore2", "httpx2", "hypercorn", "starlette", "uvicorn"), "connect('http://a.example')"),
    "grpc": (("grpc",), "connect('grpc://a.example:1')"),
    "redis": (("redis",), "open_store('redis://a.example/0')"),
    "s3": (("obstore",), "open_store('s3://a')"),
}


def missing_library(extra: str) -> str:
    """What is said where the libraries of an extra are not installed."""
    modules, call = LIBRARIES[extra]
    code = f"import sys; sys.modules.update(dict.fromkeys({modules}))\nimport avp\ntry: avp.{call}\n"
    code += "except avp.MissingExtra as error: print(error)"
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
