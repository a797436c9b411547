"""`avp store …`: what it shows, what it refuses, and its exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from avp.cli.store import store as command
from avp.errors import SegmentMissing, StoreFailed, UsageError
from avp.stores import open_store
from avp.testing.store import EXACT, stored_blobs


@pytest.fixture
def url(tmp_path: Path) -> str:
    """A store of two tenants: three segments of "a", one of the nameless."""
    url = f"disk:{tmp_path}/store"
    store = open_store(url)
    for blob in [*stored_blobs(), *stored_blobs(seed=1, tokens=32)]:
        store.put(blob, tenant="a")
    store.put(stored_blobs()[0], tenant="")
    store.close()
    return url


def run(*arguments: str) -> Result:
    return CliRunner().invoke(command, list(arguments), standalone_mode=False)


def shown(*arguments: str) -> list[dict[str, object]]:
    result = run(*arguments, "--json")
    assert result.exception is None, result.output
    return list(json.loads(result.stdout))


def spoil(tmp_path: Path) -> None:
    """Flip the last byte of one file of "a"."""
    path = max((tmp_path / "store" / "segments").glob("*/*.avp"), key=lambda path: path.stat().st_size)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def test_ls_lists_segments_of_all_tenants_or_of_one(url: str) -> None:
    assert len(shown("ls", "--store", url)) == 4
    (entry,) = shown("ls", "--store", url, "--tenant", "")
    first = stored_blobs()[0].entry
    assert (entry["page"], entry["start"], entry["count"]) == (first.pages[-1], 0, 256)
    assert (entry["engine"], entry["exactness"], entry["codec"]) == ("e", "exact", "raw")
    table = run("ls", "--store", url).stdout
    assert "PAGE" in table
    assert first.pages[-1][:8] in table


def test_stat_counts_by_tenant(url: str) -> None:
    nameless, named = shown("stat", "--store", url)
    assert (nameless["tenant"], nameless["segments"], nameless["positions"]) == ("", 1, 256)
    assert (named["tenant"], named["segments"], named["positions"]) == ("a", 3, 332)
    assert named["nbytes"] == sum(b.nbytes for b in [*stored_blobs(), *stored_blobs(seed=1, tokens=32)])
    assert "SEGMENTS" in run("stat", "--store", url).stdout


def test_rm_takes_a_prefix_that_is_unique(url: str) -> None:
    last = stored_blobs()[1].entry.pages[-1]
    assert run("rm", last[:8], "--store", url).stdout == "1 segment removed\n"
    assert len(shown("ls", "--store", url)) == 3
    both = stored_blobs()[0].entry.pages
    refused = run("rm", both[-1][:10], "--store", url).exception
    assert isinstance(refused, UsageError)
    assert "Fix: give more digits, or --tenant" in str(refused)
    assert run("rm", both[-1][:10], "--store", url, "--tenant", "a").exception is None
    assert run("rm", both[0], "--store", url).exception is None  # any page of a segment, in full; of the nameless
    assert len(shown("ls", "--store", url)) == 1


@pytest.mark.parametrize("page", ["abc", "xyzxyzxyz", ""])
def test_rm_refuses_what_is_no_page_id(url: str, page: str) -> None:
    assert isinstance(run("rm", page, "--store", url).exception, UsageError)


def test_rm_says_what_is_not_there(url: str) -> None:
    assert isinstance(run("rm", "0" * 64, "--store", url).exception, SegmentMissing)


def test_gc_says_what_became_free(url: str) -> None:
    assert run("gc", "--store", url).stdout == "0.0 MiB freed\n"
    sizes = sorted(b.nbytes for b in [*stored_blobs(), *stored_blobs(seed=1, tokens=32), stored_blobs()[0]])
    freed = json.loads(run("gc", "--store", f"{url}?budget={sizes[-1]}", "--json").stdout)["freed_bytes"]
    assert freed >= sum(sizes) - sizes[-1]


def test_verify_lists_the_damaged_and_exits_with_1(url: str, tmp_path: Path) -> None:
    assert run("verify", "--store", url).stdout == "all of it is whole\n"
    spoil(tmp_path)
    for arguments in ([], ["--repair"]):
        result = run("verify", "--store", url, *arguments, "--json")
        assert result.return_value == 1
        (entry,) = json.loads(result.stdout)
        assert entry["page"] == stored_blobs()[0].entry.pages[-1]
    result = run("verify", "--store", url)
    assert (result.return_value, result.stdout) == (None, "all of it is whole\n")
    assert len(shown("ls", "--store", url)) == 3


def test_verify_shows_a_table(url: str, tmp_path: Path) -> None:
    spoil(tmp_path)
    result = run("verify", "--store", url, "--repair")
    assert result.return_value == 1
    assert "1 damaged, removed" in result.output


def test_the_default_is_the_store_of_the_users_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AVP_CACHE", str(tmp_path))
    store = open_store("disk:")
    store.put(stored_blobs(tokens=40)[0], tenant="a")
    assert store.have(stored_blobs(tokens=40)[0].entry.pages, tenant="a", want=EXACT) == [True, True]
    store.close()
    assert len(shown("ls")) == 1


def test_a_store_that_cannot_be_opened_is_an_error_of_ours(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    assert isinstance(run("ls", "--store", f"disk:{tmp_path}/file").exception, StoreFailed)
    assert isinstance(run("ls", "--store", "nowhere").exception, UsageError)
