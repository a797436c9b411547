"""A model's name to a loaded model: a built-in name, a folder, a GGUF file, or a hub id."""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file

from avp.connectors import gguf, models
from avp.connectors.gguf_header import file_digest, read_header
from avp.connectors.weights import (
    keep_fingerprint,
    kept_fingerprint,
    replace_text,
    rules_fingerprint,
    weights_fingerprint,
)
from avp.errors import ModelNotFound, UsageError
from avp.folders import cache_dir

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model, its tokenizer, the name to show, and the fingerprint of its weights."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    weights: str


def load(name: str | Path, *, device: str | torch.device | None, dtype: str | torch.dtype | None) -> Loaded:
    """Load by built-in name, folder, .gguf file or hub id; device and dtype are chosen where None.

    Raises:
        ModelNotFound: none of these; or a hub id and no hub that can be reached.
    """
    where = pick_device(device)
    precision = pick_dtype(dtype, where)
    folder = resolve(name)
    model, weights = _load(folder, name, precision)
    tokenizer = _tokenizer(folder)
    _note_tokenizer(folder, name, tokenizer)
    return Loaded(model.to(precision).to(where).eval(), tokenizer, title(name), weights)


def resolve(name: str | Path) -> str | Path:
    """A folder that `from_pretrained` loads, or the hub id as it is; built-in models and GGUF files are converted
    once.
    """
    if str(name) in models.BUILTIN:
        return models.converted(str(name)) if models.converted(str(name)).is_dir() else _convert_builtin(str(name))
    path = Path(name).expanduser()
    if path.suffix == ".gguf" or path.is_file():
        if not path.is_file():
            raise ModelNotFound(f"there is no file {path}. Fix: check the path.")
        return gguf.convert(path, cache_dir() / "converted" / file_digest(path)[:32])
    if path.is_dir():
        return path
    if path.is_absolute() or str(name).startswith((".", "~")) or len(path.parts) > 2:
        raise ModelNotFound(f"there is no folder {path}. Fix: check the path.")
    return str(name)


def _convert_builtin(name: str) -> Path:
    return gguf.convert(models.fetch(name), models.converted(name))


def title(name: str | Path) -> str:
    """What a model is called in messages."""
    return models.BUILTIN[str(name)].title if str(name) in models.BUILTIN else str(name)


def pick_device(device: str | torch.device | None) -> torch.device:
    """The device asked for, else CUDA, MPS or the CPU, whichever is there first."""
    if device is not None:
        return torch.device(device)
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def pick_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """The dtype asked for; else float32 on the CPU, where 16-bit prefill is several times slower, and bfloat16
    elsewhere.

    Raises:
        UsageError: not float32, float16 or bfloat16.
    """
    if dtype is None:
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    found = _DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found is None or found not in _DTYPES.values():
        raise UsageError(f"dtype {dtype!r} is not supported. Fix: use one of {', '.join(_DTYPES)}.")
    return found


def _load_folder(folder: str | Path, name: str | Path, dtype: torch.dtype | str) -> PreTrainedModel:
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    except (OSError, ValueError) as error:
        raise ModelNotFound(
            f"no model {str(name)!r}: it is no built-in ({', '.join(models.BUILTIN)}), no folder or .gguf file "
            f"with a causal model, "
            f"and no hub gave it ({str(error).splitlines()[0][:200]}). Fix: check the name, or download the "
            f"model and pass its folder."
        ) from error
    return model


def _load(folder: str | Path, name: str | Path, precision: torch.dtype) -> tuple[PreTrainedModel, str]:
    """The model and its fingerprint, which is taken once, in the checkpoint's own dtype."""
    checkpoint = folder if isinstance(folder, Path) else hub_folder(folder)
    values = checkpoint and kept_fingerprint(checkpoint)
    model = _load_folder(folder, name, precision if values else "auto")
    if not values:
        values = weights_fingerprint(model)
        checkpoint = checkpoint or hub_folder(str(folder))
        if checkpoint:
            keep_fingerprint(checkpoint, values)
    return model, (checkpoint and gguf_digest(checkpoint, values)) or values


def hub_folder(hub_id: str) -> Path | None:
    """The local snapshot of a hub model."""
    config = cached_file(hub_id, "config.json", local_files_only=True, _raise_exceptions_for_missing_entries=False)
    return Path(config).parent if config else None


def gguf_digest(checkpoint: Path, values: str) -> str | None:
    """The digest of the GGUF file that a checkpoint was converted from, if it still has the values it had then.

    All engines name a GGUF by this digest. The note is made here, beside the conversion, at its first use.
    """
    note = checkpoint / "avp.json"
    try:
        kept = json.loads(note.read_text())
    except (OSError, ValueError):
        return None
    if "values" not in kept:
        kept["values"] = values
        with contextlib.suppress(OSError):
            replace_text(note, json.dumps(kept))
    return str(kept["gguf_blake3"]) if kept["values"] == values else None


def _note_tokenizer(folder: str | Path, name: str | Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Note beside a conversion what the GGUF file's own tokenizer is named by, bound to the rules that it became.

    transformers spells the rules in its own way; the file is what engines share.
    """
    note = Path(folder) / gguf.MARK
    builtin = str(name) in models.BUILTIN
    source = models.converted(str(name)).parent / "model.gguf" if builtin else Path(name).expanduser()
    with contextlib.suppress(OSError, ValueError):
        kept = json.loads(note.read_text())
        if "tokenizer" not in kept and source.is_file():
            kept["tokenizer"] = {"rules": rules_fingerprint(tokenizer), "gguf": read_header(source).tokenizer}
            replace_text(note, json.dumps(kept))


def _tokenizer(folder: str | Path) -> PreTrainedTokenizerBase:
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    return tokenizer
