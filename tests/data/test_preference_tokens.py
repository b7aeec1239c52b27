"""Comparisons to ids: those of the same conversation in training and of the prompt in generation; what is too long."""

from __future__ import annotations

from pathlib import Path

import pytest
from chat_templates import BRACKETS, CHATML, NO_END, SPECIAL, WORD_TEMPLATE, word_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from loopos.config.diagnostics import DataError
from loopos.data.conversations import Conversation, Message
from loopos.data.preference_tokens import (
    EncodedComparison,
    encode_comparisons,
    encode_prompts,
)
from loopos.data.preferences import Comparison, Pair
from loopos.data.prompts import Prompt, PromptContent
from loopos.data.reading import DataReport
from loopos.data.rows import Row
from loopos.data.step_format import NAMED_FORMATS
from loopos.data.supervised_rows import Completion
from loopos.data.supervised_tokens import OverLength, RowPolicy, encode_supervised, prompt_tokens
from loopos.data.templates import ChatTemplate

HASHES = NAMED_FORMATS["hashes"]
ROW = Row({}, "rows.jsonl", 3, 2)
ONE = (Pair(0, 1),)


def summary(text: str) -> tuple[Message, ...]:
    return (Message("assistant", text),)


def messages(question: str, *answers: str) -> Comparison:
    return Comparison((Message("user", question),), tuple(map(summary, answers)), ONE, ROW)


def texts(prompt: str, *responses: str, line: int = 3) -> Comparison:
    return Comparison(prompt, responses, ONE, Row({}, "rows.jsonl", line, line - 1))


def encoded(
    tokenizer: PreTrainedTokenizerBase, example: Comparison, template: ChatTemplate | None = None
) -> EncodedComparison:
    rows, _ = encode_comparisons(tokenizer, [example], template=template, max_length=None)
    (row,) = rows
    return row


def test_the_ids_of_one_comparison_by_hand() -> None:
    # <|user|> hi <|end|> \n <|assistant|> and fine <|end|>; kind _ kind <|end|>
    row = encoded(word_tokenizer(WORD_TEMPLATE), messages("hi", "fine", "kind kind"))
    assert row.prompt == [4, 21, 6, 7, 5]
    assert row.responses == [[24, 6], [26, 8, 26, 6]]
    assert (row.pairs, row.index, row.num_tokens) == (ONE, 0, 11)
    # ### _ User: \n hi \n \n ### _ Assistant: \n and fine <eos>; kind <eos>
    plain = encoded(word_tokenizer(), messages("hi", "fine", "kind"))
    assert plain.prompt == [17, 8, 18, 7, 21, 7, 7, 17, 8, 19, 7]
    assert plain.responses == [[24, 3], [26, 3]]
    # how _ kind and _ fine <eos>; _ kind <eos>; _ fine _ hi <eos>: no template touches a text
    text = encoded(word_tokenizer(WORD_TEMPLATE), texts("how kind", " fine", " kind", " fine hi"))
    assert text.prompt == [23, 8, 26]
    assert text.responses == [[8, 24, 3], [8, 26, 3], [8, 24, 8, 21, 3]]


def test_a_response_of_several_turns_ends_with_the_last() -> None:
    turns = (Message("assistant", "hi"), Message("tool", "4"), Message("assistant", "fine"))
    tokenizer = word_tokenizer(
        WORD_TEMPLATE.replace(
            "'<|' + message['role'] + '|>'", "'<|' + ('user' if message['role'] == 'tool' else message['role']) + '|>'"
        )
    )
    row = encoded(tokenizer, Comparison((Message("user", "how"),), (turns, summary("kind")), ONE, ROW))
    assert row.prompt == [4, 23, 6, 7, 5]
    assert row.responses == [[21, 6, 7, 4, 16, 6, 7, 5, 24, 6], [26, 6]]
    # hi <|end|> and fine <|end|> count, \n <|user|> 4 <|end|> \n <|assistant|> between them do not.
    assert row.masks == [[True] * 2 + [False] * 6 + [True] * 2, [True] * 2]
    assert [list(row.counted(number)) for number in (0, 1)] == [[0, 1, 8, 9], [0, 1]]
    assert encoded(tokenizer, messages("how", "fine", "kind")).masks is None


@pytest.fixture(scope="module")
def pico(pico_tokenizer: Path) -> PreTrainedTokenizerBase:
    """The pico tokenizer, with the marks of templates and a begin token before every text."""
    tokenizer = AutoTokenizer.from_pretrained(pico_tokenizer)
    tokenizer.add_tokens(SPECIAL, special_tokens=True)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return tokenizer


WORDS = st.text("ab \n.é1", min_size=1, max_size=8).filter(lambda text: bool(text.strip()))
TEMPLATES = {"chatml": CHATML, "brackets": BRACKETS, "no end": NO_END, "plain": None}
END = {"chatml": "<|im_end|>", "brackets": "<eos>", "no end": "<eos>", "plain": "<eos>"}


def chosen(tokenizer: PreTrainedTokenizerBase, name: str) -> ChatTemplate:
    tokenizer.chat_template = TEMPLATES[name]
    return ChatTemplate(tokenizer)


@pytest.mark.parametrize("name", TEMPLATES)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    talk=st.lists(st.tuples(WORDS, WORDS), max_size=2),
    question=WORDS,
    answers=st.lists(WORDS, min_size=2, max_size=3, unique_by=str.strip),
)
def test_ids_are_those_of_training_and_generation(
    pico: PreTrainedTokenizerBase, name: str, talk: list[tuple[str, str]], question: str, answers: list[str]
) -> None:
    template = chosen(pico, name)
    roles = ("user", "assistant")
    before = [Message(role, text) for turn in talk for role, text in zip(roles, turn, strict=True)]
    prompt = (*before, Message("user", question))
    spoken = encoded(pico, Comparison(prompt, tuple(map(summary, answers)), ONE, ROW), template)
    text = encoded(pico, Comparison(question, tuple(answers), ONE, ROW), template)
    talks = [Conversation((*prompt, *summary(answer)), ROW, num_prompt=len(prompt)) for answer in answers]
    completions = [Completion(question, answer, ROW) for answer in answers]
    learned, _ = encode_supervised(pico, [*talks, *completions], step_format=HASHES, max_length=None, template=template)
    assert len(learned) == 2 * len(answers)
    whole = [row.prompt + response for row in (spoken, text) for response in row.responses]
    assert whole == [row.ids for row in learned]
    # Of these rows training learns the responses, and nothing else.
    assert [sum(row.mask) for row in learned] == [len(ids) for row in (spoken, text) for ids in row.responses]
    assert spoken.prompt == prompt_tokens(pico, prompt, template=template)
    assert text.prompt == prompt_tokens(pico, completions[0], template=template)
    assert text.prompt[0] == pico.bos_token_id
    ends = [pico.convert_tokens_to_ids(end) for end in (END[name], "<eos>")]
    assert {ids[-1] for ids in spoken.responses} == {ends[0]}
    assert {ids[-1] for ids in text.responses} == {ends[1]}
    assert all(pico.pad_token_id not in ids for ids in whole)
    prompts: list[PromptContent] = [prompt, question]
    asked, report = encode_prompts(pico, [Prompt(words, ROW) for words in prompts], template=template, max_length=None)
    assert asked == [spoken.prompt, text.prompt]
    assert (report.read, report.used, report.lengths) == (2, 2, [len(spoken.prompt), len(text.prompt)])


def test_the_tokenizer_s_own_template_is_the_default(pico: PreTrainedTokenizerBase) -> None:
    template = chosen(pico, "chatml")
    example = messages("why", "so", "no")
    assert encoded(pico, example) == encoded(pico, example, template)
    assert pico.decode(encoded(pico, example).prompt) == "<|im_start|>user\nwhy<|im_end|>\n<|im_start|>assistant\n"
    pico.chat_template = None
    assert pico.decode(encoded(pico, example).prompt) == "<bos>### User:\nwhy\n\n### Assistant:\n"


# Prompts of 1 token; responses of 2 and 3, 2 and 6, 4 and 6, with the end token.
LENGTHS = [texts("hi", "hi", " hi"), texts("hi", "hi", "hi hi hi", line=4), texts("hi", "hi hi", "hi hi kind", line=5)]


def cut_at(max_length: int, over_length: OverLength, share: float = 0.01) -> tuple[list[EncodedComparison], DataReport]:
    return encode_comparisons(
        word_tokenizer(),
        LENGTHS,
        template=None,
        max_length=max_length,
        policy=RowPolicy(over_length, share),
    )


def test_lengths_are_the_prompt_with_its_longest_response() -> None:
    rows, report = cut_at(7, "error")
    assert [[len(ids) for ids in row.responses] for row in rows] == [[2, 3], [2, 6], [4, 6]]
    assert report.lengths == [4, 7, 7]
    assert (report.responses, report.pairs, report.tokens) == (6, 3, 3 + 23)
    assert report.summary() == ("3 rows read, 3 used; 6 responses, 3 pairs, 26 tokens, length 4 to 7, median 7")
    assert report.counts() == {
        "read": 3, "used": 3, "dropped": {}, "responses": 6, "pairs": 3, "tokens": 26, "cut": 0, "tokens_cut": 0,
        "max_length": 7,
    }  # fmt: skip


def test_comparisons_over_max_length_are_dropped_or_an_error() -> None:
    with pytest.raises(
        DataError, match=r"rows.jsonl:4: row: got 7 tokens; expected at most 6 \(max_length\)"
    ) as caught:
        cut_at(6, "drop", 0.5)
    assert "2 of 3 rows are over max_length 6, more than data.max_dropped_share (0.5)" in str(caught.value)
    rows, report = cut_at(6, "drop", 0.67)
    assert [row.index for row in rows] == [0]
    assert (report.read, report.used, report.dropped) == (3, 1, {"over max_length": 2})
    assert "1 used, 2 dropped (over max_length)" in report.summary()
    with pytest.raises(DataError, match=r"rows.jsonl:5: row: got 7 tokens"):
        cut_at(6, "error")
    with pytest.raises(DataError, match="at least one row that fits"):
        cut_at(3, "drop", 1.0)


def test_responses_are_cut_at_their_end() -> None:
    rows, report = cut_at(6, "cut")
    assert [row.index for row in rows] == [0, 1, 2]
    assert rows[1].responses == [[21, 3], [21, 8, 21, 8, 21]]
    assert rows[2].responses == [[21, 8, 21, 3], [21, 8, 21, 8, 26]]
    assert (report.cut, report.tokens_cut, report.used, report.dropped) == (2, 2, 3, {})
    assert report.summary().endswith("; 2 cut at 6 (2 tokens lost)")


def test_what_cutting_makes_the_same_is_dropped() -> None:
    rows, report = cut_at(4, "cut")  # hi _ hi <eos> and hi _ hi _ kind <eos> are hi _ hi both
    assert [row.index for row in rows] == [0, 1]
    assert report.dropped == {"two responses of the same tokens": 1}
    assert (report.cut, report.tokens_cut) == (1, 3)


def test_prompts_are_cut_from_the_left() -> None:
    """Prompts of 1 and 5 tokens, responses of at most 3: the last 2 tokens of the second one fit, the third has no room
    for any.
    """
    examples = [
        texts("hi", "hi", " hi"),
        texts("how kind fine", "hi", " hi", line=4),
        texts("hi", "hi", "hi hi hi", line=5),
    ]
    policy = RowPolicy("cut_prompt")
    rows, report = encode_comparisons(word_tokenizer(), examples, template=None, max_length=5, policy=policy)
    assert [(row.prompt, row.responses) for row in rows] == [
        ([21], [[21, 3], [8, 21, 3]]),
        ([8, 24], [[21, 3], [8, 21, 3]]),
    ]
    assert report.dropped == {"responses leave no room for the prompt": 1}
    assert (report.read, report.used, report.cut, report.tokens_cut) == (3, 2, 1, 3)
    assert report.summary().endswith("; 1 prompts cut at 5 (3 tokens lost)")


def test_a_cut_prompt_keeps_the_system_s_message_and_the_begin_token(pico: PreTrainedTokenizerBase) -> None:
    template = chosen(pico, "chatml")
    system, question = Message("system", "ab a"), Message("user", "b a " * 60)
    example = Comparison((system, question), (summary("a"), summary("b b")), ONE, ROW)
    whole = encoded(pico, example, template)
    head = pico("<|im_start|>system\nab a<|im_end|>\n", add_special_tokens=False)["input_ids"]
    assert whole.prompt[: len(head)] == head
    longest = max(map(len, whole.responses))
    size = len(head) + 20 + longest
    (row,), report = encode_comparisons(
        pico, [example], template=template, max_length=size, policy=RowPolicy("cut_prompt")
    )
    assert row.prompt == [*head, *whole.prompt[-20:]]
    assert row.responses == whole.responses
    assert pico.decode(row.prompt).endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert (report.cut, report.tokens_cut) == (1, len(whole.prompt) - len(row.prompt))
    text = Comparison("b a " * 60, ("a", "b b"), ONE, ROW)
    (row,), _ = encode_comparisons(pico, [text], template=template, max_length=20, policy=RowPolicy("cut_prompt"))
    uncut = encoded(pico, text, template)
    room = 20 - max(map(len, uncut.responses))
    assert row.prompt == [pico.bos_token_id, *uncut.prompt[1 - room :]]


def test_a_text_far_over_the_length_is_cut_from_its_true_end(pico: PreTrainedTokenizerBase) -> None:
    """Texts of more than 131,072 characters are shortened elsewhere, but here their end is what is kept."""
    text = Comparison("a " * 70_000 + "b é1", ("a", "b"), ONE, ROW)
    (row,), report = encode_comparisons(pico, [text], template=None, max_length=12, policy=RowPolicy("cut_prompt"))
    assert pico.decode(row.prompt, skip_special_tokens=True).endswith("b é1")
    assert (report.cut, report.shortened) == (1, 0)


def test_a_prompt_that_leaves_no_room_is_dropped() -> None:
    examples = [texts("hi", "hi", " hi"), texts("hi hi", "hi", "kind", line=4)]
    rows, report = encode_comparisons(word_tokenizer(), examples, template=None, max_length=3, policy=RowPolicy("cut"))
    assert [row.index for row in rows] == [0]
    assert (report.read, report.used, report.dropped) == (2, 1, {"prompt over max_length": 1})
    assert rows[0].responses == [[21, 3], [8, 21]]


def test_responses_that_a_template_makes_the_same_are_dropped() -> None:
    tokenizer = word_tokenizer(WORD_TEMPLATE.replace("message['content']", "message['content'].strip()"))
    examples = [messages("how", "fine", "kind"), messages("how", "<think>", "<think>\n")]
    rows, report = encode_comparisons(tokenizer, examples, template=None, max_length=None)
    assert [row.index for row in rows] == [0]
    assert report.dropped == {"two responses of the same tokens": 1}


def test_rows_that_the_template_refuses() -> None:
    tokenizer = word_tokenizer(
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + WORD_TEMPLATE
    )
    refused = Comparison(
        (Message("system", "be kind"), Message("user", "hi")), (summary("hi"), summary("fine")), ONE, ROW
    )
    examples = [refused, messages("how", "fine", "kind")]
    with pytest.raises(DataError, match=r"rows.jsonl:3: messages: got the chat template refuses messages of system"):
        encode_comparisons(tokenizer, examples, template=None, max_length=None)
    rows, report = encode_comparisons(
        tokenizer, examples, template=None, max_length=None, policy=RowPolicy(on_bad_row="skip")
    )
    assert [row.index for row in rows] == [1]
    assert report.dropped == {"refused by the chat template": 1}
    prompts = [Prompt(example.prompt, ROW) for example in examples]
    with pytest.raises(DataError, match="no system"):
        encode_prompts(tokenizer, prompts, template=None, max_length=None)
    asked, counted = encode_prompts(
        tokenizer, prompts, template=None, max_length=None, policy=RowPolicy(on_bad_row="skip")
    )
    assert asked == [[4, 23, 6, 7, 5]]
    assert (counted.read, counted.used, counted.dropped) == (2, 1, {"refused by the chat template": 1})


def test_prompts_over_max_length_are_never_cut() -> None:
    prompts = [Prompt("hi hi", ROW), Prompt("hi hi hi", Row({}, "rows.jsonl", 9, 8)), Prompt("hi", ROW)]

    def run(over_length: OverLength, share: float = 0.01) -> tuple[list[list[int]], DataReport]:
        return encode_prompts(
            word_tokenizer(), prompts, template=None, max_length=3, policy=RowPolicy(over_length, share)
        )

    for rows, report in (run("cut"), run("drop", 0.5)):
        assert rows == [[21, 8, 21], [21]]
        assert (report.read, report.used, report.dropped) == (3, 2, {"prompt over max_length": 1})
        assert report.summary() == (
            "3 rows read, 2 used, 1 dropped (prompt over max_length); 4 tokens, length 1 to 3, median 3"
        )
    with pytest.raises(DataError, match=r"rows.jsonl:9: row: got 5 tokens; expected at most 3"):
        run("drop")
    with pytest.raises(DataError, match="shorten these rows"):
        run("error")


def test_many_rows_keep_their_positions() -> None:
    examples = [
        messages("hi", "fine", "kind") if number % 3 else texts("hi" * (number % 2) + "how", "fine", " kind")
        for number in range(2100)
    ]
    rows, report = encode_comparisons(word_tokenizer(WORD_TEMPLATE), examples, template=None, max_length=None)
    assert [row.index for row in rows] == list(range(2100))
    assert [row.responses for row in rows] == [
        [[24, 6], [26, 6]] if number % 3 else [[24, 3], [8, 26, 3]] for number in range(2100)
    ]
    assert report.used == 2100
