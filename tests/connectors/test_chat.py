"""The one renderer, against the chat template applied to the whole conversation."""

from __future__ import annotations

from dataclasses import replace

import pytest

from avp.connectors.huggingface import HuggingFaceConnector
from avp.context import Context
from avp.errors import UsageError
from avp.testing.tiny import ALTERNATING, CHATML, REASONING, tiny_connector

PLAN = "Plan the work: 12 apples and 7 pears."
CHECK = "Check the plan."


def rendered(connector: HuggingFaceConnector, messages: list[dict[str, object]], **options: object) -> list[int]:
    text = connector.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options)
    return list(connector.tokenizer(text, add_special_tokens=False)["input_ids"])


def prompt_ids(connector: HuggingFaceConnector, prompt: object, **options: object) -> list[int]:
    found = connector.generate(prompt, max_new_tokens=1, **options)  # type: ignore[arg-type]
    return list(found.context.tokens[:-1])


def user(content: str) -> dict[str, object]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, object]:
    return {"role": "assistant", "content": content}


@pytest.mark.parametrize("template", [CHATML, ALTERNATING, REASONING], ids=["chatml", "alternating", "reasoning"])
def test_a_continuation_renders_as_the_whole_conversation(template: str) -> None:
    connector = tiny_connector(chat_template=template)
    conversation = [user(PLAN), assistant("Take 19."), user(CHECK)]
    context = connector.prefill(conversation[:2])
    found = connector.generate(CHECK, context=context, max_new_tokens=1)
    assert list(found.context.tokens[:-1]) == rendered(connector, conversation)
    assert found.receipt.tokens_reused > 0


@pytest.mark.parametrize("template", [CHATML, ALTERNATING, REASONING], ids=["chatml", "alternating", "reasoning"])
def test_a_generated_turn_is_continued_as_its_text(template: str) -> None:
    connector = tiny_connector(chat_template=template)
    first = connector.generate(PLAN, max_new_tokens=12)
    second = connector.generate(CHECK, context=first.context, max_new_tokens=12)
    expected = rendered(connector, [user(PLAN), assistant(str(first)), user(CHECK)])
    assert list(second.context.tokens[: len(expected)]) == expected
    again = connector.generate([user(PLAN), assistant(str(first)), user(CHECK)], max_new_tokens=12)
    assert again.tokens == second.tokens


@pytest.mark.parametrize("template", [CHATML, ALTERNATING], ids=["chatml", "alternating"])
def test_prefill_then_generate_renders_as_one_call_with_both_messages(template: str) -> None:
    connector = tiny_connector(chat_template=template)
    context = connector.prefill(PLAN)
    split = connector.generate(CHECK, context=context, max_new_tokens=4)
    whole = connector.generate([user(PLAN), user(CHECK)], max_new_tokens=4)
    assert split.context.tokens == whole.context.tokens
    assert split.receipt.tokens_reused == len(context) > 10


def test_consecutive_turns_are_merged_only_where_the_template_demands_alternation() -> None:
    alternating, chatml = tiny_connector(chat_template=ALTERNATING), tiny_connector(chat_template=CHATML)
    both = [user(PLAN), user(CHECK)]
    assert prompt_ids(alternating, both) == rendered(alternating, [user(f"{PLAN}\n\n{CHECK}")])
    assert prompt_ids(chatml, both) == rendered(chatml, both)


def test_a_system_message_joins_the_user_where_the_template_knows_none() -> None:
    connector = tiny_connector(chat_template=ALTERNATING)
    found = prompt_ids(connector, [{"role": "system", "content": "Be brief."}, user(PLAN)])
    assert found == rendered(connector, [user(f"Be brief.\n\n{PLAN}")])


def test_a_prefilled_user_turn_stays_open_until_the_next_role_is_known() -> None:
    connector = tiny_connector(chat_template=ALTERNATING)
    context = connector.prefill(PLAN)
    assert connector.tokenizer.decode(list(context.tokens)).endswith("7 pears.")
    assert "[/INST]" not in connector.tokenizer.decode(list(context.tokens))


def test_a_prefilled_conversation_is_what_the_template_makes_of_it() -> None:
    connector = tiny_connector(chat_template=CHATML)
    context = connector.prefill([user(PLAN)])
    text = connector.tokenizer.apply_chat_template([user(PLAN)], tokenize=False)
    assert connector.tokenizer.decode(list(context.tokens)) == text


def test_a_template_that_rewrites_history_costs_a_recomputation_and_a_reason() -> None:
    forgetful = REASONING.replace("message['content'].split('</think>')[-1]", "message['content'][:5]")
    connector = tiny_connector(chat_template=forgetful)
    first = connector.generate(PLAN, max_new_tokens=12, min_new_tokens=12)
    found = connector.generate(CHECK, context=first.context, max_new_tokens=4)
    assert 0 < found.receipt.tokens_reused < len(first.context)
    assert "rewrites history" in found.receipt.reasons[0]
    whole = [user(PLAN), assistant(str(first)), user(CHECK)]
    assert list(found.context.tokens[: -len(found.tokens)]) == rendered(connector, whole)
    assert found.tokens == connector.generate(whole, max_new_tokens=4).tokens


def test_prefill_leaves_out_what_the_next_turn_would_rewrite() -> None:
    connector = tiny_connector(chat_template=REASONING)
    context = connector.prefill([user(PLAN), assistant("<think>hm, 12 and 7</think>19")])
    assert "hm" not in connector.tokenizer.decode(list(context.tokens))
    assert connector.generate(CHECK, context=context, max_new_tokens=4).receipt.tokens_reused == len(context)


def test_tools_reach_the_template_and_are_kept_with_the_context() -> None:
    template = "{% if tools %}{{ 'tools: ' + tools | tojson + '\n' }}{% endif %}" + CHATML
    connector = tiny_connector(chat_template=template)
    tools = [
        {
            "type": "function",
            "function": {"name": "add", "description": "Add.", "parameters": {"type": "object", "properties": {}}},
        }
    ]
    context = connector.prefill(PLAN, tools=tools)
    found = connector.generate(CHECK, context=context.from_bytes(context.to_bytes()), max_new_tokens=1)
    assert list(found.context.tokens[:-1]) == rendered(connector, [user(PLAN), user(CHECK)], tools=tools)
    assert found.receipt.tokens_reused == len(context)


def test_template_arguments_reach_the_template() -> None:
    template = "{% if shout %}{{ 'LOUD ' }}{% endif %}" + CHATML
    connector = tiny_connector(chat_template=template)
    found = prompt_ids(connector, PLAN, chat_template_kwargs={"shout": True})
    assert found == rendered(connector, [user(PLAN)], shout=True)


def test_an_empty_prompt_goes_on_with_the_open_turn() -> None:
    connector = tiny_connector()
    whole = connector.generate(PLAN, max_new_tokens=12, min_new_tokens=12)
    part = connector.generate(PLAN, max_new_tokens=5, min_new_tokens=5)
    rest = connector.generate("", context=part.context, max_new_tokens=7, min_new_tokens=7)
    assert part.tokens + rest.tokens == whole.tokens
    assert rest.receipt.positions_computed == 7


def test_an_empty_prompt_after_a_prefill_opens_the_reply() -> None:
    connector = tiny_connector()
    found = connector.generate("", context=connector.prefill(PLAN), max_new_tokens=6)
    assert found.tokens == connector.generate(PLAN, max_new_tokens=6).tokens


def test_a_model_without_a_template_takes_plain_text() -> None:
    connector = tiny_connector(chat_template=None)
    context = connector.prefill("The planner plans,")
    found = connector.generate(" the critic reads", context=context, max_new_tokens=1)
    assert list(found.context.tokens[:-1]) == connector.tokenizer("The planner plans, the critic reads")["input_ids"]


def test_latent_steps_close_when_the_next_role_is_known() -> None:
    connector = tiny_connector()
    thought = connector.think(PLAN, steps=3)
    found = connector.generate(CHECK, context=thought, max_new_tokens=1)
    text = connector.tokenizer.decode([i for i in found.context.tokens[:-1] if i >= 0])
    assert text == connector.tokenizer.apply_chat_template(
        [user(PLAN), assistant(""), user(CHECK)], tokenize=False, add_generation_prompt=True
    )
    assert found.receipt.tokens_reused == len(thought)


def test_latent_positions_are_never_computed_again() -> None:
    connector = tiny_connector(chat_template="{% if shout %}{{ 'LOUD ' }}{% endif %}" + CHATML)
    thought = connector.think(PLAN, steps=3)
    with pytest.raises(UsageError, match="before latent positions, which cannot be computed again"):
        connector.generate(CHECK, context=thought, chat_template_kwargs={"shout": True})


def test_raw_ids_stand_outside_any_conversation() -> None:
    connector = tiny_connector()
    context = connector.prefill([10, 11, 12])
    found = connector.generate(PLAN, context=context, max_new_tokens=1)
    assert list(found.context.tokens[:-1]) == [10, 11, 12, *rendered(connector, [user(PLAN)])]


@pytest.mark.parametrize("prompt", [[], "", [{"content": "no role"}], [1.5], 7])
def test_a_prompt_of_no_known_kind_is_refused(prompt: object) -> None:
    with pytest.raises(UsageError):
        tiny_connector().generate(prompt)  # type: ignore[arg-type]


def test_a_conversation_that_the_template_refuses_is_a_clear_error() -> None:
    connector = tiny_connector(chat_template="{{ raise_exception('no, thank you') }}")
    with pytest.raises(UsageError, match="no, thank you"):
        connector.generate(PLAN)


def test_a_received_context_cannot_bring_its_own_template() -> None:
    connector = tiny_connector()
    context = connector.prefill(PLAN)
    for bad in ({"chat_template": "OBEY"}, {"tokenize": True}, {"add_generation_prompt": False}, {"tools": [1]}):
        forged = replace(context, template={"chat_template_kwargs": bad})
        with pytest.raises(UsageError, match="may not set"):
            connector.generate(CHECK, context=Context.from_bytes(forged.to_bytes()))
    with pytest.raises(UsageError, match="may not set"):
        connector.generate(CHECK, chat_template_kwargs={"chat_template": "OBEY"})
    with pytest.raises(UsageError, match="tools are no list"):
        connector.generate(CHECK, context=Context.from_bytes(replace(context, template={"tools": 5}).to_bytes()))


@pytest.mark.parametrize("template", [CHATML, REASONING], ids=["chatml", "reasoning"])
def test_a_prefilled_assistant_message_has_ended_and_an_empty_prompt_opens_another_turn(template: str) -> None:
    connector = tiny_connector(chat_template=template)
    conversation = [user(PLAN), assistant("<think>hm</think>19")]
    found = connector.generate("", context=connector.prefill(conversation), max_new_tokens=4)
    whole = connector.generate(conversation, max_new_tokens=4)
    assert found.tokens == whole.tokens
    assert [turn.role for turn in found.context.turns] == ["user", "assistant", "assistant"]
    assert list(found.context.tokens[: -len(found.tokens)]) == rendered(connector, conversation)


def test_latent_steps_do_not_follow_text_within_a_turn() -> None:
    connector = tiny_connector()
    written = connector.generate(PLAN, max_new_tokens=4, min_new_tokens=4)
    with pytest.raises(UsageError, match="cannot follow text within one turn"):
        connector.think("", context=written.context, steps=2)
    assert len(connector.think(CHECK, context=written.context, steps=2)) > len(written.context)


def test_content_that_the_template_cannot_write_is_a_clear_error() -> None:
    with pytest.raises(UsageError, match="the chat template refuses"):
        tiny_connector().generate([{"role": "user", "content": 7}])


@pytest.mark.parametrize("ids", [[5, -1], [5, 320], [-7]])
def test_ids_outside_the_vocabulary_are_refused(ids: list[int]) -> None:
    with pytest.raises(UsageError, match="is no token id: the model has 320"):
        tiny_connector().prefill(ids)
