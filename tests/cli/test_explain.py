import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from avp.cli import cli
from avp.connectors.huggingface import HuggingFaceConnector
from avp.identity import identity_to_json

from .serving import checkpoint, serving


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Checkpoints: one, a copy of it, one of other weights, and that with another tokenizer."""
    folder = tmp_path_factory.mktemp("models")
    checkpoint(folder / "one")
    checkpoint(folder / "copy")
    checkpoint(folder / "other", seed=1)
    checkpoint(folder / "foreign", seed=1, more_tokens=("zebra",))
    return {path.name: str(path) for path in folder.iterdir()}


def run(*arguments: str) -> Result:
    shown = CliRunner().invoke(cli, ["explain", *arguments], catch_exceptions=False)
    assert shown.exit_code == 0, shown.output
    return shown


def told(*arguments: str) -> tuple[dict[str, dict[str, object]], dict[str, object]]:
    """The verdicts by mode, and the whole document."""
    document = json.loads(run(*arguments, "--json").stdout)
    return {each["mode"]: each for each in document["modes"]}, document


def test_between_equal_weights_kv_goes_over_exactly(models: dict[str, str]) -> None:
    modes, document = told(models["one"], models["copy"])
    assert document["taken"] == "kv"
    assert document["tokens"] == 1000
    kv = modes["kv"]
    assert (kv["possible"], kv["reason"], kv["exactness"], kv["codec"]) == (True, "", "exact", "raw")
    assert kv["bytes"] == 1000 * 4 * 2 * 2 * 16 * 4
    for rate, seconds in zip((1, 10, 100), kv["seconds"].values(), strict=True):
        assert seconds == pytest.approx(kv["bytes"] * 8 / (rate * 1e9))


def test_between_other_weights_nothing_is_exact_and_that_is_an_answer(models: dict[str, str]) -> None:
    modes, document = told(models["one"], models["other"])
    assert document["taken"] is None
    assert not any(mode["possible"] for mode in modes.values())
    assert modes["kv"]["reason"].startswith("other weights: ")
    assert modes["tokens"]["reason"].endswith("accepts exact, this would be text")
    shown = run(models["one"], models["other"])
    assert "taken: none" in shown.stdout
    assert "other weights" in shown.stdout
    assert "--accept text" in shown.stderr


def test_with_an_equal_tokenizer_ids_go_over_where_text_will_do(models: dict[str, str]) -> None:
    modes, document = told(models["one"], models["other"], "--accept", "text", "--tokens", "10")
    assert document["taken"] == "tokens"
    assert modes["tokens"]["bytes"] == 40
    assert modes["text"]["possible"]
    shown = run(models["one"], models["other"], "--accept", "text")
    assert "taken: tokens, text" in shown.stdout
    assert "s + prefill" in shown.stdout


def test_with_another_tokenizer_only_text_goes_over(models: dict[str, str]) -> None:
    modes, document = told(models["one"], models["foreign"], "--accept", "text")
    assert document["taken"] == "text"
    assert modes["tokens"]["reason"] == "other tokenizers"


def test_the_fastest_mode_depends_on_bandwidth_and_on_how_fast_b_computes(models: dict[str, str]) -> None:
    pair = (models["one"], models["copy"], "--accept", "text", "--policy", "fastest", "--prefill", "100000")
    assert told(*pair, "--bandwidth", "10")[1]["taken"] == "kv"
    _, slow = told(*pair, "--bandwidth", "0.01")
    assert slow["taken"] == "tokens"
    assert "fastest: tokens in" in " ".join(map(str, slow["reasons"]))


def test_no_weights_are_loaded_once_the_fingerprint_is_noted(models: dict[str, str]) -> None:
    identity = HuggingFaceConnector.from_pretrained(models["one"]).identity
    shown = run(models["one"], models["one"], "--json")
    assert "loading" not in shown.stderr
    assert json.loads(shown.stdout)["a"]["model"] == identity_to_json(identity)
    checkpoint(Path(models["copy"]), seed=3)
    changed = run(models["one"], models["copy"])
    assert "loading" in changed.stderr
    assert "taken: none" in changed.stdout
    checkpoint(Path(models["copy"]))


def test_a_saved_context_goes_to_equal_weights_and_a_file_takes_anything(
    models: dict[str, str], tmp_path: Path
) -> None:
    file = tmp_path / "context.avp"
    context = HuggingFaceConnector.from_pretrained(models["one"]).prefill("The planner plans.")
    context.save(file)
    _, document = told(str(file), models["copy"])
    assert (document["taken"], document["tokens"]) == ("kv", len(context.tokens))
    assert told(str(file), models["other"])[1]["taken"] is None
    assert told(models["one"], str(tmp_path / "new.avp"))[1]["taken"] == "kv"
    assert told(models["one"], f"file:{tmp_path}/new.avp")[1]["taken"] == "kv"


def test_an_agent_says_itself_what_it_takes(models: dict[str, str], tmp_path: Path) -> None:
    url = f"unix:{tmp_path}/a.sock"
    with serving("--model", models["other"], "--accept", "text", "--name", "solver", "--listen", url):
        shown = run(models["other"], url)
        refused = run(models["one"], url, "--accept", "text")
    assert "agent, solver" in shown.stdout
    assert "taken: kv, exact, codec raw" in shown.stdout
    assert "taken: tokens, text" in refused.stdout
    assert "prefill" not in refused.stdout  # its rate is known


def test_a_name_that_is_nothing_is_an_error() -> None:
    shown = CliRunner().invoke(cli, ["explain", "/nowhere/at-all", "smollm2"])
    assert type(shown.exception).__name__ == "ModelNotFound"
