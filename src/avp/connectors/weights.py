"""Fingerprints of a loaded transformers model and of its tokenizer.

The weights' fingerprint is BLAKE3 over name, shape and values of every tensor, values rounded to bfloat16, so that one
checkpoint has one fingerprint whatever dtype it is loaded in. Tensors up to `WHOLE` elements count entirely; of a
larger
one every row gives `PER_ROW` values at columns that shift from row to row, so that a change of any row or column shows.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from blake3 import blake3
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from avp.identity import canonical_json, fingerprint

WHOLE = 2**25
PER_ROW = 8
_NOTE = ".avp-fingerprint.json"


def weights_fingerprint(model: PreTrainedModel) -> str:
    """The fingerprint of the model's weights, tied ones once, loaded and active adapters included."""
    return fingerprint(_entries(model))


def _entries(model: PreTrainedModel) -> Iterator[tuple[str, list[int], bytes]]:
    state = model.state_dict()
    seen: set[tuple[int, tuple[int, ...]]] = set()
    for name in sorted(state, key=lambda each: ("lm_head" in each, each)):
        tensor = state[name]
        place = (tensor.data_ptr(), tuple(tensor.shape))
        if place in seen and tensor.numel():
            continue
        seen.add(place)
        yield name, list(tensor.shape), _values(tensor)
    if any(".lora_" in name for name in state):
        yield "adapters", [], canonical_json(_active_adapters(model)).encode()


def _active_adapters(model: PreTrainedModel) -> list[list[object]]:
    """Of each adapted module: the adapters in use, their factors, and whether they are switched off."""
    from peft.tuners.lora import LoraLayer

    return [
        [name, list(module.active_adapters), dict(module.scaling), bool(module.disable_adapters)]
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    ]


def _values(tensor: torch.Tensor) -> bytes:
    flat = tensor.detach()
    if tensor.numel() > WHOLE and tensor.ndim > 1:
        rows = flat.reshape(flat.shape[0], -1)
        width = rows.shape[1]
        start = torch.arange(rows.shape[0], device=rows.device) * 7919
        columns = (start[:, None] + torch.arange(PER_ROW, device=rows.device) * (width // PER_ROW)) % width
        flat = rows.gather(1, columns)
    if flat.is_floating_point():
        flat = flat.to(torch.bfloat16).view(torch.uint16)
    return flat.contiguous().cpu().numpy().tobytes()


def kept_fingerprint(checkpoint: Path) -> str | None:
    """The fingerprint noted beside the checkpoint, if its weight files are still those it was taken of."""
    try:
        kept = json.loads((checkpoint / _NOTE).read_text())
        return str(kept["weights"]) if kept["stamp"] == _stamp(checkpoint) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def keep_fingerprint(checkpoint: Path, weights: str) -> None:
    """Note the fingerprint beside the checkpoint, bound to path, size and time of its weight files, if that can be
    written.
    """
    with contextlib.suppress(OSError):
        replace_text(checkpoint / _NOTE, json.dumps({"stamp": _stamp(checkpoint), "weights": weights}))


def replace_text(path: Path, text: str) -> None:
    """Write a small file so that readers see the old one or the new one, never half of it."""
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        file.write(text)
    os.replace(file.name, path)


def _stamp(checkpoint: Path) -> list[list[str | int]]:
    return [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in weight_files(checkpoint)]


def weight_files(checkpoint: Path) -> list[Path]:
    """The files that hold the weights, resolved, sorted."""
    return sorted(file.resolve() for pattern in ("*.safetensors", "*.bin") for file in checkpoint.glob(pattern))


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """What engines name the tokenizer of a GGUF file by, if it was made from one and still has the rules it had then;
    else the fingerprint of its rules.
    """
    rules = rules_fingerprint(tokenizer)
    try:
        kept = json.loads((Path(tokenizer.name_or_path) / "avp.json").read_text())["tokenizer"]
        return str(kept["gguf"]) if kept["rules"] == rules else rules
    except (OSError, ValueError, KeyError, TypeError):
        return rules


def rules_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """BLAKE3 of everything that turns text into ids: vocabulary, merges, normalizer, pre-tokenizer, special tokens."""
    if tokenizer.is_fast:
        rules = json.loads(tokenizer.backend_tokenizer.to_str())
        rules.pop("truncation", None)
        rules.pop("padding", None)
    else:
        rules = sorted(tokenizer.get_vocab().items())
    return blake3(canonical_json(rules).encode()).hexdigest()


def vocabulary(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """The tokens as the tokenizer spells them, by id; an id without a token is ""."""
    found = tokenizer.get_vocab()
    tokens = [""] * (max(found.values(), default=-1) + 1)
    for token, index in found.items():
        tokens[index] = token
    return tuple(tokens)
