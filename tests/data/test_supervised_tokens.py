"""Examples to ids and masks: the tokens of each format written out by hand, and the laws that hold for all of them."""

from __future__ import annotations

from pathlib import Path

import hypothesis
import pytest
from chat_templates import CHATML, CHATML_MARKED, SPECIAL, WORD_TEMPLATE, WORDS, word_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from loopos.config.diagnostics import DataError, UserError
from loopos.data.conversations import Conversation, Message
from loopos.data.demonstrations import Demonstration
from loopos.data.reading import DataReport
from loopos.data.rows import Row
from loopos.data.step_format import NAMED_FORMATS, StepFormat
from loopos.data.supervised_rows import Completion, Example, PlainText
from loopos.data.supervised_tokens import (
    OverLength,
    RowPolicy,
    Supervised,
    TrainOn,
    encode_supervised,
    prompt_tokens,
)
from loopos.data.templates import ChatTemplate

THINK, HASHES = NAMED_FORMATS["think"], NAMED_FORMATS["hashes"]
ROW = Row({}, "rows.jsonl", 3, 2)


def encoded(
    tokenizer: PreTrainedTokenizerBase, example: Example, train_on: TrainOn = "assistant", form: StepFormat = THINK
) -> Supervised:
    rows, _ = encode_supervised(tokenizer, [example], step_format=form, train_on=train_on, max_length=None)
    (row,) = rows
    return row


def spelled(row: Supervised) -> str:
    """Tokens as words, those that are learned in brackets: easy to write by hand."""
    marks = zip(row.ids, row.mask, strict=True)
    return " ".join(f"[{_shown(token)}]" if learned else _shown(token) for token, learned in marks)


def _shown(token: int) -> str:
    return {" ": "_", "\n": "/"}.get(WORDS[token], WORDS[token])


SUM = Demonstration("two and two", ("two and two make four",), "4", ROW)
TALK = Conversation(
    (Message("user", "hi"), Message("assistant", "hi there"), Message("user", "how"), Message("assistant", "fine")), ROW
)

# What is learned in each format, by hand: _ is a blank, / a line end, [ ] what is learned.
BY_HAND: list[tuple[str, str | None, Example, TrainOn, StepFormat, str]] = [
    (
        "demonstration, steps inside tags",
        WORD_TEMPLATE, SUM, "assistant", THINK,
        "<|user|> two _ and _ two <|end|> / <|assistant|> "
        "[<think>] [/] [two] [_] [and] [_] [two] [_] [make] [_] [four] [/] [</think>] [/] [4] [<|end|>]",
    ),
    (
        "demonstration, answer alone",
        WORD_TEMPLATE, SUM, "answer", THINK,
        "<|user|> two _ and _ two <|end|> / <|assistant|> "
        "<think> / two _ and _ two _ make _ four / </think> / [4] [<|end|>]",
    ),
    (
        "demonstration, hashes, plain template",
        None, SUM, "assistant", HASHES,
        "### _ User: / two _ and _ two / / ### _ Assistant: / "
        "[two] [_] [and] [_] [two] [_] [make] [_] [four] [/] [####] [_] [4] [<eos>]",
    ),
    (
        "demonstration, hashes, answer alone",
        None, Demonstration("two and two", ("four",), "4", ROW, system="be kind"), "answer", HASHES,
        "### _ System: / be _ kind / / ### _ User: / two _ and _ two / / ### _ Assistant: / "
        "four / [####] [_] [4] [<eos>]",
    ),
    (
        "conversation",
        WORD_TEMPLATE, TALK, "assistant", THINK,
        "<|user|> hi <|end|> / <|assistant|> [hi] [_] [there] [<|end|>] / "
        "<|user|> how <|end|> / <|assistant|> [fine] [<|end|>]",
    ),
    (
        "conversation, plain template",
        None, TALK, "assistant", THINK,
        "### _ User: / hi / / ### _ Assistant: / [hi] [_] [there] [<eos>] / / "
        "### _ User: / how / / ### _ Assistant: / [fine] [<eos>]",
    ),
    (
        "conversation, last answer alone",
        WORD_TEMPLATE, TALK, "answer", THINK,
        "<|user|> hi <|end|> / <|assistant|> hi _ there <|end|> / <|user|> how <|end|> / <|assistant|> "
        "[fine] [<|end|>]",
    ),
    (
        "conversation, all",
        WORD_TEMPLATE, TALK, "all", THINK,
        "<|user|> [hi] [<|end|>] [/] [<|assistant|>] [hi] [_] [there] [<|end|>] [/] "
        "[<|user|>] [how] [<|end|>] [/] [<|assistant|>] [fine] [<|end|>] [/]",
    ),
    (
        "conversation that the assistant opens",
        WORD_TEMPLATE,
        Conversation((Message("assistant", "hi"), Message("user", "hi"), Message("assistant", "how")), ROW),
        "assistant", THINK,
        "<|assistant|> [hi] [<|end|>] / <|user|> hi <|end|> / <|assistant|> [how] [<|end|>]",
    ),
    (
        "conversation, a turn of weight 0, the user's words last",
        WORD_TEMPLATE,
        Conversation(
            (Message("assistant", "hi", 0.0), Message("user", "hi"), Message("assistant", "how"), Message("user", "hi")),
            ROW,
        ),
        "assistant", THINK,
        "<|assistant|> hi <|end|> / <|user|> hi <|end|> / <|assistant|> [how] [<|end|>]",
    ),
    (
        "prompt and completion as messages: the prompt's own answers are context",
        WORD_TEMPLATE,
        Conversation(TALK.messages, ROW, num_prompt=3),
        "assistant", THINK,
        "<|user|> hi <|end|> / <|assistant|> hi _ there <|end|> / <|user|> how <|end|> / <|assistant|> "
        "[fine] [<|end|>]",
    ),
    (
        "prompt and completion as they stand",
        WORD_TEMPLATE, Completion("two and two", " make four", ROW), "assistant", THINK,
        "two _ and _ two [_] [make] [_] [four] [<eos>]",
    ),
    (
        "prompt and completion, all",
        None, Completion("two and two", " make four", ROW), "all", THINK,
        "two [_] [and] [_] [two] [_] [make] [_] [four] [<eos>]",
    ),
    (
        "text",
        WORD_TEMPLATE, PlainText("hi there", ROW), "assistant", THINK,
        "hi [_] [there] [<eos>]",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("name", "template", "example", "train_on", "form", "expected"), BY_HAND)
def test_the_tokens_that_are_learned_by_hand(
    name: str, template: str | None, example: Example, train_on: TrainOn, form: StepFormat, expected: str
) -> None:
    row = encoded(word_tokenizer(template), example, train_on, form)
    assert spelled(row) == expected
    assert row.weights is None
    assert len(row.ids) == len(row.mask)


def test_the_ids_themselves_of_one_row() -> None:
    row = encoded(word_tokenizer(WORD_TEMPLATE), Demonstration("hi", ("how",), "fine", ROW))
    assert row.ids == [4, 21, 6, 7, 5, 9, 7, 23, 7, 10, 7, 24, 6]
    assert row.mask == [False] * 5 + [True] * 8


def test_weights_of_messages_reach_the_tokens() -> None:
    messages = (
        Message("user", "hi"),
        Message("assistant", "hi", 0.5),
        Message("user", "how"),
        Message("assistant", "fine"),
    )
    row = encoded(word_tokenizer(WORD_TEMPLATE), Conversation(messages, ROW))
    assert row.weights == [0.0] * 5 + [0.5, 0.5] + [0.0] * 6 + [1.0, 1.0]
    assert [weight > 0 for weight in row.weights] == row.mask


def with_leading_bos(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 2), ("<eos>", 3)]
    )
    return tokenizer


@pytest.mark.parametrize(
    ("example", "expected"),
    [
        (PlainText("hi", ROW), "<bos> [hi] [<eos>]"),
        (PlainText("<bos>hi<eos>", ROW), "<bos> [hi] [<eos>]"),
        (Completion("hi", "hi", ROW), "<bos> hi [hi] [<eos>]"),
        (Completion("hi", "hi<eos>", ROW), "<bos> hi [hi] [<eos>]"),
        (
            Conversation((Message("user", "hi"), Message("assistant", "hi")), ROW),
            "<bos> ### _ User: / hi / / ### _ Assistant: / [hi] [<eos>]",
        ),
    ],
)
def test_begin_and_end_tokens_come_once(example: Example, expected: str) -> None:
    tokenizer = with_leading_bos(word_tokenizer())
    assert spelled(encoded(tokenizer, example)) == expected


def test_an_end_token_that_is_the_pad_token_is_learned() -> None:
    tokenizer = word_tokenizer()
    tokenizer.pad_token = "<eos>"
    row = encoded(tokenizer, PlainText("hi there", ROW))
    assert (row.ids[-1], row.mask[-1]) == (tokenizer.pad_token_id, True)


def test_a_tokenizer_without_an_end_token_is_refused() -> None:
    tokenizer = word_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="no end token"):
        encoded(tokenizer, PlainText("hi", ROW))


@pytest.fixture(scope="module")
def chatml(pico_tokenizer: Path) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(pico_tokenizer)
    tokenizer.add_tokens(SPECIAL, special_tokens=True)
    tokenizer.chat_template = CHATML
    return tokenizer


TALKS = st.lists(
    st.tuples(st.text("ab \n.é1", min_size=1, max_size=8), st.text("ab \n.é1", min_size=1, max_size=8)).filter(
        lambda pair: bool(pair[0].strip() and pair[1].strip())
    ),
    min_size=1,
    max_size=3,
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(talks=TALKS)
# The template keeps the blank after the second question, which is like the third one otherwise.
@hypothesis.example(talks=[("1", "1"), ("1 ", "1"), ("1", "1")])
def test_masks_equal_those_of_transformers_where_the_template_marks_what_is_generated(
    chatml: PreTrainedTokenizerBase, talks: list[tuple[str, str]]
) -> None:
    roles = ("user", "assistant")
    messages = [Message(role, summary) for talk in talks for role, summary in zip(roles, talk, strict=True)]
    row = encoded(chatml, Conversation(tuple(messages), ROW))
    reference = chatml.apply_chat_template(
        [message.as_template() for message in messages],
        chat_template=CHATML_MARKED,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    # The reference tokenizes the whole text: it may join what we keep apart, so the words are compared, and the ids
    # where no token crosses a border.
    learned = [token for token, is_learned in zip(row.ids, row.mask, strict=True) if is_learned]
    expected = [
        token for token, marked in zip(reference["input_ids"], reference["assistant_masks"], strict=True) if marked
    ]
    assert chatml.decode(learned) == "".join(f"{summary}<|im_end|>" for _, summary in talks)
    if not any(summary[0] in " \n" for _, summary in talks):
        assert learned == expected
        assert [*row.ids, *chatml("\n")["input_ids"]] == reference["input_ids"]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(talks=TALKS, template=st.sampled_from([CHATML, None]), train_on=st.sampled_from(["assistant", "answer"]))
def test_a_prompt_is_what_a_row_of_training_begins_with(
    chatml: PreTrainedTokenizerBase, talks: list[tuple[str, str]], template: str | None, train_on: TrainOn
) -> None:
    chosen = ChatTemplate(chatml, "auto" if template else "plain")
    *earlier, (problem, answer) = talks
    before = [
        Message(role, summary) for talk in earlier for role, summary in zip(("user", "assistant"), talk, strict=True)
    ]
    conversation = Conversation((*before, Message("user", problem), Message("assistant", answer)), ROW)
    examples: list[Example] = [
        conversation,
        Demonstration(problem.strip(), (), answer.strip(), ROW),
        Completion(problem, answer, ROW),
    ]
    rows, _ = encode_supervised(
        chatml, examples, step_format=THINK, train_on=train_on, max_length=None, template=chosen
    )
    assert len(rows) == 3
    for row, example in zip(rows, examples, strict=True):
        end = "<|im_end|>" if template and not isinstance(example, Completion) else "<eos>"
        prompt = prompt_tokens(chatml, example, template=chosen)
        assert row.ids[: len(prompt)] == prompt
        learned = [token for token, is_learned in zip(prompt, row.mask, strict=False) if is_learned]
        is_earlier_learned = train_on == "assistant" and isinstance(example, Conversation)
        assert chatml.decode(learned) == "".join(f"{summary}{end}" for _, summary in earlier if is_earlier_learned)
        summary = chatml.decode(row.ids[len(prompt) :])
        assert summary.endswith(end)
        expected = f"<think>\n</think>\n{answer.strip()}" if isinstance(example, Demonstration) else answer
        assert summary == expected + end
        if train_on == "assistant":
            assert all(row.mask[len(prompt) :])
    assert prompt_tokens(chatml, problem.strip(), template=chosen) == prompt_tokens(
        chatml, examples[1], template=chosen
    )
    assert prompt_tokens(chatml, conversation.messages[:-1], template=chosen) == prompt_tokens(
        chatml, conversation, template=chosen
    )


def test_generation_starts_from_a_text_s_first_tokens() -> None:
    assert prompt_tokens(with_leading_bos(word_tokenizer()), PlainText("hi", ROW)) == [2]
    assert prompt_tokens(word_tokenizer(), PlainText("hi", ROW)) == []


def test_tokenizers_that_mark_beginnings_do_not_mark_those_of_inner_pieces() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<unk>", "<eos>", "▁", "\n", "a", "b", "▁a", "▁b", "#", "U", "s", "e", "r", "A", "i", "t", "n", ":"]
    merges = [("▁", "a"), ("▁", "b")]
    inner = Tokenizer(models.BPE({name: index for index, name in enumerate(names)}, merges, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="<eos>")
    row = encoded(tokenizer, Completion("a", "b b", ROW))
    assert tokenizer.convert_ids_to_tokens(row.ids) == ["▁a", "b", "▁b", "<eos>"]
    assert row.mask == [False, True, True, True]


def test_rows_over_max_length() -> None:
    tokenizer = word_tokenizer()
    short, long = PlainText("hi there", ROW), PlainText("hi hi hi hi", Row({}, "rows.jsonl", 9, 8))
    examples: list[Example] = [short, long, short, short]

    def run(over_length: OverLength, share: float = 0.01) -> tuple[list[Supervised], DataReport]:
        return encode_supervised(
            tokenizer, examples, step_format=THINK, max_length=4, policy=RowPolicy(over_length, share)
        )

    with pytest.raises(DataError, match=r"rows.jsonl:9: row: got 8 tokens; expected at most 4") as caught:
        run("drop")
    assert "1 of 4 rows are over max_length 4, more than data.max_dropped_share (0.01)" in str(caught.value)
    rows, report = run("drop", 0.25)
    assert [row.index for row in rows] == [0, 2, 3]
    assert (report.read, report.used, report.dropped) == (4, 3, {"over max_length": 1})
    rows, report = run("cut")
    assert [len(row.ids) for row in rows] == [4, 4, 4, 4]
    assert spelled(rows[1]) == "hi [_] [hi] [_]"
    assert (report.cut, report.tokens_cut, report.used) == (1, 4, 4)
    with pytest.raises(DataError, match="shorten these rows"):
        run("error")


def test_a_row_without_a_trained_token_is_dropped_and_counted() -> None:
    tokenizer = word_tokenizer(WORD_TEMPLATE)
    silent = Conversation((Message("user", "hi"), Message("assistant", "hi", 0.0)), ROW)
    examples: list[Example] = [TALK, silent, Demonstration("hi hi hi hi hi hi hi", (), "4", ROW)]
    rows, report = encode_supervised(tokenizer, examples, step_format=THINK, max_length=17, policy=RowPolicy("cut"))
    assert [row.index for row in rows] == [0]
    assert (report.read, report.used, report.dropped) == (3, 1, {"no trained token": 2})
    assert report.tokens == len(rows[0].ids) == 17
    assert report.trained_tokens == sum(rows[0].mask) == 6
    assert "3 rows read, 1 used, 2 dropped (no trained token); 17 tokens, 6 trained (35%)" in report.summary()
    with pytest.raises(DataError, match="at least one row with a token to learn"):
        encode_supervised(tokenizer, [silent], step_format=THINK, max_length=None)


def test_rows_that_the_template_refuses() -> None:
    tokenizer = word_tokenizer(WORD_TEMPLATE.replace("{% for", "{% if messages[0]['role'] == 'system' %}"
                                                     "{{ raise_exception('no system') }}{% endif %}{% for", 1))  # fmt: skip
    refused = Conversation((Message("system", "be kind"), *TALK.messages), ROW)
    with pytest.raises(
        DataError, match=r"rows.jsonl:3: messages: got the chat template refuses messages of system"
    ) as e:
        encode_supervised(tokenizer, [TALK, refused], step_format=THINK, max_length=None)
    assert "no system" in str(e.value)
    rows, report = encode_supervised(
        tokenizer, [refused, TALK], step_format=THINK, max_length=None, policy=RowPolicy(on_bad_row="skip")
    )
    assert [row.index for row in rows] == [1]
    assert (report.read, report.used, report.dropped) == (2, 1, {"refused by the chat template": 1})


def test_many_rows_keep_their_positions() -> None:
    tokenizer = word_tokenizer(WORD_TEMPLATE)
    examples: list[Example] = [
        PlainText("hi " * (number % 5 + 1) + "hi", ROW) if number % 3 else TALK for number in range(2100)
    ]
    rows, report = encode_supervised(tokenizer, examples, step_format=THINK, max_length=None)
    assert [row.index for row in rows] == list(range(2100))
    assert [len(row.ids) for row in rows] == [
        17 if number % 3 == 0 else 2 * (number % 5 + 1) + 2 for number in range(2100)
    ]
    assert report.used == 2100
