"""Shared by the tests of runs in an environment: a pico model that writes turns, tasks and configs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from online_runs import online_config
from transformers import AutoModelForCausalLM, AutoTokenizer

from loopos.config.ppo import PpoConfig

OWN = "tests.rl.own_environments"
TASKS = [{"goal": goal, "secret": number} for number, goal in enumerate(["a", "b b", "a", "the parcel"])]
# Calls are whole turns; a tool's result is between two turns.
TEMPLATE = (
    "{% if tools %}{{ tools[0].function.name }}{% endif %}{% for message in messages %}"
    "{{ '<|user|>' if message.role == 'user' else '<|end|>' if message.role == 'tool' else '' }}{{ message.content }}"
    "{% for call in message.tool_calls or [] %}{{ call.function.name + (call.function.arguments | tojson) }}{% endfor %}"
    "{{ '<|im_end|>' if message.role == 'assistant' else '<|assistant|>' }}{% endfor %}"
)


def save_actor(folder: Path, pico_folder: Path) -> Path:
    """The pico model with a template for tools; every fourth token or so it ends its turn."""
    tokenizer = AutoTokenizer.from_pretrained(pico_folder)
    tokenizer.add_tokens(["<|user|>", "<|assistant|>", "<|end|>", "<|im_end|>"], special_tokens=True)
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(pico_folder, tie_word_embeddings=False)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    with torch.no_grad():
        # A direction that every state has, which the end of a turn is read from.
        model.get_input_embeddings().weight[:, 0] = 1.0
        model.lm_head.weight[tokenizer.convert_tokens_to_ids("<|im_end|>"), 0] += 1.0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def played_config(
    run: Path,
    weights: Path,
    method: str = "grpo",
    *,
    environment: dict[str, Any] | None = None,
    functions: Sequence[dict[str, Any]] = (),
    **sections: Any,
) -> PpoConfig:
    """Runs in an environment in which every turn that ends is a call."""
    generation = {"max_new_tokens": 8, **sections.pop("generation", {})}
    config = online_config(run, weights, method, generation=generation, **sections)
    played = {
        "name": f"{OWN}:Guess", "tool_parser": f"{OWN}:any_guess", "max_turns": 4, "max_tokens": 60,
        **(environment or {}),
    }  # fmt: skip
    Path(config.data.source).write_text("".join(json.dumps(task) + "\n" for task in TASKS))
    values = config.model_dump(mode="json", exclude_unset=True)
    values["reward"]["functions"] = [*functions]
    return PpoConfig.model_validate({**values, "environment": played})
