"""A GGUF file made into a plain transformers checkpoint, once.

transformers reads a GGUF file itself, but slowly, and does not save what it read. Weights are stored in float32, as
they are dequantised: no 16-bit type holds scale times integer exactly (of SmolLM2's embedding, 79 % of the values
change in float16, 97 % in bfloat16).
"""

from __future__ import annotations

import json
import mmap
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from io import StringIO
from pathlib import Path

import torch
import transformers
from blake3 import blake3
from tokenizers.pre_tokenizers import Digits, Sequence
from transformers.utils import logging as hf_logging

from avp.connectors.models import Progress
from avp.errors import ModelNotFound, UsageError

FORMAT = 1
MARK = "avp.json"

_STRING, _ARRAY = 8, 9
_WIDTH = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}


def convert(gguf_path: Path, out: Path, *, progress: Progress | None = None) -> Path:
    """Make `out` a transformers checkpoint folder of the GGUF file, unless it already is one; return `out`.

    The folder (safetensors in float32, config, generation config, tokenizer, chat template if there is one, `avp.json`)
    appears in one step; if another process was faster, its folder is used. A folder made from other bytes is replaced.
    `progress` hears the stages "tokenizer", "weights" and "save", in bytes of the GGUF file.

    Raises:
        ModelNotFound: there is no such file, or it is empty.
        UsageError: transformers cannot read the file, or `out` is something else than a checkpoint made here.
    """
    if not gguf_path.is_file() or not gguf_path.stat().st_size:
        raise ModelNotFound(f"{gguf_path} is no file, or an empty one.\nFix: name a GGUF file, or a built-in model.")
    splitter, mark = _metadata_string(gguf_path, "tokenizer.ggml.pre"), _mark(gguf_path)
    if _is_made_from(out, mark=mark):
        return out
    if out.exists() and not (out / MARK).is_file():
        raise UsageError(
            f"{out} is there already and was not made by AVP from a GGUF file, so it is not overwritten.\n"
            "Fix: name another folder, or move that one away."
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent, ignore_cleanup_errors=True) as scratch:
        fresh = Path(scratch) / "fresh"
        fresh.mkdir()
        try:
            _write(gguf_path, fresh, splitter=splitter, progress=progress)
        except (ValueError, struct.error) as error:
            raise UsageError(
                f"transformers {transformers.__version__} cannot read {gguf_path}: {error}\n"
                "Fix: a newer transformers may know it; if the file may be incomplete, get it again."
            ) from error
        (fresh / MARK).write_text(json.dumps(mark))
        _put_in_place(fresh, out, aside=Path(scratch) / "stale", mark=mark)
    return out


def _write(gguf_path: Path, folder: Path, *, splitter: str, progress: Progress | None) -> None:
    size = gguf_path.stat().st_size
    tell: Progress = progress or _ignore
    tell("tokenizer", 0, size)
    tokenizer = _tokenizer(gguf_path, splitter=splitter)
    tell("tokenizer", size, size)
    tell("weights", 0, size)
    with _without_bars() if progress is not None else nullcontext():
        model = _model(gguf_path)
    tell("weights", size, size)
    tell("save", 0, size)
    # The file says how far the model goes, but the tokenizer that is made from it does not.
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.save_pretrained(folder)
    with _without_bars() if progress is not None else nullcontext():
        model.save_pretrained(folder)
    for weights in folder.glob("*.safetensors"):  # safetensors makes them 0600, whatever the umask
        weights.chmod((folder / "config.json").stat().st_mode)
    tell("save", size, size)


def _tokenizer(gguf_path: Path, *, splitter: str) -> transformers.PreTrainedTokenizerBase:
    """Build the tokenizer; transformers 5 leaves out the digit splitter of SmolLM's."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf_path.parent, gguf_file=gguf_path.name)
    if splitter == "smollm" and isinstance(tokenizer, transformers.PreTrainedTokenizerFast):
        backend = tokenizer.backend_tokenizer
        backend.pre_tokenizer = Sequence([Digits(individual_digits=True), backend.pre_tokenizer])
    return tokenizer


def _model(gguf_path: Path) -> transformers.PreTrainedModel:
    """Load the weights and hang them, uncopied, into a model that does not know of its GGUF past and may be saved."""
    loaded: transformers.PreTrainedModel = transformers.AutoModelForCausalLM.from_pretrained(
        gguf_path.parent, gguf_file=gguf_path.name, dtype=torch.float32
    )
    past = ("quantization_config", "_model_name_or_path")
    settings = {key: value for key, value in loaded.config.to_dict().items() if key not in past}
    with torch.device("meta"):
        model = type(loaded)(type(loaded.config).from_dict(settings))
    model.load_state_dict(loaded.state_dict(), assign=True)
    model.tie_weights()
    special = ("bos_token_id", "eos_token_id", "pad_token_id")
    model.generation_config = transformers.GenerationConfig.from_dict({key: settings.get(key) for key in special})
    return model


def _put_in_place(fresh: Path, out: Path, *, aside: Path, mark: dict[str, str | int]) -> None:
    if out.exists() and not _is_made_from(out, mark=mark):
        out.rename(aside)
    try:
        fresh.rename(out)
    except OSError:
        if not _is_made_from(out, mark=mark):
            raise


def _mark(gguf_path: Path) -> dict[str, str | int]:
    digest = blake3(max_threads=blake3.AUTO).update_mmap(gguf_path).hexdigest()
    return {"gguf_blake3": digest, "gguf_name": gguf_path.name, "avp": FORMAT}


def _is_made_from(out: Path, *, mark: dict[str, str | int]) -> bool:
    try:
        found = json.loads((out / MARK).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and all(found.get(key) == mark[key] for key in ("gguf_blake3", "avp"))


def _metadata_string(gguf_path: Path, wanted: str) -> str:
    """Read one string of the GGUF header, or ""; `gguf.GGUFReader` takes 11 s for Gemma's, every token being an array.

    <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>: magic, u32 version, u64 tensors, u64 pairs, then pairs.
    """
    with gguf_path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as blob:
        if blob[:4] != b"GGUF":
            raise UsageError(
                f"{gguf_path} is not a GGUF file: it does not begin with the bytes GGUF.\nFix: get it again."
            )
        try:
            (pairs,), at = struct.unpack_from("<Q", blob, 16), 24
            for _ in range(pairs):
                key, at = _string(blob, at)
                (kind,) = struct.unpack_from("<I", blob, at)
                if key == wanted.encode() and kind == _STRING:
                    return _string(blob, at + 4)[0].decode()
                at = _skip(blob, at + 4, kind=kind)
        except (struct.error, KeyError) as error:
            raise UsageError(
                f"{gguf_path} is not a GGUF file that can be read: its header breaks off.\nFix: get it again."
            ) from error
    return ""


def _string(blob: mmap.mmap, at: int) -> tuple[bytes, int]:
    (length,) = struct.unpack_from("<Q", blob, at)
    return blob[at + 8 : at + 8 + length], at + 8 + length


def _skip(blob: mmap.mmap, at: int, *, kind: int) -> int:
    """Return the offset behind the value of this kind that begins at `at`."""
    if kind == _STRING:
        return at + 8 + int(struct.unpack_from("<Q", blob, at)[0])
    if kind != _ARRAY:
        return at + _WIDTH[kind]
    element, count = struct.unpack_from("<IQ", blob, at)
    at += 12
    if element in _WIDTH:
        return at + int(count) * _WIDTH[element]
    for _ in range(count):
        at = _skip(blob, at, kind=element)
    return at


def _ignore(stage: str, done: int, total: int) -> None:
    """Tell nobody."""


@contextmanager
def _without_bars() -> Iterator[None]:
    """Keep transformers' bars off the terminal while the caller draws one; the GGUF reader's own knows no switch."""
    shown = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        with redirect_stderr(StringIO()):
            yield
    finally:
        if shown:
            hf_logging.enable_progress_bar()
