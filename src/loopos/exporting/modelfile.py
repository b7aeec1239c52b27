"""An Ollama Modelfile for a GGUF file: the weights' path, the template for turns, and stop tokens.

Ollama templates are Go's. A Jinja chat template that writes each turn as fixed text around its content is translated:
the fixed text is found by rendering, and the translation is compared with the template's own rendering of several
conversations. Other templates are refused. Format: https://docs.ollama.com/modelfile
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from loopos.config.diagnostics import UserError
from loopos.data.template_sandbox import TemplateFailure, rendered
from loopos.storage.json_files import read_object

Conversation: TypeAlias = Sequence[Mapping[str, str]]
_ROLES = ("system", "user", "assistant")
_CONTENT = {"system": "Kestrel 41", "user": "Heron 73", "assistant": "Plover 58"}
_LAST = "Dunlin 96"
_LONGEST_CONTEXT = 8192
# Ollama's parameter name → the generation config's.
_PARAMETERS = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repeat_penalty": "repetition_penalty",
}


class _NotTurns(ValueError):
    """A template does not write turns as fixed text around their content; the message says where."""


@dataclass(frozen=True)
class Turns:
    """How conversations are written: `before[role]`, the content, `after[role]`, turn by turn; then `prompt`. first:
    text before everything. default: the system message of a conversation without one; None if there is none.
    """

    first: str
    before: Mapping[str, str]
    after: Mapping[str, str]
    prompt: str
    default: str | None

    def rendered(self, messages: Conversation) -> str:
        """The prompt for the next assistant turn."""
        if self.default is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.default}, *messages]
        turns = (self.before[each["role"]] + each["content"] + self.after[each["role"]] for each in messages)
        return self.first + "".join(turns) + self.prompt

    def in_go(self, *, adds_bos: bool) -> str:
        """The same as an Ollama template. adds_bos: tokenization adds the begin token by itself."""
        cases = [
            f'{{{{ {"if" if number == 0 else "else if"} eq .Role "{role}" }}}}'
            f"{self.before[role]}{{{{ .Content }}}}{self.after[role]}"
            for number, role in enumerate(_ROLES)
        ]
        first = "" if adds_bos else self.first
        return f"{first}{{{{ range .Messages }}}}{''.join(cases)}{{{{ end }}}}{{{{ end }}}}{self.prompt}"


def modelfile(folder: Path, weights: str, *, adds_bos: bool, actual: str) -> str:
    """The Modelfile of the model in `folder`, for the GGUF file `weights` beside it. Raises `UserError` for a chat
    template that cannot be translated.
    """
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    lines = [f"FROM ./{weights}"]
    if isinstance(tokenizer.chat_template, str):
        try:
            turns = find_turns(tokenizer)
        except (_NotTurns, TemplateFailure) as problem:
            raise UserError(
                f"{actual}: its chat template cannot be translated for Ollama: {problem}; expected one that writes "
                "each turn as fixed text around its content, like ChatML: use --format gguf and write the "
                "Modelfile's TEMPLATE by hand"
            ) from problem
        lines.append(f'TEMPLATE """{turns.in_go(adds_bos=adds_bos)}"""')
        if turns.default is not None:
            lines.append(f'SYSTEM """{turns.default}"""')
    else:
        lines.append('TEMPLATE """{{ .Prompt }}"""')
    config = read_object(folder / "config.json")
    generation_file = folder / "generation_config.json"
    generation = read_object(generation_file) if generation_file.is_file() else {}
    lines.append(f"PARAMETER num_ctx {min(int(config.get('max_position_embeddings', 2048)), _LONGEST_CONTEXT)}")
    for ollama_name, name in _PARAMETERS.items():
        if isinstance(generation.get(name), int | float):
            lines.append(f"PARAMETER {ollama_name} {generation[name]}")
    for token in _stops(generation, tokenizer):
        lines.append(f"PARAMETER stop {json.dumps(token, ensure_ascii=False)}")
    return "\n".join(lines) + "\n"


def find_turns(tokenizer: PreTrainedTokenizerBase) -> Turns:
    """How the tokenizer's chat template writes turns. Raises `_NotTurns` or `TemplateFailure`."""
    system, user, assistant = ({"role": role, "content": _CONTENT[role]} for role in _ROLES)
    last = {"role": "user", "content": _LAST}
    before_system, system_user, user_assistant, assistant_user, after_user = _cut(
        _render(tokenizer, [system, user, assistant, last], prompting=False), [*_CONTENT.values(), _LAST]
    )
    after_assistant = _cut(_render(tokenizer, [user, assistant], prompting=False), [_CONTENT["assistant"]])[1]
    before_user = _without_start(assistant_user, after_assistant)
    lead = _cut(_render(tokenizer, [user], prompting=False), [_CONTENT["user"]])[0]
    first = tokenizer.bos_token or ""
    if not before_system.startswith(first) or before_user.startswith(first):
        # A begin token that opens every turn is part of the turn.
        first = ""
    before_system, lead = _without_start(before_system, first), _without_start(lead, first)
    after_system = _without_end(system_user, before_user)
    default = None
    if lead != before_user:
        default = _without_end(_without_start(lead, before_system), after_system + before_user)
    prompt_text = _cut(_render(tokenizer, [user], prompting=True), [_CONTENT["user"]])[1]
    turns = Turns(
        first=first,
        before=dict(zip(_ROLES, (before_system, before_user, _without_start(user_assistant, after_user)), strict=True)),
        after=dict(zip(_ROLES, (after_system, after_user, after_assistant), strict=True)),
        prompt=_without_start(prompt_text, after_user),
        default=default,
    )
    for messages in ([user], [system, user], [user, assistant, last], [system, user, assistant, last, assistant, user]):
        if turns.rendered(messages) != _render(tokenizer, messages, prompting=True):
            raise _NotTurns(f"it renders a conversation of {len(messages)} turns differently from its parts")
    fixed = (first, turns.prompt, default or "", *turns.before.values(), *turns.after.values())
    if any(sign in text for sign in ("{{", '"""') for text in fixed):
        raise _NotTurns('it writes {{ or """, which have another meaning in a Modelfile')
    return turns


def _render(tokenizer: PreTrainedTokenizerBase, messages: Conversation, *, prompting: bool) -> str:
    variables = {
        "messages": [dict(each) for each in messages],
        "tools": None,
        "documents": None,
        "add_generation_prompt": prompting,
        **tokenizer.special_tokens_map,
    }
    return rendered(tokenizer.get_chat_template(), variables)


def _cut(text: str, contents: Sequence[str]) -> list[str]:
    """The text around the contents, which must occur in it in order."""
    parts = []
    for content in contents:
        part, found, text = text.partition(content)
        if not found:
            raise _NotTurns("it omits or changes the content of a turn")
        parts.append(part)
    return [*parts, text]


def _without_start(text: str, start: str) -> str:
    if not text.startswith(start):
        raise _NotTurns(f"{text!r} does not begin with {start!r}")
    return text[len(start) :]


def _without_end(text: str, end: str) -> str:
    if not text.endswith(end):
        raise _NotTurns(f"{text!r} does not end with {end!r}")
    return text[: len(text) - len(end)]


def _stops(generation: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    ends = generation.get("eos_token_id", tokenizer.eos_token_id)
    ids = [ends] if isinstance(ends, int) else list(ends or ())
    return [str(tokenizer.convert_ids_to_tokens(token)) for token in ids]
