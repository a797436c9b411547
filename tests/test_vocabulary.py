"""Vocabularies by digest, and their cache on disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from avp.errors import AVPError, BundleError
from avp.vocabulary import VocabularyCache, check_vocabulary, overlap, vocabulary_digest

TOKENS = ("<s>", "Ġthe", "ü", "", "the")
DIGEST = vocabulary_digest(TOKENS)


def test_the_digest_names_tokens_in_their_order() -> None:
    assert len(DIGEST) == 64
    assert vocabulary_digest(list(TOKENS)) == DIGEST
    assert vocabulary_digest(TOKENS[::-1]) != DIGEST
    assert check_vocabulary(list(TOKENS), DIGEST) == TOKENS


@pytest.mark.parametrize("value", [None, {}, "tokens", [1, 2], [None], [*TOKENS, "more"], [], ["\ud800"]])
def test_what_is_no_vocabulary_or_another_one_is_refused(value: object) -> None:
    with pytest.raises(AVPError, match="Fix:"):
        check_vocabulary(value, DIGEST)
    with pytest.raises(BundleError, match="another vocabulary"):
        check_vocabulary(["other"], DIGEST)


def test_overlap_counts_what_both_spell_alike() -> None:
    assert overlap(TOKENS, ["the", "", "xyz", "the"]) == 1


def test_a_vocabulary_is_kept_and_found_again(tmp_path: Path) -> None:
    cache = VocabularyCache(tmp_path / "deep" / "vocabularies")
    assert cache.get(DIGEST) is None
    for _ in range(2):
        cache.put(DIGEST, TOKENS)
    assert cache.get(DIGEST) == TOKENS
    assert [path.name for path in (tmp_path / "deep" / "vocabularies").iterdir()] == [f"{DIGEST}.json"]


@pytest.mark.parametrize("damage", [b"", b"[", b'["other"]', b"\xff", b"{}", b'["\\ud800"]'])
def test_a_damaged_file_counts_as_none(tmp_path: Path, damage: bytes) -> None:
    cache = VocabularyCache(tmp_path)
    cache.put(DIGEST, TOKENS)
    (tmp_path / f"{DIGEST}.json").write_bytes(damage)
    assert cache.get(DIGEST) is None
    cache.put(DIGEST, TOKENS)
    assert cache.get(DIGEST) == TOKENS


@pytest.mark.parametrize("digest", ["../secret", "/etc/passwd", "a\0b", "", "x" * 5000])
def test_a_digest_that_is_none_leads_to_no_file(tmp_path: Path, digest: str) -> None:
    (tmp_path / "secret.json").write_text('["a"]')
    cache = VocabularyCache(tmp_path / "cache")
    (tmp_path / "cache").mkdir()
    assert cache.get(digest) is None
