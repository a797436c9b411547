from __future__ import annotations

from pathlib import Path

import pytest

from avp.connectors.vllm_jobs import Asked, PluginSettings, Report
from avp.errors import UsageError
from avp.security import Tenant
from avp.segment import Exactness


def test_settings_name_the_store_the_tenant_and_what_is_accepted(tmp_path: Path) -> None:
    read = PluginSettings.of({"store": f"disk:{tmp_path}", "tenant": "red", "secret": "one", "accept": "bounded"})
    assert read.tenant == Tenant.named("red", secret=b"one")
    assert (read.accept, read.save, read.checkpoint) == (Exactness.BOUNDED, "all", None)


def test_a_secret_may_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RED_SECRET", "one")
    read = PluginSettings.of({"tenant": "red", "secret_env": "RED_SECRET"})
    assert read.tenant == Tenant.named("red", secret=b"one")


def test_a_secret_does_not_show() -> None:
    assert "hush" not in repr(PluginSettings.of({"tenant": "red", "secret": "hush"}))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"stoer": "disk:"}, "has stoer"),
        ({"store": 3}, "has store"),
        ({"store": "memory:"}, "each have their own"),
        ({"accept": "approximate"}, "accept is 'approximate'"),
        ({"accept": "good"}, "'good' is no class"),
        ({"save": "some"}, "save is 'some'"),
        ({"secret_env": "AVP_NOT_SET"}, "names AVP_NOT_SET, which is not set"),
    ],
)
def test_a_wrong_setting_is_named(config: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        PluginSettings.of(config)


def test_a_request_asks_nothing_unless_it_says_so() -> None:
    assert Asked.of(None) == Asked.of({}) == Asked.of({"others": {}}) == Asked()
    assert Asked.of({"avp": {"pages": ["a", "b"], "wait": True}}) == Asked(None, frozenset("ab"), True, False)


@pytest.mark.parametrize(
    "given", [3, {"more": 1}, {"handle": 3}, {"pages": "a"}, {"pages": [1]}, {"wait": "yes"}, {"tail": 1}]
)
def test_a_request_that_asks_wrong_is_refused(given: object) -> None:
    with pytest.raises(UsageError, match="kv_transfer_params"):
        Asked.of({"avp": given})


def test_reports_add_up() -> None:
    both = Report(frozenset("a"), frozenset("b")) | Report(frozenset("c"), frozenset(), frozenset("d"))
    assert both == Report(frozenset("ac"), frozenset("b"), frozenset("d"))
    assert both
    assert not Report()
