"""A bundle is what its context was, in a container that every tool opens."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import stat
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from avp.buffers import Buffer
from avp.bundle import header_size, peek, read_head, tensor_sizes
from avp.context import Context, Turn, text_context
from avp.errors import BundleError, DigestMismatch, LimitExceeded, TruncatedBundle, UnsupportedBundle, UsageError
from avp.identity import LayerLayout
from avp.manifest import Limits
from avp.segment import LATENT, Exactness
from avp.testing import synthetic_context

from .samples import (
    CODECS,
    DTYPES,
    LENGTHS,
    bundle_of,
    described,
    hidden_context,
    kv_bytes,
    kv_context,
    subset,
    tokens_context,
)

MIB = 2**20


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", LENGTHS)
class TestEveryKindComesBackAsItWent:
    def test_kv(self, tokens: int, dtype: str, codec: str) -> None:
        context = kv_context(range(tokens), pending=(7,), dtype=dtype)
        back = Context.from_bytes(context.to_bytes(codec=codec))
        assert described(back) == described(context)
        assert kv_bytes(back) == kv_bytes(context)
        assert back.pending == (7,)
        assert back.nbytes == tokens * context.model.layout.bytes_per_token(dtype)

    def test_hidden(self, tokens: int, dtype: str, codec: str) -> None:
        context = hidden_context(tokens, dtype)
        assert described(Context.from_bytes(context.to_bytes(codec=codec))) == described(context)

    def test_latent_kv(self, tokens: int, dtype: str, codec: str) -> None:
        ids = [LATENT if i % 50 > 40 else i for i in range(tokens)]
        context = kv_context(ids, dtype=dtype)
        back = Context.from_bytes(context.to_bytes(codec=codec))
        assert described(back) == described(context)
        assert kv_bytes(back) == kv_bytes(context)

    def test_the_bytes_are_those_of_the_first_time(self, tokens: int, dtype: str, codec: str) -> None:
        context = kv_context(range(tokens), dtype=dtype)
        once = context.to_bytes(codec=codec)
        assert context.to_bytes(codec=codec) == once
        assert Context.from_bytes(once).to_bytes(codec=codec) == once


@pytest.mark.parametrize("tokens", LENGTHS)
def test_tokens_come_back(tokens: int) -> None:
    context = tokens_context(tokens)
    assert described(Context.from_bytes(context.to_bytes())) == described(context)


@pytest.mark.parametrize("content", ["", 'héllo 🌍 \x00 \\ " \n', "x" * 10_000])
def test_text_comes_back(content: str) -> None:
    context = text_context(content)
    back = Context.from_bytes(context.to_bytes())
    assert described(back) == described(context)
    assert back.text == content


def test_a_kv_context_may_carry_hidden_states_too() -> None:
    context = kv_context(range(40))
    hidden = Buffer("float32", np.arange(80, dtype=np.float32).reshape(40, 2))
    both = Context("kv", context.model, context.tokens, 40, segments=context.segments, hidden=hidden)
    back = Context.from_bytes(both.to_bytes())
    assert described(back) == described(both)
    assert kv_bytes(back) == kv_bytes(context)


def test_a_subset_of_segments_packs_and_unpacks() -> None:
    context = kv_context(range(900))
    for kept in ((0,), (2,), (3,), (1, 3), (0, 1), ()):
        part = subset(context, *kept)
        back = Context.from_bytes(part.to_bytes())
        assert described(back) == described(part)
        assert kv_bytes(back) == kv_bytes(part)
        assert len(back) == 900


def test_equal_contexts_give_equal_bytes() -> None:
    assert synthetic_context(seed=3).to_bytes() == synthetic_context(seed=3).to_bytes()
    assert synthetic_context(seed=3).to_bytes() != synthetic_context(seed=4).to_bytes()


def test_tensors_start_on_a_cache_line() -> None:
    for tokens in (1, 2, 33, 300):
        assert header_size(kv_context(range(tokens)).to_bytes()[:8]) % 64 == 0


# --- stock tools


@pytest.mark.parametrize("tokens", [0, 1, 33, 257])
@pytest.mark.parametrize("dtype", DTYPES)
def test_stock_safetensors_opens_a_bundle(tmp_path: Path, dtype: str, tokens: int) -> None:
    if dtype == "bfloat16":
        pytest.importorskip("torch")
    context = synthetic_context(tokens=tokens, dtype=dtype)
    context.save(tmp_path / "c.avp")
    with safe_open(tmp_path / "c.avp", framework="pt" if dtype == "bfloat16" else "np") as stock:
        assert stock.metadata()["format"] == "avp"
        assert json.loads(stock.metadata()["avp"])["length"] == tokens
        assert len(stock.keys()) == 4 * len(context.segments)
        for number, segment in enumerate(context.segments):
            for layer in range(2):
                for part in "kv":
                    found = stock.get_tensor(f"{number}/{layer}/{part}")
                    assert _bits(found, dtype).tobytes() == segment.read(layer, part).tobytes()
                    assert tuple(found.shape) == (2, len(segment), 8)


def _bits(tensor: object, dtype: str) -> np.ndarray:
    if dtype != "bfloat16":
        return np.asarray(tensor)
    import torch

    assert isinstance(tensor, torch.Tensor)
    return tensor.view(torch.int16).numpy()


def test_stock_safetensors_opens_lossless_hidden_and_text(tmp_path: Path) -> None:
    for context in (kv_context(range(70)), hidden_context(5, "float16"), text_context("x")):
        context.save(tmp_path / "c.avp", codec="lossless")
        with safe_open(tmp_path / "c.avp", framework="np") as stock:
            tensors = {name: stock.get_tensor(name) for name in stock.keys()}  # noqa: SIM118
        assert len(tensors) == {"kv": 8, "hidden": 1, "text": 0}[context.kind]


# --- files


def test_a_file_is_the_bytes(tmp_path: Path) -> None:
    context = synthetic_context(tokens=300)
    assert context.save(tmp_path / "c.avp") == len(context.to_bytes())
    assert (tmp_path / "c.avp").read_bytes() == context.to_bytes()
    assert kv_bytes(Context.load(tmp_path / "c.avp")) == kv_bytes(context)
    assert described(Context.load(str(tmp_path / "c.avp"), verify="now")) == described(context)


def test_a_file_is_its_owners_alone_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        (tmp_path / "c.avp").write_bytes(b"")
        (tmp_path / "c.avp").chmod(0o666)
        synthetic_context().save(tmp_path / "c.avp")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "c.avp").stat().st_mode) == 0o600


def test_an_error_in_the_middle_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    old = synthetic_context(tokens=3)
    new = synthetic_context(layers=4, kv_heads=4, head_dim=64, tokens=2048, dtype="float32")
    old.save(tmp_path / "c.avp")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            new.save(tmp_path / "c.avp")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / "c.avp").read_bytes() == old.to_bytes()
    assert os.listdir(tmp_path) == ["c.avp"]


def test_saving_where_there_is_no_directory_says_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        synthetic_context().save(tmp_path / "none" / "c.avp")


def test_a_mapped_file_outlives_its_replacement(tmp_path: Path) -> None:
    first, second = synthetic_context(seed=1), synthetic_context(seed=2)
    first.save(tmp_path / "c.avp")
    mapped = Context.load(tmp_path / "c.avp")
    second.save(tmp_path / "c.avp")
    assert kv_bytes(mapped) == kv_bytes(first)


def test_an_empty_file_is_a_truncated_bundle(tmp_path: Path) -> None:
    (tmp_path / "c.avp").write_bytes(b"")
    with pytest.raises(TruncatedBundle, match="is empty"):
        Context.load(tmp_path / "c.avp")


# --- reading the head alone


def test_the_head_alone_says_what_a_bundle_holds() -> None:
    context = synthetic_context(tokens=300)
    data = context.to_bytes()
    head = data[: header_size(data[:8])]
    manifest = peek(head)
    assert (manifest.kind, manifest.tokens, manifest.length) == ("kv", context.tokens, 300)
    assert [entry.pages for entry in manifest.segments] == [segment.pages for segment in context.segments]
    assert sum(tensor_sizes(head).values()) == context.nbytes == len(data) - len(head)
    assert list(tensor_sizes(head))[:2] == ["0/0/k", "0/0/v"]


def test_a_file_whose_head_alone_is_read_is_not_read_further(tmp_path: Path) -> None:
    data = synthetic_context(tokens=300).to_bytes()
    (tmp_path / "c.avp").write_bytes(data)
    with open(tmp_path / "c.avp", "rb", buffering=0) as file:
        first = file.read(8)
        size = header_size(first)
        assert peek(first + file.read(size - 8)).length == 300
        assert file.tell() == size < len(data)


# --- digests


def test_verify_now_finds_a_changed_byte_at_once_and_use_at_the_first_read() -> None:
    data = bytearray(synthetic_context(tokens=64, dtype="float32").to_bytes())
    data[-1] ^= 1
    with pytest.raises(DigestMismatch, match="Fix: fetch the bundle again"):
        Context.from_bytes(data)
    context = Context.from_bytes(data, verify="use")
    context.segments[0].read(0, "k")
    for _ in range(2):
        with pytest.raises(DigestMismatch):
            context.segments[0].read(1, "v")


def test_a_changed_hidden_state_is_found_at_once() -> None:
    data = bytearray(hidden_context(4, "float32").to_bytes())
    data[-1] ^= 1
    with pytest.raises(DigestMismatch):
        Context.from_bytes(data, verify="use")


def test_verify_has_two_values() -> None:
    with pytest.raises(UsageError, match="verify is 'never'"):
        Context.from_bytes(b"", verify="never")


# --- the other way of reading


def _respelled(data: bytes, **how: object) -> bytes:
    size = header_size(data[:8])
    text = json.dumps(json.loads(data[8:size]), **how).encode()  # type: ignore[arg-type]
    return len(text).to_bytes(8, "little") + text + data[size:]


@pytest.mark.parametrize("how", [{}, {"indent": 1}, {"ensure_ascii": True}, {"separators": (",", ":")}])
@pytest.mark.parametrize("codec", CODECS)
def test_a_header_of_another_spelling_reads_as_the_same_context(codec: str, how: dict[str, object]) -> None:
    context = kv_context(range(70), turns=(Turn({"role": "user", "content": "é 🌍"}),))
    data = _respelled(context.to_bytes(codec=codec), **how)
    back = Context.from_bytes(data)
    assert described(back) == described(context)
    assert kv_bytes(back) == kv_bytes(context)
    assert back.to_bytes(codec=codec) == context.to_bytes(codec=codec)


def test_constant_values_survive_the_lossless_codec_under_the_default_limits() -> None:
    # Constant exponents shrink thousandfold; sign and mantissa do not, so nothing expands beyond the limit.
    context = kv_context(range(256), layers=(LayerLayout(8, 64),))
    for part in "kv":
        context.segments[0].tensors.arrays[0][part] = np.zeros((8, 256, 64), np.float32)
    assert kv_bytes(Context.from_bytes(context.to_bytes(codec="lossless"))) == kv_bytes(context)


# --- limits


@pytest.mark.parametrize(
    ("limits", "name"),
    [
        (Limits(bytes=100), "bytes"),
        (Limits(header=100), "header"),
        (Limits(tensors=7), "tensors"),
        (Limits(layers=1), "layers"),
        (Limits(tokens=299), "tokens"),
    ],
)
def test_every_limit_holds_and_its_error_names_it(limits: Limits, name: str) -> None:
    data = synthetic_context(tokens=300).to_bytes()
    with pytest.raises(LimitExceeded, match=f"Fix: raise Limits.{name}"):
        Context.from_bytes(data, limits=limits)
    with pytest.raises(LimitExceeded, match=f"Fix: raise Limits.{name}"):
        Context.from_bytes(_respelled(data), limits=limits)
    exact = Limits(bytes=len(_respelled(data)), header=len(data), tensors=8, layers=2, tokens=300)
    assert len(Context.from_bytes(data, limits=exact)) == len(Context.from_bytes(_respelled(data), limits=exact)) == 300


def test_the_limit_of_tensors_counts_every_part_of_a_codec() -> None:
    data = kv_context(range(70)).to_bytes(codec="lossless")
    assert len(Context.from_bytes(data, limits=Limits(tensors=8))) == 70
    with pytest.raises(LimitExceeded, match="8 tensors; at most 7"):
        Context.from_bytes(data, limits=Limits(tensors=7))


def test_the_limit_of_the_ratio_counts_what_came_in() -> None:
    data = kv_context(range(70)).to_bytes(codec="lossless")
    with pytest.raises(LimitExceeded, match=r"Limits\.ratio"):
        Context.from_bytes(data, limits=Limits(ratio=0))


# --- one segment alone


def test_a_segment_alone_is_no_context_but_its_head_can_be_read() -> None:
    context = kv_context(range(300))
    data = bundle_of(context, context.segments[1])
    with pytest.raises(BundleError, match="this is one segment, not a context"):
        Context.from_bytes(data)
    head = data[: header_size(data[:8])]
    assert (peek(head).kind, peek(head).tokens) == ("segment", tuple(range(256, 300)))
    assert read_head(head, limits=Limits()).total == len(data)
    assert list(tensor_sizes(head)) == [f"0/{layer}/{part}" for layer in (0, 1) for part in "kv"]


def test_a_head_that_announces_more_bytes_than_the_limit_is_refused() -> None:
    data = synthetic_context(tokens=300).to_bytes()
    head = data[: header_size(data[:8])]
    assert read_head(head, limits=Limits(bytes=len(data))).total == len(data)
    with pytest.raises(LimitExceeded, match=rf"a bundle of {len(data)} bytes comes; .* Fix: raise Limits\.bytes"):
        read_head(head, limits=Limits(bytes=len(data) - 1))


# --- writing what cannot be written


def test_an_unknown_codec_is_refused_by_name() -> None:
    with pytest.raises(UsageError, match="no codec is named 'zip'"):
        synthetic_context().to_bytes(codec="zip")


def test_a_message_that_is_no_json_is_refused() -> None:
    for content in ({1, 2}, float("nan"), "\ud800"):
        with pytest.raises(UsageError, match="cannot be written as JSON"):
            Context("text", turns=(Turn({"role": "user", "content": content}),)).to_bytes()


# --- classes


def test_an_accepted_class_is_never_better_than_that_of_a_segment() -> None:
    context = kv_context([LATENT, 1, 2])
    claimed = Context("kv", context.model, context.tokens, 3, segments=context.segments, exactness=Exactness.EXACT)
    assert Context.from_bytes(claimed.to_bytes()).exactness is Exactness.APPROXIMATE


def test_a_codec_of_another_installation_is_unsupported() -> None:
    data = synthetic_context(tokens=5).to_bytes().replace(b'codec\\":\\"raw', b'codec\\":\\"rat')
    with pytest.raises(UnsupportedBundle, match="unknown codec 'rat'"):
        Context.from_bytes(data)


def test_a_sender_cannot_claim_a_better_class_than_the_kind_allows() -> None:
    claimed = dataclasses.replace(text_context("hello"), exactness=Exactness.EXACT)
    assert Context.from_bytes(claimed.to_bytes()).exactness is Exactness.TEXT
