"""Chat templates within bounds: as transformers renders them, in linear work, and ended in one line where they go wrong."""

from __future__ import annotations

from pathlib import Path

import chat_templates
import pytest
from chat_templates import CHATML, SPECIAL, long_talk
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from loopos.config.diagnostics import UserError
from loopos.data import template_sandbox, templates
from loopos.data.conversations import Message
from loopos.data.template_sandbox import TemplateFailure, rendered
from loopos.data.templates import ChatTemplate, TemplateRefusal

TOOL = {"type": "function", "function": {"name": "find", "parameters": {"type": "object", "properties": {"é": 1}}}}
TALK = [
    {"role": "user", "content": "why <b> & 'so'"},
    {"role": "assistant", "content": "because", "reasoning_content": "it is so"},
    {"role": "user", "content": "and then"},
    {"role": "assistant", "content": "nothing"},
]


@pytest.fixture(scope="module")
def tokenizer(pico_tokenizer: Path) -> PreTrainedTokenizerBase:
    opened = AutoTokenizer.from_pretrained(pico_tokenizer)
    opened.add_tokens(SPECIAL, special_tokens=True)
    return opened


@pytest.mark.parametrize(
    "source",
    [
        *(getattr(chat_templates, name) for name in dir(chat_templates) if name.isupper() and "{%" in str(getattr(chat_templates, name))),
        "{% for message in messages %}\n  {% if loop.first %}\n{{ message.content | trim }}\n  {% endif %}\n{% endfor %}",
        "{% macro told(m, n=1) %}{{ m.role ~ ': ' ~ m.content ~ '\n' * n }}{% endmacro %}"
        "{% for m in messages %}{{ told(m, n=2) }}{% endfor %}{{ eos_token }}",
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% if m.role != 'user' %}{% continue %}{% endif %}"
        "{% set ns.n = ns.n + 1 %}{{ ns.n }}{{ m.content }}{% if ns.n > 1 %}{% break %}{% endif %}{% endfor %}",
        "{% for m in messages[::-1] %}{{ m.thinking }}{{ m.reasoning_content }}{{ m | tojson(indent=2) }}{% endfor %}",
        "{{ '%s and %d' % ('a', 2) }}{{ '{}'.format(bos_token) }}{{ 2 ** 10 }}{{ 'a-' | center(9) }}{{ dict(a=1).items() | list }}",
        "{% for k, v in tools[0].function.items() if tools %}{{ k }}{{ v }}{% endfor %}",
        "{{ messages | map(attribute='content') | join(', ') }}{{ messages | selectattr('role', 'equalto', 'user') | list | length }}",
    ],
)  # fmt: skip
@pytest.mark.parametrize("prompting", [False, True])
def test_templates_render_as_transformers_renders_them(
    tokenizer: PreTrainedTokenizerBase, source: str, prompting: bool
) -> None:
    expected = tokenizer.apply_chat_template(
        TALK, tools=[TOOL], chat_template=source, tokenize=False, add_generation_prompt=prompting
    )
    tokenizer.chat_template = CHATML
    template = ChatTemplate(tokenizer)
    template.source = template._tool_source = source
    messages = [
        Message(m["role"], m["content"], more={k: v for k, v in m.items() if k == "reasoning_content"}) for m in TALK
    ]
    assert template._rendered(messages, [TOOL], prompting=prompting) == expected


HOSTILE = [
    ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "steps of its loops"),
    ("{% macro f(n) %}{{ f(n - 1) ~ f(n - 1) if n else '' }}{% endmacro %}{{ f(99) }}", "steps of its loops"),
    ("x" * 10_000_000, "it has 10,000,000 characters; expected at most 200,000"),
    ("{{ 1 // 0 }}", "division"),
    ("{{ 1 / 0 }}", "division by zero"),
    ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "calls itself without an end"),
    ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "nested too deeply"),
    ("{{ 10 ** 5000 }}", "a number of 20,000 bits"),
    ("{{ 9 ** (9 ** 9) }}", "bits"),
    ("{% set ns = namespace(n=9) %}{% for i in range(99) %}{% set ns.n = ns.n * ns.n %}{% endfor %}", "bits"),
    ("{{ 'a' * 9999999999 }}", "a text or list of 9,999,999,999"),
    ("{% set ns = namespace(s='a') %}{% for i in range(99) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}", "a text or list"),
    ("{% set ns = namespace(s='a') %}{% for i in range(99) %}{% set ns.s = ns.s + ns.s %}{% endfor %}", "a text or list"),
    ("{{ 'a' | center(999999999) }}", "a number over 1,000,000"),
    ("{{ 'a'.ljust(999999999) }}", "a number over 1,000,000"),
    ("{{ 1 | round(999999999) }}", "a number over 1,000,000"),
    ("{{ '%999999999d' % 1 }}", "a width over 1,000,000"),
    ("{{ '%999999999d' | format(1) }}", "a width over 1,000,000"),
    ("{{ lipsum(99) }}", "'lipsum' is undefined"),
    ("{{ messages[0].role.nothing.more }}", "no attribute 'nothing'"),
    ("{% set ns = namespace(_a=1) %}", "begins with an underscore"),
    ("{{ messages.__class__.__base__ }}", "unsafe"),
    ("{{ messages.append(1) }}", "unsafe"),
    ("{% include 'x' %}", "no loader"),
    ("{% set x = 'a\nb' %}{{ raise_exception(x) }}", "a b"),
]  # fmt: skip


@pytest.mark.parametrize(("source", "piece"), HOSTILE)
def test_a_hostile_template_is_refused_in_one_line(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch, source: str, piece: str
) -> None:
    # The same bound, met sooner.
    monkeypatch.setattr(template_sandbox, "MOST_STEPS", 3_000)
    tokenizer.chat_template = source
    with pytest.raises(UserError) as caught:
        ChatTemplate(tokenizer)
    assert piece in str(caught.value)
    assert "\n" not in str(caught.value)
    assert 'set data.chat_template to "plain" or to a file' in str(caught.value)
    assert len(str(caught.value)) < 500


def test_the_time_of_a_rendering_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_sandbox, "MOST_SECONDS", 0.1)
    source = "{% for a in range(99999) %}{{ range(9999) | list | length }}{% endfor %}"
    with pytest.raises(TemplateFailure, match=r"more than 0\.1 seconds"):
        rendered(source, {})


def test_the_length_of_a_rendering_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_sandbox, "LONGEST_TEXT", 1000)
    with pytest.raises(TemplateFailure, match="it writes more than 1,000 characters"):
        rendered("{% for a in range(11) %}{{ 'a' * 100 }}{% endfor %}", {})
    assert len(rendered("{% for a in range(10) %}{{ 'a' * 100 }}{% endfor %}", {})) == 1000


def test_a_long_template_file_is_not_read_whole(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    file = tmp_path / "long.jinja"
    file.write_text("x" * 10_000_000, encoding="utf-8")
    with pytest.raises(UserError, match="it has 200,001 characters; expected at most 200,000"):
        ChatTemplate(tokenizer, str(file))


def test_a_template_that_must_be_rendered_for_each_turn_has_a_bound(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What stands before an answer names its place, so that no turn shows where another begins.
    tokenizer.chat_template = "{% for m in messages %}{{ m.role + m.content + '<eos>' }}{% if m.role == 'user' %}{{ loop.index ~ ':' }}{% endif %}{% endfor %}"
    template = ChatTemplate(tokenizer)
    assert len(template.segments(long_talk(8))) == 8
    monkeypatch.setattr(templates, "_MOST_PREFIX_CHARACTERS", 50)
    with pytest.raises(TemplateRefusal, match="rendered for each of 4 turns"):
        template.segments(long_talk(8))
