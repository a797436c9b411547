import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from avp.blob import seal
from avp.buffers import Buffer
from avp.bundle import header_size, pack
from avp.cli import cli, main
from avp.context import Context, Turn, text_context
from avp.segment import LATENT, PAGE, Exactness
from avp.testing import synthetic_context

AVP = [sys.executable, "-c", "from avp.cli import main; main()"]


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli, ["inspect", *arguments])


def document(path: Path, *arguments: str) -> Mapping[str, object]:
    shown = run("--json", str(path), *arguments)
    assert shown.exit_code == 0, shown.output
    found = json.loads(shown.stdout)
    assert isinstance(found, dict)
    return found


def refused(arguments: Sequence[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr of a command that ends with exit code 2."""
    monkeypatch.setattr(sys, "argv", ["avp", "inspect", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    return line


@pytest.fixture
def context() -> Context:
    """300 positions in two segments, two pending ids, two messages."""
    plain = synthetic_context(tokens=300, layers=3, kv_heads=2, head_dim=8)
    turns = (Turn({"role": "user", "content": "a secret"}), Turn({"role": "assistant", "content": "kept"}))
    return replace(plain, tokens=(*plain.tokens, 1, 2), turns=turns)


@pytest.fixture
def bundle(tmp_path: Path, context: Context) -> Path:
    path = tmp_path / "state.avp"
    context.save(path)
    return path


def test_json_says_all_that_the_header_says(bundle: Path, context: Context) -> None:
    found = document(bundle)
    assert context.model is not None
    data = bundle.read_bytes()
    assert found["model"] == {
        "id": "synthetic",
        "family": "synthetic",
        "weights": context.model.weights,
        "tokenizer": context.model.tokenizer,
    }
    assert {key: found[key] for key in ("file", "format", "kind", "exactness")} == {
        "file": str(bundle),
        "format": 1,
        "kind": "kv",
        "exactness": "exact",
    }
    counts = {"tokens": 302, "positions": 300, "pending": 2, "latent": 0, "absent": 0, "layers": 3}
    assert {key: found[key] for key in counts} == counts
    assert found["bytes_per_token"] == context.model.layout.bytes_per_token("bfloat16") == 192
    assert found["messages"] == [
        {"role": "user", "characters": 8, "opaque": None},
        {"role": "assistant", "characters": 4, "opaque": None},
    ]
    assert found["header_bytes"] == header_size(data)
    assert found["tensor_bytes"] == 300 * 192
    assert found["total_bytes"] == found["file_bytes"] == len(data)
    assert found["size_check"] == "ok"
    assert found["hidden"] is None


def test_segments_show_what_they_take_and_what_they_would_take_raw(tmp_path: Path, context: Context) -> None:
    path = tmp_path / "state.avp"
    context.save(path, codec="lossless")
    found = document(path)
    segments = found["segments"]
    assert isinstance(segments, list)
    assert [(each["start"], each["count"], each["pages"]) for each in segments] == [(0, 256, 8), (256, 44, 2)]
    assert [each["raw_bytes"] for each in segments] == [256 * 192, 44 * 192]
    assert sum(each["stored_bytes"] for each in segments) == found["tensor_bytes"]
    for each in segments:
        assert (each["codec"], each["dtype"], each["exactness"]) == ("lossless", "bfloat16", "exact")
        assert each["engine"] == "synthetic"
        assert each["ratio"] == pytest.approx(each["stored_bytes"] / each["raw_bytes"], abs=1e-4)
        assert each["ratio"] < 0.9


def test_the_tables_show_the_same_and_nothing_of_the_prompt(bundle: Path, context: Context) -> None:
    shown = run(str(bundle)).stdout
    assert context.model is not None
    words = ("synthetic", context.model.weights, "assistant", "bfloat16", "57,600 bytes", "100.0 %", "as declared")
    assert all(word in shown for word in words)
    for hidden in ("secret", "kept", str(context.tokens[0])):
        assert hidden not in shown
        assert hidden not in run("--json", str(bundle)).stdout.replace(context.model.weights, "")


def test_segments_that_are_not_here_are_counted(tmp_path: Path, context: Context) -> None:
    path = tmp_path / "part.avp"
    replace(context, segments=context.segments[1:]).save(path)
    assert document(path)["absent"] == 256
    assert "300 (256 not in this bundle)" in run(str(path)).stdout


@pytest.mark.parametrize("codec", ["raw", "lossless"])
def test_a_segment_alone_shows_where_it_lies_and_what_computed_it(tmp_path: Path, context: Context, codec: str) -> None:
    path = tmp_path / "segment.avp"
    assert context.model is not None
    blob = seal(context.model, replace(context.segments[1], engine="an engine"), codec=codec)
    path.write_bytes(b"".join(blob.runs))
    found = document(path)
    assert found["kind"] == "segment"
    assert [found[each] for each in ("tokens", "positions", "pending", "absent")] == [44, 44, 0, 0]
    assert (found["messages"], found["size_check"]) == ([], "ok")
    (segment,) = found["segments"]  # type: ignore[misc]
    assert (segment["start"], segment["count"], segment["pages"]) == (256, 44, 2)
    assert (segment["codec"], segment["engine"], segment["raw_bytes"]) == (codec, "an engine", 44 * 192)
    shown = run(str(path)).stdout
    assert "44 (256 to 300 of a context)" in shown
    assert all(word in shown for word in ("segment", "an engine", codec))
    assert "MESSAGE" not in shown


@pytest.mark.parametrize(("engines", "shown"), [(("a", "llamacpp"), "a, llamacpp"), (("a", "a"), "a")])
def test_every_engine_is_named_once(tmp_path: Path, context: Context, engines: tuple[str, str], shown: str) -> None:
    path = tmp_path / "state.avp"
    parts = tuple(replace(each, engine=engine) for each, engine in zip(context.segments, engines, strict=True))
    replace(context, segments=parts).save(path)
    assert re.search(rf"^engine +{shown} *$", run(str(path)).stdout, re.M)


def test_an_engines_name_does_not_reach_the_terminal_raw(tmp_path: Path, context: Context) -> None:
    path = tmp_path / "state.avp"
    replace(context, segments=(replace(context.segments[0], engine="\x1b[2Jx"),)).save(path)
    shown = run(str(path)).stdout
    assert "\x1b" not in shown
    assert r"\x1b" in shown


def test_hidden_states_are_shown(tmp_path: Path, context: Context) -> None:
    path = tmp_path / "hidden.avp"
    hidden = Buffer("float32", np.zeros((5, 16), np.float32))
    replace(context, kind="hidden", length=0, segments=(), hidden=hidden).save(path)
    assert document(path)["hidden"] == {"dtype": "float32", "shape": [5, 16], "stored_bytes": 320}
    assert "5 x 16 float32, 320 bytes" in run(str(path)).stdout


def test_a_text_bundle_has_a_message_and_no_model(tmp_path: Path) -> None:
    path = tmp_path / "text.avp"
    text_context("hello", role="system").save(path)
    found = document(path)
    assert (found["kind"], found["model"], found["exactness"]) == ("text", None, "text")
    assert found["messages"] == [{"role": "system", "characters": 5, "opaque": None}]
    assert found["bytes_per_token"] is None
    assert "system" in run(str(path)).stdout


def test_control_characters_of_a_stranger_do_not_reach_the_terminal(tmp_path: Path, context: Context) -> None:
    path = tmp_path / "state.avp"
    assert context.model is not None
    model = replace(context.model, id="\x1b]0;owned\x07[red]")
    replace(synthetic_context(), model=model, segments=(), length=0, kind="tokens").save(path)
    shown = run(str(path)).stdout
    assert "\x1b" not in shown
    assert r"\x1b]0;owned\x07[red]" in shown


@pytest.mark.parametrize("change", [-1, -1000, 1, 1000])
def test_a_file_of_another_size_is_shown_and_refused(
    change: int, bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = bundle.read_bytes()
    bundle.write_bytes(data[:change] if change < 0 else data + bytes(change))
    word = "truncated" if change < 0 else "trailing"
    shown = run("--json", str(bundle)).stdout
    assert json.loads(shown)["size_check"] == word
    assert f"{word}: the file has {len(data) + change:,}" in run(str(bundle)).stdout.replace("\n", " ")
    line = refused([str(bundle)], monkeypatch, capsys)
    assert f"{abs(change)} bytes" in line
    assert line.startswith("TruncatedBundle" if change < 0 else "BundleError")


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (b"", "TruncatedBundle"),
        (b"1234567", "TruncatedBundle"),
        (b"plain text, and no bundle at all", "LimitExceeded"),
        (b"\x02\0\0\0\0\0\0\0{}", "BundleError"),
        (b"\x02\0\0\0\0\0\0\0{", "TruncatedBundle"),
        (b"\x02\0\0\0\0\0\0\0\xff\xff", "BundleError"),
    ],
)
def test_what_is_no_bundle_is_refused_in_one_line(
    content: bytes, error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "bad"
    path.write_bytes(content)
    assert refused([str(path)], monkeypatch, capsys).startswith(f"{error}: ")


def test_an_error_that_quotes_the_file_stays_one_clean_line(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = bundle.read_bytes()
    bundle.write_bytes(data.replace(b'"0/0/k":', b'"\\u001b\\n":', 1).replace(b" ", b"", 2))
    raw = bundle.read_bytes()
    size = raw.index(b"}}") + 2
    header = raw[8:size]
    bundle.write_bytes(len(header).to_bytes(8, "little") + header)
    line = refused([str(bundle)], monkeypatch, capsys)
    assert "\x1b" not in line
    assert r"\x1b\n" in line


@pytest.mark.parametrize("name", ["missing", ".", "a\x1b[2Jb"])
def test_what_cannot_be_read_is_refused_in_one_line(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refused([str(tmp_path / name)], monkeypatch, capsys)
    assert line.startswith("UsageError: ")
    assert "cannot be read" in line
    assert "\x1b" not in line


def test_from_a_pipe_just_the_header_is_taken(context: Context) -> None:
    data = pack(context)
    read, write = os.pipe()
    with open(read, "rb", buffering=0) as rest:
        assert os.write(write, data) == len(data)  # it fits the pipe, which holds 64 KiB
        done = subprocess.run([*AVP, "inspect", "--json", "-"], stdin=rest, capture_output=True, check=True)
        os.close(write)
        left = bytearray()
        while chunk := rest.read(1 << 16):
            left += chunk
    assert bytes(left) == data[header_size(data) :]
    found = json.loads(done.stdout)
    assert found["file"] == "-"
    assert (found["file_bytes"], found["size_check"]) == (None, "unknown")
    assert found["total_bytes"] == len(data)


def test_from_a_pipe_that_never_ends_inspect_ends() -> None:
    """The header is longer than what a pipe holds, the tensors are endless."""
    data = pack(synthetic_context(tokens=20_000, layers=1, kv_heads=1))
    size = header_size(data)
    assert size > 1 << 17
    sent = 0
    with subprocess.Popen([*AVP, "inspect", "-"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        os.write(process.stdin.fileno(), data[:8])
        try:
            while sent < 1 << 30:
                sent += os.write(process.stdin.fileno(), data[8:size] if not sent else bytes(4096))
        except BrokenPipeError:
            pass
        shown = process.stdout.read()
        process.stdin.close()
    assert process.returncode == 0
    assert b"not checked" in shown
    assert sent - size <= 1 << 17


def test_stdin_that_is_a_file_has_its_size_checked(bundle: Path) -> None:
    with bundle.open("rb") as stdin:
        done = subprocess.run([*AVP, "inspect", "--json", "-"], stdin=stdin, capture_output=True, check=True)
    assert json.loads(done.stdout)["size_check"] == "ok"


def test_a_closed_stdin_is_one_line() -> None:
    done = subprocess.run(["sh", "-c", '"$@" <&-', "sh", *AVP, "inspect", "-"], capture_output=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(b"UsageError: - cannot be read")
    assert done.stderr.count(b"\n") == 1


def test_latent_positions_and_unknown_ids_have_a_place_in_the_text(tmp_path: Path) -> None:
    from avp.testing.tiny import tiny_tokenizer

    folder = tmp_path / "tokenizer"
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(folder)
    ids = tokenizer.encode("pläne 🍎")
    tokens = (*ids, LATENT, LATENT, 999_999, *ids)
    assert len(tokens) <= PAGE  # the id of a page with latent positions does not follow from its token ids
    path = tmp_path / "state.avp"
    replace(synthetic_context(tokens=len(tokens)), tokens=tokens).save(path)
    assert document(path)["latent"] == 2
    assert f"{len(tokens)} (2 latent)" in run(str(path)).stdout
    text = document(path, "--to-text", "--model", str(folder))["text"]
    assert text == {
        "text": "pläne 🍎⟨latent⟩⟨latent⟩⟨id 999999⟩pläne 🍎",
        "tokenizer": str(folder),
        "same_tokenizer": False,
    }
    shown = run("--to-text", "--model", str(folder), str(path)).stdout
    assert "pläne 🍎⟨latent⟩⟨latent⟩" in shown
    assert "another tokenizer" in shown


def test_the_text_is_by_the_tokenizer_of_the_bundles_own_model(tmp_path: Path) -> None:
    from avp.connectors.weights import tokenizer_fingerprint
    from avp.testing.tiny import tiny_tokenizer

    folder = tmp_path / "tokenizer"
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(folder)
    plain = synthetic_context()
    assert plain.model is not None
    model = replace(plain.model, id=str(folder), tokenizer=tokenizer_fingerprint(tokenizer))
    ids = tuple(tokenizer.encode("<|im_start|>user\na plan"))
    path = tmp_path / "state.avp"
    replace(plain, kind="tokens", model=model, tokens=ids, length=0, segments=(), turns=()).save(path)
    shown = run("--to-text", str(path)).stdout
    assert shown.endswith("\nTEXT\n<|im_start|>user\na plan\n")


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--to-text"], "no tokenizer of 'synthetic' is here"),
        (["--to-text", "--model", ""], "no tokenizer of '' is here"),
        (["--to-text", "--model", "no such/model name"], "is here"),
        (["--model", "smollm2"], "only --to-text uses"),
    ],
)
def test_a_tokenizer_that_is_not_at_hand_is_a_usage_error(
    arguments: list[str],
    reason: str,
    bundle: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    line = refused([*arguments, str(bundle)], monkeypatch, capsys)
    assert line.startswith("UsageError: ")
    assert reason in line
    assert "Fix: " in line


def test_a_text_bundle_has_no_ids_to_show(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "text.avp"
    text_context("hello").save(path)
    assert "holds no token ids" in refused(["--to-text", str(path)], monkeypatch, capsys)


def test_the_worst_class_is_the_one_shown(tmp_path: Path, context: Context) -> None:
    path = tmp_path / "state.avp"
    first, second = context.segments
    replace(context, segments=(first, replace(second, exactness=Exactness.APPROXIMATE))).save(path)
    assert document(path)["exactness"] == "approximate"


@pytest.mark.real
def test_smollm2_is_found_by_the_title_in_the_manifest(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from avp.connectors import models
    from avp.connectors.weights import tokenizer_fingerprint

    tokenizer = AutoTokenizer.from_pretrained(models.converted("smollm2"))
    plain = synthetic_context()
    assert plain.model is not None
    model = replace(plain.model, id="SmolLM2-135M-Instruct", tokenizer=tokenizer_fingerprint(tokenizer))
    ids = tuple(tokenizer.encode("Plan 12 steps."))
    path = tmp_path / "state.avp"
    replace(plain, kind="tokens", model=model, tokens=ids, length=0, segments=(), turns=()).save(path)
    for arguments in ([], ["--model", "smollm2"]):
        text = document(path, "--to-text", *arguments)["text"]
        assert isinstance(text, dict)
        assert text["text"] == "Plan 12 steps."
        assert text["same_tokenizer"]
