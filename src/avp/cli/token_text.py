"""The token ids of a bundle as text."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from avp.bundle import Manifest
from avp.connectors import models
from avp.errors import UsageError
from avp.registry import missing_extra
from avp.segment import LATENT

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LATENT = "⟨latent⟩"


@dataclass(frozen=True, slots=True)
class TokenText:
    """The text of all ids, computed and pending; `same_tokenizer`: whether by the tokenizer that made them."""

    text: str
    tokenizer: str
    same_tokenizer: bool


def token_text(manifest: Manifest, *, name: str | None = None) -> TokenText:
    """The manifest's token ids as text, by the tokenizer of the model `name`, by default of the model that it names.

    Nothing is downloaded: a model is a built-in name or title, a local folder, or a hub id in the local cache.

    Raises:
        UsageError: there is no such tokenizer here.
        MissingExtra: transformers is not installed.
    """
    wanted = name if name is not None else manifest.model.id if manifest.model else ""
    if not manifest.tokens:
        raise UsageError(f"the bundle holds no token ids (it is of kind {manifest.kind}). Fix: leave --to-text away.")
    try:
        from avp.connectors.weights import tokenizer_fingerprint
    except ImportError as error:
        raise missing_extra(error, feature="avp inspect --to-text") from error
    tokenizer = _tokenizer(wanted)
    same = manifest.model is not None and tokenizer_fingerprint(tokenizer) == manifest.model.tokenizer
    return TokenText(_decode(manifest.tokens, tokenizer), wanted, same)


def _decode(tokens: tuple[int, ...], tokenizer: PreTrainedTokenizerBase) -> str:
    """Runs of ids are decoded together, since a character may be of several tokens."""
    size = len(tokenizer)
    pieces: list[str] = []
    for known, run in groupby(tokens, key=lambda token: 0 <= token < size):
        if known:
            pieces.append(
                str(tokenizer.decode(list(run), skip_special_tokens=False, clean_up_tokenization_spaces=False))
            )
        else:
            pieces += [_LATENT if token == LATENT else f"⟨id {token}⟩" for token in run]
    return "".join(pieces)


def _tokenizer(name: str) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            _place(name), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # tokenizers raises no narrower class for a broken file
        raise UsageError(
            f"no tokenizer of {name!r} is here ({type(error).__name__}). "
            "Fix: pass --model with a built-in model, a local folder or a hub id in the cache."
        ) from error
    return found


def _place(name: str) -> str | Path:
    """A built-in model's folder, else the name itself: a folder or a hub id."""
    for model in models.BUILTIN.values():
        if name in (model.name, model.title):
            return models.converted(model.name)
    return Path(name).expanduser() if name and Path(name).expanduser().is_dir() else name
