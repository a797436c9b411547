"""The chain of agents: what each mode computes, counted; that exact means equal; the document that it writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from avp.bench import chain, latent
from avp.bench.baseline import Conversation
from avp.bench.results import Run, Settings, interval, summarize, wilson
from avp.connectors.huggingface import HuggingFaceConnector
from avp.errors import UsageError
from avp.testing.tiny import ALTERNATING, CHATML, tiny_connector, tiny_model, tiny_tokenizer

QUESTION = "Take 12 apples and 7 pears. How many are they?"


@pytest.fixture(scope="module")
def runs() -> list[Run]:
    return chain.run_chain(tiny_connector(), QUESTION, agents=4, settings=Settings("tiny", 10, 5, fixed_length=True))


def of(runs: list[Run], mode: str) -> Run:
    return next(run for run in runs if run.mode == mode)


def test_the_exact_relays_tokens_are_those_of_text_with_a_prefix_cache(runs: list[Run]) -> None:
    exact, prefix = of(runs, "exact"), of(runs, "prefix")
    assert exact.same_as_prefix is True
    assert [hop.tokens for hop in exact.hops] == [hop.tokens for hop in prefix.hops]
    assert [hop.text for hop in exact.hops] == [hop.text for hop in prefix.hops]


@pytest.mark.parametrize("template", [CHATML, ALTERNATING, None], ids=["chatml", "alternating", "no template"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_they_are_equal_whatever_the_template_or_family(family: str, template: str | None) -> None:
    settings = Settings("tiny", 9, fixed_length=True, modes=("prefix", "exact"))
    connector = tiny_connector(family, chat_template=template)
    for question in (QUESTION, "The critic reads the plan.", "7 7 7 7 7"):
        found = chain.run_chain(connector, question, agents=5, settings=settings)
        assert of(found, "exact").same_as_prefix is True, question


def test_an_engine_that_differs_is_noticed(runs: list[Run]) -> None:
    other = chain.run_chain(tiny_connector(seed=3), QUESTION, agents=4, settings=Settings("tiny", 10, modes=("exact",)))
    compared = chain._compare([of(runs, "prefix"), *other])
    assert of(compared, "exact").same_as_prefix is False


def test_text_computes_every_prompt_again_and_the_relay_only_what_is_new(runs: list[Run]) -> None:
    text, exact = of(runs, "text"), of(runs, "exact")
    assert [hop.positions for hop in text.hops] == [hop.prompt_tokens + hop.new_tokens - 1 for hop in text.hops]
    last = text.hops[-1]
    assert exact.positions >= last.prompt_tokens + last.new_tokens - 1
    assert exact.positions < text.positions / 2
    assert exact.hops[0].positions == text.hops[0].positions


def test_every_mode_writes_the_same_number_of_tokens(runs: list[Run]) -> None:
    assert {hop.new_tokens for run in runs if run.mode != "latent" for hop in run.hops} == {10}
    thinkers = of(runs, "latent").hops[:-1]
    assert {(hop.new_tokens, hop.latent_steps) for hop in thinkers} == {(0, 5)}
    assert of(runs, "latent").hops[-1].new_tokens == 10


def test_bytes_handed_over_are_the_states_size(runs: list[Run]) -> None:
    connector = tiny_connector()
    per_token = connector.identity.layout.bytes_per_token("float32")
    exact = of(runs, "exact")
    assert exact.hops[0].bytes == 0
    assert [hop.bytes for hop in exact.hops[1:]] == [hop.kv_bytes for hop in exact.hops[:-1]]
    assert exact.hops[-1].kv_bytes % per_token == 0
    assert of(runs, "text").hops[1].bytes > len(QUESTION)


def test_without_a_fixed_length_turns_end_where_they_end() -> None:
    connector = tiny_connector()
    first = chain.prompts(QUESTION, 3, chat=True)[0]
    free = Conversation(connector.model, connector.tokenizer, reuse=True).say(first, max_new_tokens=8, min_new_tokens=8)
    connector.model.generation_config.eos_token_id = [2, free.tokens[2]]
    found = chain.run_chain(connector, QUESTION, agents=3, settings=Settings("tiny", 8))
    assert of(found, "prefix").hops[0].new_tokens == of(found, "exact").hops[0].new_tokens == 3
    assert of(found, "exact").same_as_prefix is True


def test_a_chain_needs_two_agents() -> None:
    assert chain.roles(2) == ["planner", "solver"]
    assert chain.roles(5) == ["planner", "critic", "refiner", "critic", "solver"]
    with pytest.raises(UsageError, match="at least 2 agents"):
        chain.roles(1)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def test_over_the_wire_each_agent_has_a_process_and_the_tokens_are_the_same(checkpoint: Path) -> None:
    connector = HuggingFaceConnector.from_pretrained(checkpoint)
    settings = Settings(str(checkpoint), 6, 3, fixed_length=True, wire=True, modes=("prefix", "exact"))
    found = chain.run_chain(connector, QUESTION, agents=2, settings=settings)
    exact = of(found, "exact")
    assert exact.same_as_prefix is True
    assert exact.hops[1].bytes > exact.hops[0].kv_bytes  # the bundle's header and its KV
    near = chain.run_chain(connector, QUESTION, agents=2, settings=Settings("", 6, fixed_length=True, modes=("exact",)))
    assert [hop.positions for hop in exact.hops] == [hop.positions for hop in near[0].hops]


def test_the_command_writes_one_document_and_a_plot(checkpoint: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"id": i, "question": f"{QUESTION} {i}"}) + "\n" for i in range(3)))
    options = ["--data", str(data), "--limit", "2", "--agents", "2,3", "--max-new-tokens", "5", "--steps", "2"]
    done = CliRunner().invoke(
        chain.command,
        [*options, "--model", str(checkpoint), "--out", str(tmp_path / "out"), "--json"],
        catch_exceptions=False,
    )
    document = json.loads(done.stdout)
    assert len(document["runs"]) == 2 * 2 * 4
    assert {run["mode"] for run in document["runs"]} == set(chain.MODES)
    for run in document["runs"]:
        assert run["positions"] == sum(hop["positions"] for hop in run["hops"])
        assert len(run["ttft"]) == run["agents"] == len(run["hops"])
        assert run["same_as_prefix"] in ((True,) if run["mode"] == "exact" else (True, False, None))
    saved = {(row["agents"], row["mode"]): row["positions_saved"]["mean"] for row in document["summary"]}
    assert saved[3, "exact"] > saved[2, "exact"] > 0 == saved[2, "text"]
    assert json.loads((tmp_path / "out" / "chain.json").read_text())["runs"] == document["runs"]
    svg = (tmp_path / "out" / "chain-3.svg").read_text()
    assert svg.startswith("<?xml")
    assert "positions computed" in svg
    table = CliRunner().invoke(chain.command, [*options, "--model", str(checkpoint)], catch_exceptions=False)
    assert "2 of 2" in table.stdout


@pytest.mark.parametrize(
    ("row", "agents", "modes"),
    [
        ("not json", "2", "text"),
        ('{"answer": 1}', "2", "text"),
        ("", "2", "text"),
        ('{"question": "x"}', "two", "text"),
        ('{"question": "x"}', "2", "telepathy"),
    ],
)
def test_bad_options_and_data_are_clear_errors(
    row: str, agents: str, modes: str, checkpoint: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text(row)
    with pytest.raises(UsageError):
        CliRunner().invoke(
            chain.command,
            ["--data", str(data), "--agents", agents, "--modes", modes, "--model", str(checkpoint)],
            catch_exceptions=False,
        )


def test_intervals_are_what_statistics_says() -> None:
    low, high = wilson(66, 100)
    assert (round(low, 3), round(high, 3)) == (0.563, 0.745)
    found = interval([0.5] * 8)
    assert (found.mean, found.low, found.high, found.n) == (0.5, 0.5, 0.5, 8)
    wide = interval([0.0, 1.0] * 20)
    assert wide.low < 0.4
    assert wide.high > 0.6
    assert summarize([]) == []


def test_recall_has_its_controls(checkpoint: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(
        latent.command,
        [
            "--model",
            str(checkpoint),
            "--limit",
            "2",
            "--steps",
            "2",
            "--new-tokens",
            "3",
            "--out",
            str(tmp_path),
            "--json",
        ],
        catch_exceptions=False,
    )
    document = json.loads(done.stdout)
    assert [arm["arm"] for arm in document["arms"]] == ["no context", "zero steps", "noise", "norm", "soft", "ridge"]
    assert all(arm["n"] == 2 and arm["hits"] == sum(arm["recalled"]) for arm in document["arms"])
    assert latent.items(5, seed=0) == latent.items(5, seed=0) != latent.items(5, seed=1)
    assert all(item.password in item.prompt and item.password not in item.question for item in latent.items(20, seed=0))
