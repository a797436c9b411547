"""A GGUF file made into a plain transformers checkpoint, once.

transformers reads a GGUF file itself, but slowly, and does not save what it read. Weights are stored in float32, as
they are dequantised: no 16-bit type holds scale times integer exactly (of SmolLM2's embedding, 79 % of the values
change in float16, 97 % in bfloat16).
"""

from __future__ import annotations

import json
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from io import StringIO
from pathlib import Path

import torch
import transformers
from tokenizers.pre_tokenizers import Digits, Sequence
from transformers.utils import logging as hf_logging

from avp.connectors.gguf_header import file_digest, read_header
from avp.connectors.models import Progress
from avp.errors import ModelNotFound, UsageError

FORMAT = 1
MARK = "avp.json"


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
    splitter, mark = read_header(gguf_path).text("tokenizer.ggml.pre"), _mark(gguf_path)
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
    return {"gguf_blake3": file_digest(gguf_path), "gguf_name": gguf_path.name, "avp": FORMAT}


def _is_made_from(out: Path, *, mark: dict[str, str | int]) -> bool:
    try:
        found = json.loads((out / MARK).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and all(found.get(key) == mark[key] for key in ("gguf_blake3", "avp"))


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
