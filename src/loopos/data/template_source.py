"""The chat template of a tokenizer: its own, a plain one, or a file's.

Enters: a tokenizer and the value of `data.chat_template`. Leaves: a Jinja template with the sentence that says where it
is from; the tokenizer's end token. Left out: rendering (`templates`, `template_sandbox`).
"""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from loopos.config.faults import UserError
from loopos.data.template_sandbox import LONGEST_TEMPLATE

_PLAIN_TURNS = (
    "{% for message in messages %}"
    "{{ '### ' + (message['role'] | capitalize) + ':\\n' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{{ '\\n\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Assistant:\\n' }}{% endif %}"
)


def end_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of the tokenizer's end token. Raises `UserError` where it has none."""
    if tokenizer.eos_token_id is None:
        raise UserError(
            "the tokenizer has no end token (eos_token), so the model could not learn to stop; set one in its "
            "tokenizer_config.json, or name another tokenizer in data.tokenizer"
        )
    return int(tokenizer.eos_token_id)


def plain_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The plain format as a Jinja template, with the begin token if the tokenizer adds one by itself. A tokenizer that
    keeps it in `chat_template` opens the trained model elsewhere with the same format.
    """
    added = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id] and tokenizer.bos_token_id is not None
    return ("{{ bos_token }}" if added else "") + _PLAIN_TURNS


def source_of(tokenizer: PreTrainedTokenizerBase, chosen: str) -> tuple[str, str]:
    """The template's text, and the sentence that says where it is from."""
    if chosen not in ("auto", "plain"):
        try:
            with Path(chosen).open(encoding="utf-8") as file:
                # One character more than a template may have: the sandbox then says that it is too long.
                return file.read(LONGEST_TEMPLATE + 1), f"chat template: {chosen}"
        except (OSError, UnicodeDecodeError) as problem:
            raise UserError(
                f'data.chat_template: {chosen} cannot be read ({problem}); wanted "auto", "plain" or a file with a '
                "Jinja template"
            ) from problem
    if chosen == "auto" and tokenizer.chat_template is not None:
        try:
            return tokenizer.get_chat_template(), "chat template: the tokenizer's own"
        except ValueError as problem:
            raise UserError(f'{problem}; set data.chat_template to "plain" or to a file') from problem
    why = "" if chosen == "plain" else ", since the tokenizer has none"
    return plain_template(tokenizer), f"chat template: plain (### User: ... ### Assistant: ...){why}"


def tool_source(tokenizer: PreTrainedTokenizerBase, chosen: str) -> str | None:
    """The template for conversations with tools, where the tokenizer has one of its own for them."""
    own = tokenizer.chat_template
    found = own.get("tool_use") if chosen == "auto" and isinstance(own, dict) else None
    return found if isinstance(found, str) else None
