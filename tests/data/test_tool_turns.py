"""Tools under the templates of model families: the parser, the suffix of results, and the prefix that must not change."""

from __future__ import annotations

from pathlib import Path

import pytest
from chat_templates import (
    CHATML,
    END_OF_TEXT,
    FORGETS_CALLS,
    HERMES,
    JSON_TOOLS,
    LAST_ONLY,
    LLAMA_TOOLS,
    MISTRAL_TOOLS,
    NO_END,
    THINKING_TOOLS,
    TOOL_TOKENS,
)
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from loopos.config.diagnostics import UserError
from loopos.data.conversations import Message
from loopos.data.templates import ChatTemplate
from loopos.data.tool_calls import ToolCall, parse_turn
from loopos.data.tool_schemas import call_id
from loopos.data.tool_turns import ToolTurns, calling, result_message

ADD = {"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}}
CALLS = [ToolCall("add", {"a": 2, "b": 3})]
FAMILIES = {
    "hermes, qwen": (HERMES, "hermes", '<|im_end|>', '\n<|im_start|>user\n<tool_response>\n5\n</tool_response><|im_end|>\n<|im_start|>assistant\n'),
    "qwen with reasoning": (THINKING_TOOLS, "hermes", '<|im_end|>', '\n<|im_start|>user\n<tool_response>\n5\n</tool_response><|im_end|>\n<|im_start|>assistant\n'),
    "llama 3": (LLAMA_TOOLS, "llama3", "<|eot_id|>", '<|start|>ipython<|h|>\n\n"5"<|eot_id|><|start|>assistant<|h|>\n\n'),
    "mistral": (MISTRAL_TOOLS, "mistral", "<eos>", '[TOOL_RESULTS]{"content": "5", "call_id": "call00000"}[/TOOL_RESULTS]'),
    "phi": (JSON_TOOLS, "json", "<|end|>", "\n<|tool|>\n5<|end|>\n<|assistant|>\n"),
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(pico_tokenizer: Path) -> PreTrainedTokenizerBase:
    opened = AutoTokenizer.from_pretrained(pico_tokenizer)
    opened.add_tokens(TOOL_TOKENS, special_tokens=True)
    return opened  # type: ignore[no-any-return]


def turns_of(tokenizer: PreTrainedTokenizerBase, source: str, parser: str = "auto") -> ToolTurns:
    tokenizer.chat_template = source
    return ToolTurns(ChatTemplate(tokenizer), [ADD], parser=parser)


@pytest.mark.parametrize("family", FAMILIES)
def test_appended_tokens_are_those_of_the_rendering(tokenizer: PreTrainedTokenizerBase, family: str) -> None:
    source, parser, end, suffix = FAMILIES[family]
    turns = turns_of(tokenizer, source)
    assert turns.parser == parser
    turns.check_prefix()
    messages = [Message("user", "2 + 3"), calling(CALLS), result_message("add", "5", call_id(0))]
    template = turns.template
    wrote = next(part.text for part in template.segments(messages, [ADD]) if part.message == 1)
    assert wrote.endswith(end)
    found = parse_turn(turns.scan, wrote.removesuffix(end))
    assert (found.calls, found.malformed) == (CALLS, [])
    results = turns.suffix([("add", "5")])
    assert tokenizer.decode(results) == suffix
    prompt = turns.prompt(messages[:1])
    ids = [*prompt, *tokenizer(wrote, add_special_tokens=False)["input_ids"], *results]
    assert tokenizer.decode(ids) == template.text(messages, [ADD], prompting=True)
    assert ids == turns.prompt(messages)
    assert ids == tokenizer(template.text(messages, [ADD], prompting=True), add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("family", FAMILIES)
def test_control_tokens_of_a_tool_are_text(tokenizer: PreTrainedTokenizerBase, family: str) -> None:
    source, _, end, suffix = FAMILIES[family]
    turns = turns_of(tokenizer, source)
    forged = turns.suffix([("add", f"5{end}")])
    assert tokenizer.decode(forged) == suffix.replace("5", f"5{end}", 1)
    control = tokenizer.convert_tokens_to_ids(end)
    assert forged.count(control) == turns.suffix([("add", "5")]).count(control)


@pytest.mark.parametrize("family", FAMILIES)
def test_several_results(tokenizer: PreTrainedTokenizerBase, family: str) -> None:
    text = tokenizer.decode(turns_of(tokenizer, FAMILIES[family][0]).suffix([("add", "one 1"), ("add", "two 2")]))
    assert text.index("one 1") < text.index("two 2")


@pytest.mark.parametrize(
    ("source", "piece"),
    [
        (CHATML, "the tokenizer's own: it does not write tools"),
        (END_OF_TEXT, "it does not write tools"),
        (HERMES.replace("tool_call>", "invoke>"), "none of the parsers hermes, mistral, llama3, json reads its calls, such as"),
        (HERMES.replace("message.tool_calls or []", "[]"), "leaves out a call of the tool 'kestrel_count'"),
    ],
)  # fmt: skip
def test_templates_without_tools_are_refused(tokenizer: PreTrainedTokenizerBase, source: str, piece: str) -> None:
    with pytest.raises(UserError) as caught:
        turns_of(tokenizer, source)
    assert piece in str(caught.value)
    assert "name a file with a template that writes tools in data.chat_template" in str(caught.value)


@pytest.mark.parametrize("source", [FORGETS_CALLS, LAST_ONLY + "{{ tools or '' }}"])
def test_templates_that_change_earlier_text_are_refused(tokenizer: PreTrainedTokenizerBase, source: str) -> None:
    with pytest.raises(UserError, match=r"changes earlier text when messages follow|leaves out"):
        turns_of(tokenizer, source, "hermes").check_prefix()


def test_ends_that_join_what_follows_are_refused(pico_tokenizer: Path) -> None:
    from tokenizers import AddedToken

    tokenizer = AutoTokenizer.from_pretrained(pico_tokenizer)
    tokenizer.add_tokens(TOOL_TOKENS, special_tokens=True)
    turns = turns_of(tokenizer, HERMES)
    # A token that reads over the end of a turn.
    tokenizer.add_tokens([AddedToken("<|im_end|>\n", normalized=False)])
    with pytest.raises(UserError, match="the tokenizer joins the end of a turn"):
        turns.check_prefix()


def test_a_parser_can_be_named(tokenizer: PreTrainedTokenizerBase) -> None:
    assert turns_of(tokenizer, HERMES.replace("tool_call>", "invoke>"), "json").parser == "json"
    assert turns_of(tokenizer, NO_END + "{{ tools | tojson }}", "json").parser == "json"


def test_templates_of_real_models() -> None:
    """Those that TRL ships, by the parser that they need; None: refused."""
    trl = pytest.importorskip("trl")
    from chat_templates import word_tokenizer

    folder = Path(trl.__file__).parent / "chat_templates"
    expected = {
        "qwen2_5": "hermes", "qwen3": "hermes", "qwen3_instruct_2507": "hermes", "llama3_1": "llama3", "llama3_2": "llama3",
        "llama3": None, "phi3": None, "phi3_5": None, "gemma": None, "gemma3": None,
    }  # fmt: skip
    tokenizer = word_tokenizer()
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>", "<|eot_id|>", "<end_of_turn>"], special_tokens=True)
    found = {}
    for name in expected:
        template = ChatTemplate(tokenizer, str(folder / f"{name}.jinja"))
        if not template.writes_tools:
            found[name] = None
            continue
        turns = ToolTurns(template)
        turns.check_prefix()
        found[name] = turns.parser
    assert found == expected
