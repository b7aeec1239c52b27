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


_TOOLS_IN_SYSTEM = (
    "{% if tools %}{{ BEGIN }}{% for tool in tools %}{{ tool | tojson + '\n' }}{% endfor %}{{ END }}{% endif %}"
)
HERMES = (  # calls in marks, results of one turn together in a user's turn
    _TOOLS_IN_SYSTEM.replace("BEGIN", "'<|im_start|>system\n<tools>\n'").replace("END", "'</tools><|im_end|>\n'")
    + "{% for message in messages %}{% if message.role == 'tool' %}"
    "{% if loop.previtem.role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}"
    "{{ '\n<tool_response>\n' + message.content + '\n</tool_response>' }}"
    "{% if loop.last or loop.nextitem.role != 'tool' %}{{ '<|im_end|>\n' }}{% endif %}"
    "{% else %}{{ '<|im_start|>' + message.role + '\n' + message.content }}"
    "{% for call in message.tool_calls or [] %}{{ '\n' if message.content or not loop.first }}"
    "{{ '<tool_call>\n{\"name\": \"' + call.function.name + '\", \"arguments\": ' + (call.function.arguments | tojson) + '}\n</tool_call>' }}"
    "{% endfor %}{{ '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA_TOOLS = (  # one call a turn, without marks, and tools in the first user's turn
    "{% set header = '<|start|>' %}{% for message in messages %}{% if message.tool_calls %}"
    "{% if message.tool_calls | length != 1 %}{{ raise_exception('only single tool-calls at once') }}{% endif %}"
    "{% set call = message.tool_calls[0].function %}"
    "{{ header + 'assistant<|h|>\n\n{\"name\": \"' + call.name + '\", \"parameters\": ' + (call.arguments | tojson) + '}<|eot_id|>' }}"
    "{% elif message.role == 'tool' %}{{ header + 'ipython<|h|>\n\n' + (message.content | tojson) + '<|eot_id|>' }}"
    "{% else %}{{ header + message.role + '<|h|>\n\n' }}"
    "{% if tools and loop.first %}{% for tool in tools %}{{ (tool | tojson(indent=4)) + '\n\n' }}{% endfor %}{% endif %}"
    "{{ (message.content | trim) + '<|eot_id|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ header + 'assistant<|h|>\n\n' }}{% endif %}"
)
MISTRAL_TOOLS = (  # a list of calls with ids of nine characters, and no generation prompt
    "{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}"
    "{% if tools and loop.first %}{{ '[AVAILABLE_TOOLS]' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}{% endif %}"
    "{{ '[INST]' + message.content + '[/INST]' }}"
    "{% elif message.tool_calls %}{{ '[TOOL_CALLS][' }}{% for call in message.tool_calls %}"
    "{% if call.id | length != 9 %}{{ raise_exception('ids of length 9') }}{% endif %}"
    "{{ (call.function | tojson)[:-1] + ', \"id\": \"' + call.id + '\"}' + (']' if loop.last else ', ') }}{% endfor %}{{ eos_token }}"
    "{% elif message.role == 'tool' %}{{ '[TOOL_RESULTS]' + ({'content': message.content, 'call_id': message.tool_call_id} | tojson) + '[/TOOL_RESULTS]' }}"
    "{% else %}{{ message.content + eos_token }}{% endif %}{% endfor %}"
)
JSON_TOOLS = (  # calls as plain JSON in the turns of END_OF_TEXT
    "{% if tools %}{{ '<|system|>\n' + (tools | tojson) + '<|end|>\n' }}{% endif %}{% for message in messages %}"
    "{{ '<|' + message.role + '|>\n' + message.content }}"
    "{% if message.tool_calls %}{{ '[' }}{% for call in message.tool_calls %}{{ (call.function | tojson) + (']' if loop.last else ', ') }}{% endfor %}{% endif %}"
    "{{ '<|end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
FORGETS_CALLS = HERMES.replace("message.tool_calls or []", "((message.tool_calls or []) if loop.revindex <= 2 else [])")
THINKING_TOOLS = HERMES.replace(  # an empty block of reasoning in the last turn only, unless the turn has one
    "message.role + '\n' + message.content",
    "message.role + '\n' + ('<think>\n\n</think>\n\n' if loop.last and message.role == 'assistant' and '<think>' not in message.content else '') + message.content",
)
TOOL_TOKENS = [
    *SPECIAL,
    "<|start|>",
    "<|h|>",
    "<|eot_id|>",
    "[INST]",
    "[/INST]",
    "[TOOL_CALLS]",
    "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]",
]
