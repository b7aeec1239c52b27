"""Shared by the tests of vLLM workers: a small model that vLLM's CPU build runs, and what a worker answers."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from ray_runs import environment_of, ran
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

PYTHON = os.environ.get("LOOPOS_TEST_VLLM_PYTHON")

ASK = """
import json, sys
import torch
from loopos.config.ppo import PpoConfig
from loopos.generation.engine import Engine
from loopos.generation.settings import SamplingParams
from loopos.models.adapters import train_adapters
from loopos.models.backbone import headless
from loopos.models.load import load_pretrained
from loopos.rl.workers.dispatch import Dispatcher
from loopos.rl.workers.opening import RunView, TrainedPolicy, recipe_of
from loopos.rl.workers.protocol import Request
from loopos.rl.workers.ray_transport import RayTransport

config, prompts, settings = PpoConfig.model_validate(json.loads(sys.argv[1])), *json.loads(sys.argv[2])
pretrained = load_pretrained(config.data.pretrained_weights, causal=True)
causal = pretrained.model
if config.training.trainable == "lora":
    causal.requires_grad_(False)
    train_adapters(headless(causal), config.training, None)
recipe = recipe_of(config, pretrained, trust_remote_code=False)
transport = RayTransport(recipe, config.rollout)
dispatcher = Dispatcher(transport, workers=1, restarts=0, timeout=300, say=lambda message: None)
policy = TrainedPolicy(causal=causal, recipe=recipe, run=RunView(lambda: 0, lambda: 0, None))
requests = [Request(prompts, [SamplingParams(**each)] * len(prompts), n) for each, n in settings]
found, generator = [], torch.Generator().manual_seed(1)
for version in range(2):
    dispatcher.publish(version, policy.weights)
    for request in requests:
        answers = {"vllm": dispatcher.finished(dispatcher.begin(request), seconds=600)}
        answers["local"] = Engine(causal, pretrained.tokenizer).generate(
            request.prompts, request.settings, n=request.n
        )
        found.append({name: [vars(each) for each in written] for name, written in answers.items()})
    with torch.no_grad():
        for parameter in causal.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
dispatcher.close()
print(json.dumps(found))
"""


def save_small_llama(folder: Path, tokenizer: Path) -> Path:
    """Heads of 32 numbers, the smallest that vLLM's attention on processors takes, and tied embeddings."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=400, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=256, tie_word_embeddings=True, initializer_range=0.1,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    return folder


def answers(config: Any, prompts: list[list[int]], settings: list[tuple[dict[str, Any], int]]) -> list[dict[str, Any]]:
    """For the weights of the folder and then for changed ones, and each of the settings with its n: completions of a
    worker and of LoopOS's engine, as dictionaries.
    """
    arguments = [json.dumps(config.model_dump(mode="json")), json.dumps([prompts, settings])]
    found: list[dict[str, Any]] = json.loads(ran(ASK, arguments, environment_of())[-1])
    return found
