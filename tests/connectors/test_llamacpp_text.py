"""llama.cpp's tokenizer and chat templates: as transformers has them, and templates that mean harm."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from datetime import datetime
from types import MappingProxyType

import pytest
from jinja2.exceptions import TemplateError

from avp.connectors.chat import Renderer
from avp.context import Turn
from avp.errors import UsageError

from .test_gguf import write_gguf

module = pytest.importorskip("avp.connectors.llamacpp")
LlamaText = pytest.importorskip("avp.connectors.llamacpp_text").LlamaText

STRINGS = (
    "",
    " ",
    "  two  spaces ",
    "\n\n\nlines\n",
    "\ttabs\t\there",
    "The planner plans; the critic reads the plan.",
    "It's 12:30, isn't it? We'll see they've 1,234.56 left -- 100%!",
    "x = [i**2 for i in range(10)]\nprint(f'{x!r}')\n",
    "Größe, naïve, œuvre, São Paulo, Ελλάδα, Россия",
    "你好，世界。こんにちは世界！안녕하세요",  # noqa: RUF001 - as people write it
    "مرحبا بالعالم שלום עולם",
    "emoji: 😀👩‍👩‍👧‍👦🇩🇪 and é combining",
    '<b>tags</b> &amp; {json: [1, 2, {"a": null}]}',
    "007 3.14159 2024-11-24 0x1F 1e-5 ½ ²",
    "ALLCAPS camelCase snake_case kebab-case",
    "a" * 300,
    "…“quotes” ‘single’ — dash",  # noqa: RUF001
    "\u00a0nbsp\u200bzero\ufeffwidth",
    "https://example.org/a?b=c&d=%20#e",
)
CONVERSATION = (
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What are 12 and 30?"},
    {"role": "assistant", "content": "42."},
    {"role": "user", "content": "And again?"},
)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> LlamaText:
    path = write_gguf(tmp_path_factory.mktemp("tiny") / "tiny.gguf")
    return module.LlamaCppConnector.from_pretrained(path, threads=1).tokenizer


def templated(text: LlamaText, template: str) -> LlamaText:
    values = {**text.header.values, "tokenizer.chat_template": template}
    return LlamaText(text.engine, replace(text.header, values=MappingProxyType(values)))


def rendered(text: LlamaText, template: str, **variables: object) -> str:
    return templated(text, template).render(CONVERSATION, tools=None, reply=True, variables=variables)


@pytest.mark.parametrize("string", STRINGS, ids=range(len(STRINGS)))
def test_bytes_go_through_the_tokenizer_and_back(text: LlamaText, string: str) -> None:
    assert text.decode(text.encode(string)) == string


def test_special_tokens_that_are_spelled_out_are_one_id_and_have_no_text(text: LlamaText) -> None:
    ids = text.encode("<|im_start|>a<|im_end|>")
    assert (ids[0], ids[-1], len(ids)) == (1, 2, 3)
    assert text.decode(ids) == "a"


def test_a_template_has_the_functions_and_tokens_that_templates_expect(text: LlamaText) -> None:
    assert rendered(text, "{{ bos_token }}{{ eos_token }}{{ unk_token }}") == "<|im_start|><|im_end|><|endoftext|>"
    assert rendered(text, "{{ messages[0] | tojson }}") == json.dumps(CONVERSATION[0])
    assert rendered(text, "{{ messages[0] | tojson(indent=2) }}") == json.dumps(CONVERSATION[0], indent=2)
    assert re.fullmatch(r"20\d\d", rendered(text, "{{ strftime_now('%Y') }}"))
    assert rendered(text, "{% for m in messages %}{% if loop.index0 == 1 %}{% break %}{% endif %}x{% endfor %}") == "x"
    assert rendered(text, "{{ tools is none }}{{ add_generation_prompt }}{{ mood }}", mood="calm") == "TrueTruecalm"
    assert rendered(text, "{{ strftime_now('%d') }}") == datetime.now().strftime("%d")


@pytest.mark.parametrize(
    "attack",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__.__base__ }}",
        "{{ raise_exception.__globals__.keys() }}",
        "{{ strftime_now.__globals__['sys'].modules }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ messages.append({'role': 'user', 'content': 'x'}) }}",
        "{{ messages[0].update({'content': 'x'}) }}",
        "{% set x = messages[0].__setitem__('content', 'x') %}",
        "{{ '{0.__class__.__init__.__globals__}'.format(raise_exception) }}",
        "{% for i in range(1000000000) %}x{% endfor %}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}{{ os }}",
        "{{ 1 / 0 }}",
        "{{ raise_exception('no') }}",
        "{% for %}",
    ],
)
def test_a_template_that_means_harm_is_refused(text: LlamaText, attack: str) -> None:
    with pytest.raises((TemplateError, TypeError, ValueError)):
        rendered(text, attack)
    turns = [Turn(message) for message in CONVERSATION]
    with pytest.raises(UsageError, match=r"the chat template refuses the conversation: .*Fix:"):
        Renderer(templated(text, attack), 262).text(turns, template={}, reply=True)
    assert CONVERSATION[0] == {"role": "system", "content": "Be brief."}


def test_what_the_sandbox_hides_shows_as_nothing(text: LlamaText) -> None:
    assert rendered(text, "{{ raise_exception.__globals__ }}{{ messages.__class__ }}") == ""


def test_a_model_without_a_template_joins_messages_and_begins_with_its_bos(text: LlamaText) -> None:
    plain = templated(text, "")
    assert plain.chat_template is None
    turns = [Turn(message) for message in CONVERSATION]
    assert Renderer(plain, 262).text(turns, template={}, reply=True) == "Be brief.What are 12 and 30?42.And again?"


@pytest.mark.real
@pytest.mark.parametrize("name", ["smollm2", "gemma3"])
def test_ids_and_texts_are_those_of_transformers(name: str) -> None:
    from transformers import AutoTokenizer

    from avp.connectors import loading

    ours = module.LlamaCppConnector.from_pretrained(name, threads=1, positions=256).tokenizer
    theirs = AutoTokenizer.from_pretrained(loading.resolve(name))
    for string in STRINGS:
        ids = theirs(string, add_special_tokens=False).input_ids
        assert ours.encode(string) == ids, string
        assert ours.encode(string, special=True) == theirs(string).input_ids, string
        decoded = theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert ours.decode(ids) == decoded, string
    assert ours.vocabulary() == tuple(theirs.convert_ids_to_tokens(range(ours.engine.vocabulary)))
    if name == "smollm2":
        for reply in (False, True):
            expected = theirs.apply_chat_template(CONVERSATION, add_generation_prompt=reply, tokenize=False)
            assert ours.render(CONVERSATION, tools=None, reply=reply, variables={}) == expected
            assert ours.encode(expected) == theirs(expected, add_special_tokens=False).input_ids
