"""Chat templates of the kinds that models come with, small, and tokenizers to try them on.

Enters: nothing. Leaves: Jinja texts by name, and a word-level tokenizer whose ids can be read off its table.
"""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from loopos.data.conversations import Message

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML_MARKED = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
BRACKETS = (  # a turn ends with the end token, and there is no generation prompt
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ ' ' + message['content'] + ' ' + eos_token }}{% else %}{{ raise_exception('no system here') }}{% endif %}"
    "{% endfor %}"
)
END_OF_TEXT = (  # writes more behind the last message than behind earlier ones
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
NO_END = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
THINKING = (  # sets the reasoning apart, and leaves it out of earlier turns
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% set said = message['content'] %}"
    "{% if '</think>' in said %}{% set parts = said.split('</think>') %}"
    "{% if loop.last %}{{ '<think>\n' + parts[0].replace('<think>', '').strip() + '\n</think>\n\n' }}{% endif %}"
    "{% set said = parts[-1].lstrip() %}{% endif %}"
    "{{ said + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
FORGETFUL = (  # never shows the reasoning
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' "
    "+ message['content'].split('</think>')[-1].strip() + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LAST_ONLY = (  # rewrites earlier text when messages follow
    "{{ messages | length }}:{% for message in messages %}{{ message['role'] + ' ' + message['content'] + eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}"
)
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|user|>", "<|assistant|>", "<|end|>"]

WORDS = [
    "<unk>", "<pad>", "<bos>", "<eos>", "<|user|>", "<|assistant|>", "<|end|>", "\n", " ", "<think>", "</think>", "####",
    "two", "and", "make", "four", "4", "###", "User:", "Assistant:", "System:", "hi", "there", "how", "fine", "be", "kind",
]  # fmt: skip
WORD_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def word_tokenizer(chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """Words, blanks and line ends, each one token; the id of a token is its index in `WORDS`."""
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n| |[^\s]+"), "isolated")
    opened = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    )
    opened.add_tokens(["<|user|>", "<|assistant|>", "<|end|>"], special_tokens=True)
    opened.chat_template = chat_template
    return opened


TOOL_CHATML = (  # writes tools first, calls as Qwen2.5 does, and what tools answer
    "{% if tools %}{{ '<|im_start|>system\n' }}{% for tool in tools %}{{ tool | tojson + '\n' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + (message.content or '') }}"
    "{% for call in message.tool_calls or [] %}"
    '{{ \'<call>{"name": "\' + call.function.name + \'", "arguments": \' + (call.function.arguments | tojson) }}'
    "{{ '}</call>' }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ITEMS_CHATML = TOOL_CHATML.replace(  # as Qwen3.5 and later: a parameter a line
    "(call.function.arguments | tojson)", "'' }}{% for key, value in call.function.arguments | items %}{{ key + '=' + value }}{% endfor %}{{ ''"
)  # fmt: skip


def long_talk(number: int) -> list[Message]:
    """`number` turns that differ, some with the words of templates in them."""
    summary = ["hi", "<|im_end|>", "assistant\n", "a ", "two\n lines "]
    return [
        Message("user", f"{summary[index % 5]}{index}") if index % 2 == 0 else Message("assistant", f"so {summary[index % 5]}{index}")
        for index in range(number)
    ]  # fmt: skip
