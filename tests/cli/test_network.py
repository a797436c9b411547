import json
from collections.abc import Iterator
from pathlib import Path

import pytest

import avp as library
from avp.connectors.huggingface import HuggingFaceConnector

from .serving import avp, checkpoint, serving

PROMPT = "The planner plans, the critic reads the plan and the solver answers. " * 4
QUESTION, FOLLOW_UP = "12 apples?", "7 pears?"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def here(model: Path) -> HuggingFaceConnector:
    """The same model in this process."""
    return HuggingFaceConnector.from_pretrained(model)


@pytest.fixture(scope="module")
def urls(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """One server's URLs, by scheme."""
    listen = (f"unix:{tmp_path_factory.mktemp('s')}/a.sock", "http://127.0.0.1:0")
    with serving("--model", model, "--listen", listen[0], "--listen", listen[1]) as server:
        yield {url.partition(":")[0]: url for url in server.urls}


@pytest.mark.parametrize("scheme", ["unix", "http"])
def test_a_context_is_sent_asked_asked_again_fetched_and_sent_back(
    scheme: str, model: Path, here: HuggingFaceConnector, urls: dict[str, str], tmp_path: Path
) -> None:
    url, file = urls[scheme], tmp_path / "context.avp"
    prompt = f"By {scheme}: {PROMPT}"
    sent = avp("send", "--model", model, "--prompt", prompt, "--to", url)
    handle = sent.stdout.strip()
    assert sent.stdout == f"{handle}\n"
    assert "mode kv, exact" in sent.stderr
    assert "bytes sent, 0 of KV were there already" in sent.stderr

    before = here.prefill(prompt)
    expected = here.generate(QUESTION, context=before, max_new_tokens=8)
    options = ("--max-new-tokens", "8", "--json")
    first = json.loads(avp("ask", url, QUESTION, "--context", handle, *options).stdout)
    assert first["tokens"] == list(expected.tokens)
    assert first["text"] == str(expected)
    assert first["receipt"]["mode"] == "kv"
    assert first["usage"]["cached_tokens"] == len(before)

    again = here.generate(FOLLOW_UP, context=expected.context, max_new_tokens=8)
    second = json.loads(avp("ask", url, FOLLOW_UP, "--context", first["handle"], *options).stdout)
    assert second["tokens"] == list(again.tokens)

    fetched = avp("fetch", url, second["handle"], "-o", file)
    assert fetched.stdout == f"{file}\n"
    assert file.stat().st_mode & 0o777 == 0o600
    assert library.Context.load(file).tokens == again.context.tokens
    looked = json.loads(avp("inspect", file, "--json").stdout)
    assert (looked["kind"], looked["exactness"], looked["positions"]) == ("kv", "exact", second["length"])

    back = json.loads(avp("send", file, "--to", url, "--json").stdout)
    assert back["receipt"]["bytes_reused"] == second["length"] * looked["bytes_per_token"]


def test_text_comes_as_it_is_and_the_handle_on_stderr_goes_on_from_it(
    here: HuggingFaceConnector, urls: dict[str, str]
) -> None:
    asked = avp("ask", urls["unix"], "-", "--max-new-tokens", "6", stdin=PROMPT)
    expected = here.generate(PROMPT, max_new_tokens=6)
    assert asked.stdout.removesuffix("\n") == str(expected).removesuffix("\n")
    first, *_ = asked.stderr.splitlines()
    handle = first.removeprefix("handle: ")
    assert "of which 0 came with the context" in asked.stderr
    assert avp("ask", urls["unix"], QUESTION, "--context", handle, "--max-new-tokens", "2").stdout


def test_a_handle_is_renewed_and_revoked_and_then_it_is_gone(urls: dict[str, str], model: Path, tmp_path: Path) -> None:
    url = urls["http"]
    handle = avp("send", "--model", model, "--prompt-file", "-", "--to", url, stdin=PROMPT).stdout.strip()
    assert json.loads(avp("renew", url, handle, "--json").stdout) == {"ttl": 3600.0}
    assert json.loads(avp("revoke", url, handle, "--json").stdout) == {"revoked": True}
    gone = avp("fetch", url, handle, "-o", tmp_path / "none.avp", ends=2)
    assert gone.stderr.startswith("HandleExpired: ")
    assert not (tmp_path / "none.avp").exists()


def test_a_keeper_without_a_model_keeps_for_an_agent_that_fetches_from_it(
    urls: dict[str, str], model: Path, here: HuggingFaceConnector, tmp_path: Path
) -> None:
    with serving("--no-model", "--listen", f"unix:{tmp_path}/k.sock") as keeper:
        (kept,) = keeper.urls
        assert "keeps and gives contexts" in avp("hello", kept).stdout
        handle = avp("send", "--model", model, "--prompt", PROMPT, "--to", kept).stdout.strip()
        mute = avp("ask", kept, QUESTION, "--context", handle, ends=2)
        asked = avp(
            "ask", urls["unix"], QUESTION, "--context", handle, "--from", kept, "--max-new-tokens", "5", "--json"
        )
    assert mute.stderr.startswith("UsageError: keeper has no model")
    expected = here.generate(QUESTION, context=here.prefill(PROMPT), max_new_tokens=5)
    assert json.loads(asked.stdout)["tokens"] == list(expected.tokens)


def test_a_file_takes_a_context_like_an_agent(model: Path, here: HuggingFaceConnector, tmp_path: Path) -> None:
    file = tmp_path / "kept.avp"
    trace = tmp_path / "trace.json"
    sent = avp("send", "--model", model, "--prompt", PROMPT, "--to", f"file:{file}", "--trace", trace)
    assert sent.stdout == f"{file}\n"
    assert library.Context.load(file).tokens == here.prefill(PROMPT).tokens
    assert {"hand_over", "compute"} <= {event["name"] for event in json.loads(trace.read_text())["traceEvents"]}


def test_text_goes_over_only_where_text_will_do(tmp_path: Path) -> None:
    url = f"unix:{tmp_path}/k.sock"
    with serving("--no-model", "--accept", "text", "--listen", url):
        refused = avp("send", "--prompt", "Hello.", "--to", url, ends=2)
        taken = json.loads(avp("send", "--prompt", "Hello.", "--to", url, "--accept", "text", "--json").stdout)
    assert refused.stderr.startswith("NoAgreement: ")
    assert refused.stdout == ""
    assert (taken["receipt"]["mode"], taken["exactness"]) == ("text", "text")


def test_hello_measures_bandwidth_when_asked_to(urls: dict[str, str]) -> None:
    quiet = json.loads(avp("hello", urls["http"], "--json").stdout)
    assert quiet["bandwidth"] is None
    assert json.loads(avp("hello", urls["http"], "--json", "--measure").stdout)["bandwidth"] > 1e5
    assert "bytes/s" in avp("hello", urls["unix"], "--measure").stdout


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["send", "--to", "unix:/x.sock"], "one thing is handed over"),
        (["send", "x.avp", "--prompt", "x", "--to", "unix:/x.sock"], "one thing is handed over"),
        (["send", "x.avp", "--to", "unix:/x.sock"], "x.avp cannot be read: No such file"),
        (["send", "--prompt", "x", "--prompt-file", "y", "--to", "unix:/x.sock"], "both --prompt and --prompt-file"),
        (["send", "--prompt-file", "/nowhere/y", "--to", "unix:/x.sock"], "/nowhere/y cannot be read"),
        (["send", "x.avp", "--model", "m", "--to", "unix:/x.sock"], "a bundle names its model"),
        (["ask", "unix:/x.sock"], "there is nothing to say anything to"),
        (["ask", "unix:/x.sock", "x", "--from", "unix:/y.sock"], "--from says who keeps the context"),
        (["ask", "unix:/nowhere/x.sock", "x"], "ConnectionFailed: "),
        (["hello", "nonsense"], "begins with none of the known schemes"),
    ],
)
def test_what_cannot_be_done_is_one_message_and_exit_code_2(given: list[str], says: str) -> None:
    done = avp(*given, ends=2)
    assert says in done.stderr
    assert done.stdout == ""
