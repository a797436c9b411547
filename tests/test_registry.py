"""Names become plug-ins through entry points."""

from __future__ import annotations

from importlib.metadata import EntryPoint

import pytest

from avp import registry
from avp.errors import MissingExtra, UsageError


def test_the_built_in_codecs_are_plug_ins_like_any_other() -> None:
    assert {"lossless", "raw"} <= set(registry.names("avp.codecs"))
    for name in ("lossless", "raw"):
        assert registry.codec(name).name == name
        assert registry.codec(name) is registry.load("avp.codecs", name)


def test_an_unknown_name_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(UsageError, match=r"no codec is named 'zip'\. Fix: use one of .*lossless.*raw"):
        registry.codec("zip")
    with pytest.raises(UsageError, match="no projection is named 'zip'"):
        registry.projection("zip")


def test_an_unknown_group_says_that_nothing_is_installed() -> None:
    assert registry.names("avp.nothing") == ()
    with pytest.raises(UsageError, match=r"none \(is avp installed\?\)"):
        registry.load("avp.nothing", "x")


@pytest.mark.parametrize(
    ("module", "extra"), [("torch", "hf"), ("zstandard.backend", "zstd"), ("rich", "cli"), ("somebodys", "hf")]
)
def test_a_missing_library_names_the_extra_that_brings_it(module: str, extra: str) -> None:
    error = registry.missing_extra(ImportError(name=module), feature="codec 'x'")
    assert str(error) == (
        f"codec 'x' needs {module.partition('.')[0]}, which is not installed. Fix: pip install \"avp[{extra}]\""
    )
    assert isinstance(error, ImportError)


def test_a_library_without_a_name_is_a_library() -> None:
    assert "needs a library" in str(registry.missing_extra(ImportError("gone"), feature="it"))


def test_a_plug_in_that_cannot_be_imported_is_a_missing_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("broken", "avp_no_such_module:CODEC", "avp.codecs")
    monkeypatch.setattr(registry, "entry_points", lambda group: (point,))
    with pytest.raises(MissingExtra, match="codec 'broken' needs avp_no_such_module"):
        registry.load("avp.codecs", "broken")


def test_a_fault_of_our_own_is_not_called_a_missing_library(monkeypatch: pytest.MonkeyPatch) -> None:
    for target in ("avp.no_such_module:CODEC", "avp.codecs.raw:Nothing"):
        point = EntryPoint("faulty", target, "avp.codecs")
        monkeypatch.setattr(registry, "entry_points", lambda group, point=point: (point,))
        with pytest.raises((ModuleNotFoundError, AttributeError)) as error:
            registry.load("avp.codecs", "faulty")
        assert not isinstance(error.value, MissingExtra)


def test_a_projection_comes_by_name() -> None:
    pytest.importorskip("torch")
    assert registry.projection("norm").name == "norm"
