"""Every Python block of the documentation runs; every `avp` line of its shell blocks is a command that exists."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import click
import pytest

import avp
from avp.cli import cli

from . import pages

EXTENDING = pages.ROOT / "docs" / "guides" / "extending.md"
WITH_PYTHON = [page for page in pages.PAGES if pages.blocks(page, "python")]
REAL = ('"smollm2"', '"gemma3"')


def needs_a_model(page: Path) -> bool:
    return any(model in block.text for block in pages.blocks(page, "python") for model in REAL if not block.why)


@pytest.fixture(autouse=True, scope="module")
def _connectors_are_freed() -> Iterator[None]:
    yield
    avp.clear_cache()


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=[pytest.mark.real] if needs_a_model(page) else [], id=pages.name(page))
        for page in WITH_PYTHON
    ],
)
def test_the_python_blocks_of_a_page_run_in_order(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "LlamaCppConnector" in page.read_text():
        pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: make llamacpp")
    monkeypatch.chdir(tmp_path)
    module = ModuleType("docs_example")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    for block in pages.blocks(page, "python"):
        if not block.why:
            source = "\n" * (block.line - 1) + block.text
            exec(compile(source, str(page), "exec", dont_inherit=True), module.__dict__)
    for law, run in conformance(module):
        try:
            run()
        except AssertionError as error:
            raise AssertionError(f"{page.name}: {law}") from error


def conformance(module: ModuleType) -> list[tuple[str, Callable[[], None]]]:
    """The laws of the conformance suites that a page subclasses."""
    suites = [value for key, value in vars(module).items() if key.startswith("Test") and isinstance(value, type)]
    return [
        (f"{suite.__name__}.{law}", getattr(suite(), law))
        for suite in suites
        for law in dir(suite)
        if law.startswith("test_")
    ]


@pytest.mark.parametrize("page", pages.PAGES, ids=pages.name)
def test_a_block_is_left_out_only_for_want_of_a_hub_a_gpu_or_vllm(page: Path) -> None:
    left_out = page.read_text().count("<!-- not run")
    reasons = [block.why for block in pages.blocks(page, "python") if block.why]
    assert len(reasons) == left_out
    assert all("hub" in why or "GPU" in why or "vLLM" in why for why in reasons)


COMMANDS = [
    pytest.param(line, id=f"{pages.name(page)}-{line}")
    for page in pages.PAGES
    for block in pages.blocks(page, "bash", "sh", "console")
    for line in block.text.replace("\\\n", " ").splitlines()
    if line.removeprefix("$ ").startswith("avp ")
]


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_of_the_pages_exists_with_its_options(line: str) -> None:
    command: click.Command = cli
    context = click.Context(cli, info_name="avp")
    words = shlex.split(line.removeprefix("$ "), comments=True)[1:]
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        found = command.get_command(context, words[0])
        assert found, f"{context.command_path} has no command {words[0]}"
        command, context = found, click.Context(found, parent=context, info_name=words.pop(0))
    context.resilient_parsing = any(word in ("--help", "--version") for word in words)
    command.parse_args(context, words)


def test_a_plugin_registered_as_the_page_says_is_found(tmp_path: Path) -> None:
    """The codec of the page, installed by hand: a module, and the entry points of its TOML block."""
    codec = next(block.text for block in pages.blocks(EXTENDING, "python") if "CODEC = " in block.text)
    (tmp_path / "avp_zlib.py").write_text(codec)
    toml = next(block.text for block in pages.blocks(EXTENDING, "toml") if "avp.codecs" in block.text)
    folder = tmp_path / "avp_zlib-1.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: avp-zlib\nVersion: 1\n")
    points = toml.replace('[project.entry-points."avp.codecs"]', "[avp.codecs]").replace('"', "")
    (folder / "entry_points.txt").write_text(points)
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import avp\n"
        "context = avp.testing.synthetic_context()\n"
        "back = avp.Context.from_bytes(context.to_bytes(codec='zlib'))\n"
        "print(back.to_bytes() == context.to_bytes())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"
