"""Vocabularies by digest: asked for once, kept in the user's cache, so that overlap can be judged over a network."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from blake3 import blake3

from avp.errors import BundleError
from avp.identity import canonical_json

_LARGEST = 4 << 20  # tokens


def vocabulary_digest(tokens: Sequence[str]) -> str:
    """BLAKE3 of the tokens, as the tokenizer spells them, by id; 64 hex digits."""
    return blake3(canonical_json(list(tokens)).encode(), max_threads=blake3.AUTO).hexdigest()


def check_vocabulary(value: object, digest: str) -> tuple[str, ...]:
    """A vocabulary that came over a wire.

    Raises:
        BundleError: it is no list of strings, or not the one that was asked for.
    """
    if not isinstance(value, list) or len(value) > _LARGEST or not all(isinstance(token, str) for token in value):
        raise BundleError("a vocabulary came that is no list of tokens. Fix: ask the other end to upgrade avp.")
    if vocabulary_digest(value) != digest:
        raise BundleError(f"another vocabulary came than {digest[:8]}… that was asked for. Fix: shake hands again.")
    return tuple(value)


def overlap(one: Sequence[str], other: Sequence[str]) -> int:
    """How many tokens both spell in the same way."""
    return len(set(one) & set(other) - {""})


class VocabularyCache:
    """Vocabularies in a folder, by digest."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def get(self, digest: str) -> tuple[str, ...] | None:
        """The vocabulary, if it is here and whole."""
        import json

        path = self._folder / f"{digest}.json"
        try:
            return check_vocabulary(json.loads(path.read_text()), digest)
        except (OSError, ValueError):  # not here, or damaged: it is asked for again
            return None

    def put(self, digest: str, tokens: Sequence[str]) -> None:
        """Keep one."""
        self._folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=self._folder, delete=False) as file:
            file.write(canonical_json(list(tokens)))
        os.replace(file.name, self._folder / f"{digest}.json")
