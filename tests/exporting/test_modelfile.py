"""A Modelfile's template writes what the chat template writes; one that is no sequence of turns is refused."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from loopos.config.diagnostics import UserError
from loopos.data.templates import plain_template
from loopos.exporting.export import export
from loopos.exporting.modelfile import find_turns, modelfile
from loopos.exporting.settings import ExportSettings

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WITH_DEFAULT = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a lamp<|im_end|>\n' }}{% endif %}"
    + CHATML.removeprefix("{% for message in messages %}")
)
LLAMA_3 = (
    "{{ bos_token }}{% for message in messages %}{{ '<|start|>' + message['role'] + '<|end|>\n\n' + message['content'] | trim "
    "+ '<|eot|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant<|end|>\n\n' }}{% endif %}"
)
TALK = [
    {"role": "system", "content": "short"},
    {"role": "user", "content": "where?"},
    {"role": "assistant", "content": "here"},
    {"role": "user", "content": "sure?"},
]


@pytest.fixture
def tokenizer(pico_tokenizer: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(pico_tokenizer)


def by_ollama(template: str, messages: list[dict[str, str]]) -> str:
    """The Go template, run: `range` over messages with `if eq .Role` inside."""
    match = re.fullmatch(r"(.*?)\{\{ range \.Messages \}\}(.*)\{\{ end \}\}\{\{ end \}\}(.*)", template, re.DOTALL)
    assert match is not None
    parts = re.split(r'\{\{ (?:if|else if) eq \.Role "(\w+)" \}\}', match[2])
    by_role = dict(zip(parts[1::2], parts[2::2], strict=True))
    return match[1] + "".join(by_role[m["role"]].replace("{{ .Content }}", m["content"]) for m in messages) + match[3]


@pytest.mark.parametrize("source", [CHATML, WITH_DEFAULT, LLAMA_3, "plain"])
def test_both_templates_write_the_same(source: str, tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = plain_template(tokenizer) if source == "plain" else source
    turns = find_turns(tokenizer)
    go = turns.in_go(adds_bos=False)
    for messages in (TALK[:2], TALK):
        expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert by_ollama(go, messages) == expected
    assert turns.default == ("You are a lamp" if source == WITH_DEFAULT else None)
    asked = tokenizer.apply_chat_template(TALK[1:2], tokenize=False, add_generation_prompt=True)
    assert turns.rendered(TALK[1:2]) == asked


def test_a_begin_token_that_the_runtime_adds_is_left_out(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = LLAMA_3
    turns = find_turns(tokenizer)
    assert turns.in_go(adds_bos=False).startswith("<bos>{{ range")
    assert turns.in_go(adds_bos=True).startswith("{{ range")


@pytest.mark.parametrize(
    "source",
    [
        # The number of a turn stands in it; what is said is changed; the last turn alone is written.
        "{% for message in messages %}{{ loop.index ~ message['role'] ~ message['content'] ~ '|' }}{% endfor %}",
        "{% for message in messages %}{{ message['role'] ~ (message['content'] | upper) }}{% endfor %}",
        "{{ messages[-1]['content'] }}",
        CHATML.replace("'<|im_end|>'", "'{{ end }}'"),
    ],
)
def test_other_templates_are_refused(source: str, pico_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(pico_folder, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(pico_folder)
    tokenizer.chat_template = source
    tokenizer.save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match="cannot be translated for Ollama"):
        export(str(tmp_path / "model"), tmp_path / "out", ExportSettings(format="modelfile"))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def with_template(pico_folder: Path, folder: Path, generation: dict[str, Any]) -> Path:
    shutil.copytree(pico_folder, folder)
    tokenizer = AutoTokenizer.from_pretrained(pico_folder)
    tokenizer.chat_template = WITH_DEFAULT
    tokenizer.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


def test_the_file_names_weights_stops_and_parameters(pico_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    folder = with_template(pico_folder, tmp_path / "model", {"eos_token_id": [2, 0], "temperature": 0.5, "top_k": 20})
    export(str(folder), tmp_path / "out", ExportSettings(format="modelfile", type="q8_0", check=False))
    text = (tmp_path / "out" / "Modelfile").read_text(encoding="utf-8")
    assert text.startswith('FROM ./out-Q8_0.gguf\nTEMPLATE """{{ range .Messages }}')
    assert (tmp_path / "out" / "out-Q8_0.gguf").is_file()
    assert 'SYSTEM """You are a lamp"""\n' in text
    lines = text.splitlines()
    for line in ("PARAMETER num_ctx 256", "PARAMETER temperature 0.5", "PARAMETER top_k 20"):
        assert line in lines
    assert [line for line in lines if line.startswith("PARAMETER stop")] == [
        'PARAMETER stop "<eos>"',
        'PARAMETER stop "<pad>"',
    ]


def test_a_model_without_turns_is_prompted_with_the_raw_text(pico_folder: Path) -> None:
    text = modelfile(pico_folder, "x.gguf", adds_bos=False, actual="pico")
    assert 'TEMPLATE """{{ .Prompt }}"""' in text
