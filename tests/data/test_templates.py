"""Chat templates of many kinds: the assistant's text is found in them, or they are refused with the reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from chat_templates import (
    BRACKETS,
    CHATML,
    CHATML_MARKED,
    END_OF_TEXT,
    FORGETFUL,
    LAST_ONLY,
    NO_END,
    SPECIAL,
    THINKING,
    TOOL_CHATML,
    long_talk,
)
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from loopos.config.diagnostics import UserError
from loopos.data.conversations import Message
from loopos.data.templates import ChatTemplate, TemplateRefusal, plain_template

ASKED, SAID = Message("user", "why"), Message("assistant", "because ")
MORE, LAST = Message("user", "and then"), Message("assistant", "nothing")
CHAIN = Message("assistant", "<think>\nit is so\n</think>\n42")


@pytest.fixture(scope="module")
def tokenizer(pico_tokenizer: Path) -> PreTrainedTokenizerBase:
    opened = AutoTokenizer.from_pretrained(pico_tokenizer)
    opened.add_tokens(SPECIAL, special_tokens=True)
    return opened


def opened(tokenizer: PreTrainedTokenizerBase, template: str | None) -> ChatTemplate:
    tokenizer.chat_template = template
    return ChatTemplate(tokenizer)


def turns(template: ChatTemplate, *messages: Message) -> list[str]:
    return [piece.text for piece in template.segments(messages) if piece.message is not None]


@pytest.mark.parametrize(
    ("source", "end", "expected", "before"),
    [
        (CHATML, "<|im_end|>", ["because <|im_end|>", "nothing<|im_end|>"], "<|im_start|>assistant\n"),
        (BRACKETS, " <eos>", [" because  <eos>", " nothing <eos>"], " [/INST]"),
        (END_OF_TEXT, "<|end|>", ["because <|end|>", "nothing<|end|>"], "<|assistant|>\n"),
        (THINKING, "<|im_end|>", ["because <|im_end|>", "nothing<|im_end|>"], "<|im_start|>assistant\n"),
        (None, "<eos>", ["because <eos>", "nothing<eos>"], "### Assistant:\n"),
    ],
)
def test_turns_and_their_end_tokens(
    tokenizer: PreTrainedTokenizerBase, source: str | None, end: str, expected: list[str], before: str
) -> None:
    template = opened(tokenizer, source)
    messages = [ASKED, SAID, MORE, LAST]
    pieces = template.segments(messages)
    assert template.end == end
    assert [piece.text for piece in pieces if piece.message is not None] == expected
    assert [piece.message for piece in pieces if piece.message is not None] == [1, 3]
    assert not any(piece.closes for piece in pieces)
    assert pieces[0].text.endswith(before)
    assert pieces[2].text.endswith(before)
    conversation = [message.as_template() for message in messages]
    whole = tokenizer.apply_chat_template(conversation, chat_template=template.source, tokenize=False)
    assert "".join(piece.text for piece in pieces) == whole
    assert template.prompt(messages[:3]) == pieces[:3]
    assert template.prompt(messages[:1]) == pieces[:1]


def test_without_an_end_token_the_tokenizer_s_own_closes_each_turn(tokenizer: PreTrainedTokenizerBase) -> None:
    template = opened(tokenizer, NO_END)
    pieces = template.segments([ASKED, Message("assistant", "because"), MORE, LAST])
    assert [(piece.text, piece.closes) for piece in pieces] == [
        ("user: why\nassistant: ", False), ("because", True), ("\nuser: and then\nassistant: ", False),
        ("nothing", True), ("\n", False),
    ]  # fmt: skip
    assert template.stop_tokens == (tokenizer.eos_token_id,)


def test_the_tokens_that_end_a_turn(tokenizer: PreTrainedTokenizerBase) -> None:
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert opened(tokenizer, CHATML).stop_tokens == tuple(sorted([tokenizer.eos_token_id, end]))
    assert opened(tokenizer, BRACKETS).stop_tokens == (tokenizer.eos_token_id,)


def test_reasoning_that_a_template_sets_apart_is_learned(tokenizer: PreTrainedTokenizerBase) -> None:
    template = opened(tokenizer, THINKING)
    assert turns(template, ASKED, CHAIN) == ["<think>\nit is so\n</think>\n\n42<|im_end|>"]
    with pytest.raises(TemplateRefusal, match="leaves out part of an assistant message") as caught:
        template.segments([ASKED, CHAIN, MORE, LAST])
    assert "one row for each turn" in caught.value.hint


def test_a_template_that_forgets_reasoning_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    template = opened(tokenizer, FORGETFUL)
    assert turns(template, ASKED, LAST) == ["nothing<|im_end|>"]
    with pytest.raises(TemplateRefusal, match="leaves out part") as caught:
        template.segments([ASKED, CHAIN])
    assert 'data.chat_template to "plain"' in caught.value.hint


def test_a_template_that_rewrites_earlier_text_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    template = opened(tokenizer, LAST_ONLY)
    with pytest.raises(TemplateRefusal, match="changes earlier text when messages follow: '1:") as caught:
        template.segments([ASKED, LAST])
    assert caught.value.hint


def test_a_template_s_refusal_is_reported(tokenizer: PreTrainedTokenizerBase) -> None:
    template = opened(tokenizer, BRACKETS)
    with pytest.raises(TemplateRefusal, match="refuses messages of system, user, assistant: no system here"):
        template.segments([Message("system", "be kind"), ASKED, LAST])


def test_templates_run_in_the_sandbox(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(UserError, match=r"unsafe|refuses"):
        opened(tokenizer, "{{ messages.__class__.__base__.__subclasses__() }}")


@pytest.mark.parametrize(
    "source", ["no messages at all", "{{ messages[0]['content'] }}", "{% broken", "{{ nothing.at.all }}"]
)
def test_templates_that_cannot_be_used(tokenizer: PreTrainedTokenizerBase, source: str) -> None:
    with pytest.raises(UserError, match=r'set data\.chat_template to "plain" or to a file'):
        opened(tokenizer, source)


def test_a_template_may_be_chosen(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    tokenizer.chat_template = CHATML
    assert ChatTemplate(tokenizer).summary == "chat template: the tokenizer's own"
    plain = ChatTemplate(tokenizer, "plain")
    assert turns(plain, ASKED, LAST) == ["nothing<eos>"]
    assert "plain" in plain.summary
    file = tmp_path / "own.jinja"
    file.write_text(NO_END)
    assert ChatTemplate(tokenizer, str(file)).summary == f"chat template: {file}"
    with pytest.raises(UserError, match=r'expected "auto", "plain" or a file with a Jinja template'):
        ChatTemplate(tokenizer, str(tmp_path / "none.jinja"))
    dated = tmp_path / "dated.jinja"
    dated.write_text("{{ strftime_now('%d %b %Y') }}\n" + CHATML)
    assert "the date of the run" in ChatTemplate(tokenizer, str(dated)).summary


def test_the_plain_template_stored_in_a_tokenizer_renders_the_same(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = plain_template(tokenizer)
    conversation = [message.as_template() for message in (Message("system", "s"), ASKED, LAST)]
    assert tokenizer.apply_chat_template(conversation, tokenize=False) == (
        "### System:\ns\n\n### User:\nwhy\n\n### Assistant:\nnothing<eos>\n\n"
    )
    assert ChatTemplate(tokenizer).segments([ASKED, LAST]) == ChatTemplate(tokenizer, "plain").segments([ASKED, LAST])


def test_tool_calls_without_text(tokenizer: PreTrainedTokenizerBase) -> None:
    source = CHATML.replace(
        "message['content'] +",
        "message['content'] + (message['tool_calls'] | tojson if message['tool_calls'] else '') +",
    )
    template = opened(tokenizer, source)
    call = Message("assistant", "", more={"tool_calls": [{"name": "f"}]})
    assert turns(template, ASKED, call, Message("tool", "1"), LAST) == [
        '[{"name": "f"}]<|im_end|>',
        "nothing<|im_end|>",
    ]


class Counted:
    """Counts renderings and the characters they write."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls = self.characters = 0
        rendered = ChatTemplate._rendered

        def counted(template: ChatTemplate, *arguments: Any, prompting: bool) -> str:
            text = rendered(template, *arguments, prompting=prompting)
            self.calls, self.characters = self.calls + 1, self.characters + len(text)
            return text

        monkeypatch.setattr(ChatTemplate, "_rendered", counted)


def written(
    tokenizer: PreTrainedTokenizerBase, template: ChatTemplate, messages: list[Message], prompting: bool
) -> str:
    """What transformers renders."""
    conversation = [message.as_template() for message in messages]
    text = tokenizer.apply_chat_template(
        conversation, chat_template=template.source, tokenize=False, add_generation_prompt=prompting
    )
    assert isinstance(text, str)
    return text


@pytest.mark.parametrize("source", [CHATML, CHATML_MARKED, BRACKETS, END_OF_TEXT, NO_END, TOOL_CHATML, THINKING, None])
def test_turns_begin_where_generation_starts_from(tokenizer: PreTrainedTokenizerBase, source: str | None) -> None:
    """Each turn's start, found without rendering, is that of the rendering of the messages before it."""
    tokenizer.chat_template = source
    template = ChatTemplate(tokenizer)
    tool = [
        Message("assistant", "", more={"tool_calls": [{"function": {"name": "f", "arguments": {}}}]}),
        Message("tool", "1"),
    ]
    more = tool if source == TOOL_CHATML else []
    messages = [*long_talk(7)[:-1], *long_talk(2)[:1], *more, *long_talk(12)[1:]]
    pieces = template.segments(messages)
    places = [place for place, piece in enumerate(pieces) if piece.message is not None]
    assert len(places) == sum(message.role == "assistant" for message in messages)
    for place in places:
        number = pieces[place].message
        assert number is not None
        before = written(tokenizer, template, messages[:number], True)
        assert "".join(piece.text for piece in pieces[:place]) == before
    assert "".join(piece.text for piece in pieces) == written(tokenizer, template, messages, False)


def test_ten_thousand_turns_are_rendered_three_times(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer.chat_template = CHATML
    template, counted = ChatTemplate(tokenizer), Counted(monkeypatch)
    messages = long_talk(10_000)
    pieces = template.segments(messages)
    whole = sum(len(piece.text) for piece in pieces)
    assert sum(piece.message is not None for piece in pieces) == 5000
    assert counted.calls <= 3
    assert counted.characters <= 3 * whole
    counted.calls = counted.characters = 0
    template.prompt(messages[:-1])
    assert counted.calls <= 4
