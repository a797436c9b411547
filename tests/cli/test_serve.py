import json
import os
import signal
import subprocess
from pathlib import Path

import pytest
import trustme

import avp as avp_api
from avp.security import Security, Tenant
from avp.segment import Want, page_ids, root_page
from avp.stores import open_store
from avp.testing.synthetic import synthetic_context

from .serving import COMMAND, PATIENCE, avp, checkpoint, environment, first_line, serving

SECRET = "sesame-opens-the-door"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("by", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_with_exit_code_0_and_nothing_is_left(by: signal.Signals, tmp_path: Path) -> None:
    with serving("--no-model", "--listen", f"unix:{tmp_path}/a.sock") as server:
        code, said, seconds = server.end(by)
    assert code == 0
    assert said == "closing …\n"
    assert seconds < 15
    assert os.listdir(tmp_path) == []


def test_a_signal_ends_a_generation_that_is_under_way(model: Path, tmp_path: Path) -> None:
    url = f"unix:{tmp_path}/a.sock"
    with serving("--model", model, "--listen", url) as server:
        asking = [*COMMAND, "ask", url, "Say it all.", "--max-new-tokens", "900"]
        asked = subprocess.Popen(
            asking, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0, env=environment(PYTHONUNBUFFERED="1")
        )
        assert asked.stdout is not None
        assert asked.stdout.read(1)  # it is under way
        code, _, seconds = server.end()
        _, said = asked.communicate(timeout=PATIENCE)
    assert code == 0
    assert seconds < 20
    assert b"Traceback" not in said


def test_it_says_where_it_listens_a_line_for_each_url(tmp_path: Path) -> None:
    urls = [f"unix:{tmp_path}/a.sock", "http://127.0.0.1:0"]
    command = [*COMMAND, "serve", "--no-model", "--store", "memory:", "--listen", urls[0], "--listen", urls[1]]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment())
    try:
        assert first_line(process) == f"listening at {urls[0]}\n"
        assert process.stdout is not None
        second = process.stdout.readline()
    finally:
        process.terminate()
        process.communicate(timeout=PATIENCE)
    assert second.startswith("listening at http://127.0.0.1:")
    assert not second.endswith(":0\n")


def test_the_first_caller_already_learns_how_fast_it_computes(model: Path, tmp_path: Path) -> None:
    url = f"unix:{tmp_path}/a.sock"
    with serving("--model", model, "--name", "solver", "--accept", "text", "--listen", url):
        told = json.loads(avp("hello", url, "--json").stdout)
    assert (told["agent"], told["engine"], told["dtype"]) == ("solver", "transformers", "float32")
    assert told["accept"] == "text"
    assert told["prefill"] > 0


@pytest.mark.parametrize("url", ["http://0.0.0.0:0", "grpc://0.0.0.0:0"])
def test_an_address_open_to_all_is_refused_before_a_model_is_loaded(url: str, tmp_path: Path) -> None:
    done = avp("serve", "--model", tmp_path / "none", "--listen", url, ends=2)
    assert done.stdout == ""
    assert done.stderr.startswith(f"UsageError: {url} can be reached from other machines")
    assert "--insecure" in done.stderr
    assert "loading" not in done.stderr


def test_an_open_address_is_served_with_a_token_or_when_it_is_wanted() -> None:
    for given in (["--insecure"], ["--token", SECRET]):
        with serving("--no-model", "--listen", "http://0.0.0.0:0", *given) as server:
            assert server.end()[0] == 0


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--listen", "carrier-pigeon://x"], "begins with none of the known schemes"),
        (["--listen", "unix:/nowhere/at/all/a.sock"], "UsageError: "),
        (["--listen", "unix:a.sock", "--memory", "much"], "'much' is no amount"),
        (["--listen", "unix:a.sock", "--ttl", "1y"], "'1y' is no amount"),
        ([], "Missing option '--listen'"),
    ],
)
def test_what_cannot_be_served_is_one_message_and_exit_code_2(given: list[str], says: str) -> None:
    done = avp("serve", "--no-model", "--store", "memory:", *given, ends=2)
    assert says in done.stderr


def test_without_the_right_token_nobody_is_let_in_and_none_is_shown(tmp_path: Path) -> None:
    urls = [f"unix:{tmp_path}/a.sock", "http://127.0.0.1:0"]
    with serving(
        "--no-model", "--listen", urls[0], "--listen", urls[1], "--log-level", "debug", env={"AVP_TOKEN": SECRET}
    ) as server:
        for url in server.urls:
            wrong = avp("hello", url, "--token", "open-up-" + SECRET[::-1], ends=2)
            assert wrong.stderr.startswith("AccessDenied: ")
            assert SECRET[::-1] not in wrong.stderr
            assert avp("hello", url, ends=2).stderr.startswith("AccessDenied: ")
            right = avp("hello", url, env={"AVP_TOKEN": SECRET})
            assert SECRET not in right.stdout + right.stderr
            assert avp("hello", url, "--token", SECRET).stdout == right.stdout
        said = server.end()[1]
    assert SECRET not in said
    assert SECRET[::-1] not in said


def test_tenants_by_token_do_not_see_each_others_contexts(model: Path, tmp_path: Path) -> None:
    url, tokens = f"unix:{tmp_path}/a.sock", tmp_path / "tokens"
    tokens.write_text("# who may call\none-token one\n\nother-token other\n")
    with serving("--no-model", "--listen", url, "--tokens", tokens):
        sent = avp("send", "--model", model, "--prompt", "A secret.", "--to", url, "--token", "one-token")
        handle = sent.stdout.strip()
        mine = avp("renew", url, handle, "--token", "one-token")
        theirs = avp("renew", url, handle, "--token", "other-token", ends=2)
    assert mine.stdout == "3600\n"
    assert theirs.stderr.startswith("HandleExpired: ")
    assert handle not in theirs.stderr


@pytest.mark.parametrize("secret", [None, "shared by servers"])
def test_the_salt_of_a_tenant_follows_from_a_secret(
    secret: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AVP_CACHE", str(tmp_path / "cache"))
    if secret:
        monkeypatch.setenv("AVP_TENANT_SECRET", secret)
    url, tokens = f"unix:{tmp_path}/a.sock", tmp_path / "tokens"
    tokens.write_text("one-token one\n")
    page = synthetic_context(tokens=32)
    assert page.model is not None
    with (
        serving("--no-model", "--listen", url, "--tokens", tokens, "--store", f"disk:{tmp_path}/store"),
        avp_api.connect(url, security=Security(token="one-token")) as remote,
    ):
        remote.hand_over(page)
    key = secret.encode() if secret else (tmp_path / "cache" / "secret").read_bytes()
    want = Want(page.segments[0].engine, page.segments[0].dtype)
    store = open_store(f"disk:{tmp_path}/store")
    for tenant, there in ((Tenant.named("one", secret=key), True), (Tenant.named("one"), False)):
        ids = page_ids(root_page(page.model, salt=tenant.salt), page.tokens)
        assert store.have(ids, tenant="one", want=want) == [there]
    store.close()


@pytest.mark.parametrize("text", ["only-a-token\n", "a one\na two\n", "# nothing\n", "a b c\n"])
def test_a_file_of_tokens_that_is_none_is_refused_without_a_word_of_it(text: str, tmp_path: Path) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_text(text.replace("a ", f"{SECRET} ").replace("only", SECRET))
    done = avp("serve", "--no-model", "--listen", "unix:a.sock", "--tokens", tokens, ends=2)
    assert "token tenant" in done.stderr
    assert SECRET not in done.stderr


def test_certificates_are_shown_and_demanded(tmp_path: Path) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    for stem, name in (("server", "localhost"), ("client", "client@example.org")):
        made = authority.issue_cert(name)
        made.cert_chain_pems[0].write_to_path(tmp_path / f"{stem}.pem")
        made.private_key_pem.write_to_path(tmp_path / f"{stem}.key")
    ours = ("--tls-cert", tmp_path / "server.pem", "--tls-key", tmp_path / "server.key")
    listen = ("--listen", "https://localhost:0", "--client-ca", tmp_path / "ca.pem", "--http2")
    shown = ("--ca", tmp_path / "ca.pem", "--cert", tmp_path / "client.pem", "--key", tmp_path / "client.key")
    with serving("--no-model", *listen, *ours) as server:
        (url,) = server.urls
        for speaks in ((), ("--http2",)):
            assert json.loads(avp("hello", url, "--json", *shown, *speaks).stdout)["agent"] == "keeper"
        assert avp("hello", url, *shown[:2], ends=2).stdout == ""
        assert "trust" in avp("hello", url, ends=2).stderr
